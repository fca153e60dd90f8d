"""The Python interface: trained models that translate, score and explain, and training from Python.

`import nmt` offers these names and loads this file on their first use. An invalid argument raises a `UserError` of one
line (nmt/errors.py has the tree of errors).
"""

import difflib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from nmt.config import Config, Direction
from nmt.data.held_out import encode_pairs
from nmt.decoding.directions import Directions
from nmt.decoding.parts import Rank
from nmt.decoding.scoring import PairScore, pair_log_probs, pair_scores
from nmt.decoding.translation import Options, Translation
from nmt.decoding.translator import Translator
from nmt.device import shortage_told
from nmt.errors import Ended, StorageError, UserError
from nmt.experts.explain import Explanation, explain_sentence
from nmt.experts.report import LayerReport, expert_report
from nmt.extras import named_extras
from nmt.run import RunDirectory
from nmt.text.term_files import read_terms
from nmt.text.terms import Terms

Texts = list[str] | tuple[str, ...]
Table = Mapping[str, str | None] | str | os.PathLike[str]
"""Terms with their required translations, or the path of a file of them."""


class TranslateOptions(TypedDict, total=False):
    """Options of a call. Those left out are as in the model's own settings (`nmt settings decoding`)."""

    beam_size: int
    n_best: int
    experts_per_token: int
    alpha: float
    beta: float
    max_length_ratio: float
    min_length: int
    max_length: int
    no_repeat_ngram: int
    retry: bool
    markup: bool
    prune_margin: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_source_pieces: int
    batch_tokens: int
    attention: bool
    paragraphs: bool
    alignments: bool


class Model:
    """A trained model. No call changes it, so several threads may use one model at the same time."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        """Load the model of a run or an exported model. Users call `nmt.load` instead."""
        self._translator = Translator.load(run, config)
        self.path = run.path
        """Folder of the run or exported model."""
        self.config = config
        """The configuration of the run."""

    def __repr__(self) -> str:
        steps = ", ".join(map(str, self.steps))
        found = [Direction.of(each) for each in self.directions]
        shown = ", ".join(f"{source} to {target}" for source, target in found)
        return f"<nmt.Model {self.path}: {shown}, step {steps}>"

    @property
    def directions(self) -> list[str]:
        """The directions that the model was trained on, such as ["en-de", "de-en"]."""
        return list(map(str, self._known.trained))

    @property
    def _known(self) -> Directions:
        assert self._translator.directions is not None
        return self._translator.directions

    @property
    def steps(self) -> list[int]:
        """The training steps whose parameters, or their mean, the model has."""
        return list(self._translator.steps)

    @overload
    def translate(
        self,
        text: str,
        *,
        prefix: str = "",
        terms: Table | None = None,
        mbr: str | None = None,
        direction: str | None = None,
        tag: str = "",
        **options: Unpack[TranslateOptions],
    ) -> Translation: ...
    @overload
    def translate(
        self,
        text: Texts,
        *,
        prefix: Texts = (),
        terms: Table | None = None,
        mbr: str | None = None,
        direction: str | None = None,
        tag: str = "",
        **options: Unpack[TranslateOptions],
    ) -> list[Translation]: ...
    def translate(
        self,
        text: str | Texts,
        *,
        prefix: str | Texts = "",
        terms: Table | None = None,
        mbr: str | None = None,
        direction: str | None = None,
        tag: str = "",
        **options: Unpack[TranslateOptions],
    ) -> Translation | list[Translation]:
        """Translate a line, or each line of a list: one result per line, in order.

        `options` apply only to this call. A line without a letter or digit that the model knows is returned
        unchanged, and a line that is too long is translated in parts. The translation begins with `prefix`, a text
        for each line, or an empty one; UserError if it cannot be kept exactly. `terms` has required translations:
        {source term: translation}, with None for a term that is not translated, or the path of a .tsv, .csv or .tbx
        file; DataError if it cannot be used. `mbr` is chrf or bleu: the best of the `n_best` hypotheses is then the
        one that agrees most with all of them. `direction`, such as "en-fr", is needed if the model has several;
        UserError for one that it does not translate. CheckpointError if the model's outputs are not finite.
        """
        lines = _texts("text", text)
        prefixes = _prefixes(text, prefix)
        with _typed_errors("nmt.Model.translate"):
            chosen = self._options(options, direction, tag)
            tables = [[self._table(terms, chosen)]] * len(lines) if terms is not None else []
            rank = None if mbr is None else self._rank(mbr, chosen)
            found = self._translator.translate(lines, chosen, prefixes=prefixes, terms=tables, rank=rank)
        return found[0] if isinstance(text, str) else found

    def _table(self, terms: Table, options: Options) -> Terms:
        if isinstance(terms, str | os.PathLike):
            return read_terms(Path(terms), *self._direction(options))
        return Terms.of(terms)

    @overload
    def score(
        self,
        sources: str,
        targets: str,
        *,
        experts_per_token: int | None = None,
        direction: str | None = None,
        tag: str = "",
    ) -> PairScore: ...
    @overload
    def score(
        self,
        sources: Texts,
        targets: Texts,
        *,
        experts_per_token: int | None = None,
        direction: str | None = None,
        tag: str = "",
    ) -> list[PairScore]: ...
    def score(
        self,
        sources: str | Texts,
        targets: str | Texts,
        *,
        experts_per_token: int | None = None,
        direction: str | None = None,
        tag: str = "",
    ) -> PairScore | list[PairScore]:
        """Score a given translation, or each of a list: log P(target | source), for each subword.

        `direction` and `tag` are as for `translate`. MemoryLimitError if there is not enough memory.
        """
        pairs = _pairs(sources, targets)
        with _typed_errors("nmt.Model.score"):
            options = self._options(_given(experts_per_token), direction, tag)
            read = self._translator.pairs(*pairs, options)
            held_out = encode_pairs(self._translator.subwords, read.sources, read.targets, prefixes=read.symbols)
            log_probs = pair_log_probs(self._translator.models, held_out, options.experts_per_token)
            found = list(pair_scores(self._translator.subwords, held_out, log_probs))
        return found[0] if isinstance(sources, str) else found

    def explain(
        self, text: str, *, direction: str | None = None, tag: str = "", **options: Unpack[TranslateOptions]
    ) -> Explanation:
        """Translate a sentence, and report for each subword which experts were chosen and what each contributed.

        DataError if the text is too long, or has no letter or digit that the model knows. UserError if the model has
        no experts.
        """
        if not isinstance(text, str):
            raise UserError(f"text is {_kind(text)}: give one sentence as a str")
        self._check_experts()
        with _typed_errors("nmt.Model.explain"):
            chosen = self._options(options, direction, tag)
            with shortage_told(lambda: "explaining a sentence", "lower beam_size, or explain a shorter one"):
                return explain_sentence(self._translator, text, chosen)

    def experts(
        self,
        sources: Texts,
        targets: Texts,
        domains: Texts = (),
        *,
        directions: Texts = (),
        experts_per_token: int | None = None,
        tag: str = "",
    ) -> list[LayerReport]:
        """Report how the experts of each MoE layer share the tokens of sentence pairs.

        `domains` may have a label for each pair; the report then has the domains that each expert prefers. For a model
        of several directions, `directions` has that of each pair, such as "en-fr", and the report has the languages
        that each expert prefers. UserError if the model has no experts or there are no pairs.
        """
        pairs = _pairs(sources, targets)
        labels, of_pair = _texts("domains", domains), _texts("directions", directions)
        if not pairs[0] or isinstance(sources, str):
            raise UserError("sources is empty: give a list of sentences, and a list of their translations")
        if labels and len(labels) != len(pairs[0]):
            raise UserError(f"{len(labels)} domains for {len(pairs[0])} sentence pairs: give one each, or none")
        if of_pair and len(of_pair) != len(pairs[0]):
            raise UserError(f"{len(of_pair)} directions for {len(pairs[0])} sentence pairs: give one each, or none")
        self._check_experts()
        with _typed_errors("nmt.Model.experts"):
            given = _given(experts_per_token)
            asked: list[str | None] = [*of_pair] or [None] * len(pairs[0])
            options = {each: self._options(given, each, tag) for each in dict.fromkeys(asked)}
            chosen = [options[each].direction for each in asked]
            read = self._translator.pairs(*pairs, options[asked[0]], chosen)
            return expert_report(
                self._translator.model,
                self._translator.subwords,
                read.sources,
                read.targets,
                labels,
                options[asked[0]].experts_per_token,
                [Direction.of(each) for each in of_pair],
                read.symbols,
                self._translator.shown_symbols(),
            )

    def _options(self, given: TranslateOptions, direction: str | None, tag: str) -> Options:
        known = [each.name for each in fields(Options)]
        for name in given:
            if name not in known:
                begun = [each for each in known if each.startswith(name)]
                close = begun or difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"
                raise UserError(f"unknown option {name}; {hint}")
        if direction is not None and not isinstance(direction, str):
            raise UserError(f'direction is {_kind(direction)}: give a str such as "en-fr"')
        asked = None if direction is None else Direction.of(direction)
        options = replace(self._translator.options, **given, direction=asked, tag=tag)
        for model in self._translator.models:
            model.check_experts_per_token(options.experts_per_token)
        return options

    def _direction(self, options: Options) -> Direction:
        """Return the direction of a call. UserError if the model does not have it, or has several and none is given."""
        if options.direction is None:
            return self._known.only("give direction")
        return self._known.check(options.direction)

    def _rank(self, metric: str, options: Options) -> Rank:
        """Return what orders the hypotheses of a line by agreement. UserError if there is nothing to choose."""
        from nmt.evaluation.mbr import METRICS, by_agreement
        from nmt.evaluation.tokenizers import bleu_tokenizer

        if metric not in METRICS:
            raise UserError(f"mbr={metric!r} is not one of {', '.join(METRICS)}")
        if options.n_best == 1:
            raise UserError("mbr chooses among n_best hypotheses: give n_best=32 and temperature=1.0, for example")
        tokenizer = bleu_tokenizer(self.config.evaluation.tokenize, self._direction(options).target)
        return by_agreement(metric, tokenizer.name)

    def _check_experts(self) -> None:
        if len(self._translator.models) > 1:
            raise UserError("an ensemble has no experts of its own: load one of its models")
        if not self._translator.model.moe_layers():
            raise UserError(f"{self.path} has no experts: model.moe.num_experts is 0")


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    checkpoint: str | int | None = None,
    ensemble: Sequence[str | os.PathLike[str]] = (),
) -> Model:
    """Load the model of a run, given its folder or its name in runs/, or an exported model.

    `device` is cuda, cpu or auto; `precision` is fp32, bf16 or auto; `quantize` is int8 or none; `checkpoint` is best,
    last, average or a step.
    Those left out are as in the run's own settings. CheckpointError if the model is missing, damaged or does not fit.
    """
    with _typed_errors("nmt.load"):
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"path is {_kind(path)}: give the folder of a run or an exported model, as a str or a Path")
        run = RunDirectory.existing(os.fsdecode(path))
        config = run.config()
        given = {"device": device, "precision": precision, "quantize": quantize, "checkpoint": checkpoint}
        changes: dict[str, Any] = {name: str(value) for name, value in given.items() if value is not None}
        if isinstance(ensemble, str) or not all(isinstance(each, str | os.PathLike) for each in ensemble):
            raise UserError("ensemble is not a list of folders: give a list of str or Path")
        if ensemble:
            changes["ensemble"] = [os.fsdecode(each) for each in ensemble]
        return Model(run, replace(config, decoding=replace(config.decoding, **changes)))


def configure(*settings: str) -> Config:
    """Return the configuration of `nmt train SETTINGS`, such as "experiment=demo" and "training.max_steps=500".

    corpus=mine reads conf/corpus/mine.yaml in the working directory. UserError for a file or setting that does not
    exist.
    """
    words = _texts("settings", settings)
    with _typed_errors("nmt.configure"):
        from nmt.compose import compose_config

        return compose_config(words)


def prepare(config: Config) -> Path:
    """Read, filter and encode the corpus of a configuration, and return the folder of the prepared corpus.

    Work that was done before is not repeated. Progress goes to standard error. The folder has a report,
    report/prepare.html. DataError if the text cannot be used.
    """
    _check_config(config)
    with _typed_errors("nmt.prepare"):
        from nmt.commands import say
        from nmt.commands.prepare import prepare_corpus

        return prepare_corpus(config.corpus, say).path


def train(config: Config) -> Path:
    """Train a run in this process, or resume it from its newest checkpoint, and return its folder.

    Progress goes to standard error. On a signal to stop, such as an interrupt, it saves a checkpoint and then raises
    KeyboardInterrupt. UserError outside the main thread, because only that thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("nmt.train only works in the main thread: call it there, or start nmt train as a process")
    _check_config(config)
    with _typed_errors("nmt.train"):
        from nmt.commands.train import train

        try:
            return train(config).path
        except SystemExit as stopped:
            raise Ended(int(stopped.code or 0) - 128) from stopped


@contextmanager
def _typed_errors(task: str) -> Iterator[None]:
    """Turn every ValueError in this context, and a missing library of an extra, into a UserError.

    An error of the system, such as a file without permission to read it, becomes a StorageError.
    """
    with named_extras(task):
        try:
            yield
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        except OSError as error:
            raise StorageError(f"{error.filename or 'I/O'}: {error.strerror or error}") from error


def _check_config(config: Config) -> None:
    if not isinstance(config, Config):
        raise UserError(f"config is {_kind(config)}: give a Config (nmt.Config.from_dict makes one of a dict)")


def _given(experts_per_token: int | None) -> TranslateOptions:
    return {} if experts_per_token is None else {"experts_per_token": experts_per_token}


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    """Return the given texts as a list; a single text becomes a list of one. UserError if one is not a text."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple):
        raise UserError(f"{name} is {_kind(given)}: give a str, or a list of str")
    for place, each in enumerate(given):
        if not isinstance(each, str):
            raise UserError(f"{name}[{place}] is {_kind(each)}: give a list of str")
    return list(given)


def _prefixes(text: str | Texts, prefix: str | Texts) -> dict[int, str]:
    """Return the prefixes by the index of their line. UserError if they do not pair with the lines."""
    given = _texts("prefix", prefix) if prefix else []
    if given and isinstance(text, str) != isinstance(prefix, str):
        raise UserError("text and prefix must both be a str, or both a list of str")
    if given and not isinstance(text, str) and len(given) != len(text):
        raise UserError(f"{len(given)} prefixes for {len(text)} lines: give one each ('' for none), or leave them out")
    return dict(enumerate(given))


def _pairs(sources: str | Texts, targets: str | Texts) -> tuple[list[str], list[str]]:
    pairs = _texts("sources", sources), _texts("targets", targets)
    if isinstance(sources, str) != isinstance(targets, str):
        raise UserError("sources and targets must both be a str, or both a list of str")
    if len(pairs[0]) != len(pairs[1]):
        raise UserError(f"{len(pairs[0])} sources but {len(pairs[1])} targets: give one target per source")
    return pairs


def _kind(value: object) -> str:
    """Return the type of a value for a message: "a dict", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
