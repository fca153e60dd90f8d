"""nmt evaluate: BLEU, chrF and perplexity of a test set, for one or several numbers of experts per token."""

import argparse
import json
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nmt.commands import Parser, say
from nmt.config import Config, ModelConfig, MoEConfig
from nmt.decoding.lines import read_all
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.evaluation.compute import model_cost
from nmt.evaluation.scores import Comparison, Score, corpus_scores, paired_bootstrap
from nmt.files import write_atomically
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.training.validation import Perplexity, perplexity

_BOOTSTRAP_SAMPLES, _BOOTSTRAP_SEED = 1000, 12345


def parser() -> Parser:
    """Options of `nmt evaluate`."""
    parser = Parser(
        "evaluate",
        "BLEU and chrF of a run's translations, and the perplexity of the references; with --dial, what they become "
        "with fewer or more experts per token than in training, and what that costs.",
        "  nmt evaluate runs/demo --show 10\n"
        "  nmt evaluate demo --source newstest2014.en --reference newstest2014.de decoding.beam_size=8\n"
        "  nmt evaluate demo --dial 1,2,4",
    )
    parser.add_argument("--source", metavar="F", help="sentences to translate (default: the run's own test set)")
    parser.add_argument("--reference", metavar="F", help="their translations, line by line")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which of the run's own sets")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N translations beside source and reference"
    )
    parser.add_argument(
        "--dial", metavar="N,N,...", help="a table for these numbers of experts per token (report/dial.json)"
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Score a set, print the scores and keep them in the run's report folder."""
    counts = [] if options.dial is None else dial_counts(options.dial, config)
    sources, references, _ = evaluation_text(options.source, options.reference, options.split, run)
    name = options.split if options.source is None else Path(options.source).name
    translator = Translator.load(run, config)
    if counts:
        positions = _dial(counts, translator, sources, references, config)
        _keep_dial(positions, name, run, config)
        _show(options.show, sources, references, {each.label: each.measured.hypotheses for each in positions})
        print("\n".join([_HEAD, *(position.row() for position in positions)]))
        print(f"{len(sources):,} sentences of {name}, {_decoding_line(translator)}")
        print("\n".join(f"{score.name}: {score.signature}" for score in positions[0].measured.scores))
        print(f"p and 95 %: paired bootstrap, {_BOOTSTRAP_SAMPLES} samples")
        return
    found = _measure(translator, sources, references, config)
    _show(options.show, sources, references, {"translation": found.hypotheses})
    for score in found.scores:
        print(score)
    print(f"perplexity {found.perplexity.pieces:.3f} per piece, {found.perplexity.words:.2f} per word")
    speed = f"{len(sources) / found.seconds:,.1f} sentences/s"
    print(f"{len(sources):,} sentences of {name}, {speed}, {_decoding_line(translator)}")
    folder = run.report
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.hypotheses", "".join(f"{line}\n" for line in found.hypotheses).encode())
    result = {
        "set": name,
        "steps": translator.steps,
        "scores": {score.name: {"value": score.value, "signature": score.signature} for score in found.scores},
        "perplexity": found.perplexity.pieces,
        "word_perplexity": found.perplexity.words,
        "sentences": len(sources),
        "seconds": found.seconds,
        "decoding": config.to_dict()["decoding"],
    }
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=2).encode())
    say(f"translations and scores are in {folder}")


@dataclass(frozen=True)
class _Measured:
    """A set translated once."""

    hypotheses: list[str]
    seconds: float
    scores: list[Score]
    perplexity: Perplexity


def _measure(translator: Translator, sources: list[str], references: list[str], config: Config) -> _Measured:
    started = time.perf_counter()
    hypotheses = [translation.text for translation in translator.translate(sources)]
    seconds = time.perf_counter() - started
    scores = corpus_scores(hypotheses, references)
    measured = perplexity(
        translator.model,
        translator.subwords,
        sources,
        references,
        min(config.training.batch_tokens, 8192),
        World(translator.device),
        config.decoding.precision,
        translator.decoding.experts_per_token,
    )
    return _Measured(hypotheses, seconds, scores, measured)


def _show(count: int, sources: list[str], references: list[str], translations: dict[str, list[str]]) -> None:
    """Print some sentences, each with every translation under its label."""
    for index in range(min(count, len(sources))):
        # Spread over the set, so that more is seen than its first lines.
        place = index * len(sources) // count
        print(f"source      {sources[place]}\nreference   {references[place]}")
        for label, hypotheses in translations.items():
            print(f"{label:<11} {hypotheses[place]}")
        print()


def _decoding_line(translator: Translator) -> str:
    decoding, steps = translator.decoding, translator.steps
    of = f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)}"
    return f"beam {decoding.beam_size}, alpha {decoding.alpha}, beta {decoding.beta}, {of}"


def evaluation_text(
    source: str | None, reference: str | None, split: str, run: RunDirectory
) -> tuple[list[str], list[str], list[str]]:
    """(sources, references, domains) of two files, or of one of the run's own sets; domains are empty if unknown.

    UserError for one file without the other, DataError for files that do not pair or a run without the set.
    """
    if (source is None) != (reference is None):
        raise UserError("--source and --reference go together")
    domains: list[str] = []
    if source is not None and reference is not None:
        sources, references = read_all(source), read_all(reference)
        if len(sources) != len(references):
            raise DataError(
                f"{source} has {len(sources)} lines but {reference} has {len(references)}: they must pair line by line"
            )
    else:
        sources, references, domains = run.text(split)
    if not sources:
        raise DataError(f"{run.path} has no {split} set: give --source and --reference")
    return sources, references, domains


# ------------------------------------------------------------------------------------------------------- the dial


@dataclass(frozen=True)
class DialPosition:
    """One number of experts per token."""

    experts_per_token: int
    trained: bool
    """As in training. A strictly balanced gate then uses its thresholds, and the number is an average."""
    ops_per_timestep: int
    measured: _Measured
    comparisons: list[Comparison]
    """With the translations as trained, for BLEU and chrF."""

    @property
    def label(self) -> str:
        """How the table calls it."""
        return f"{self.experts_per_token}{' trained' if self.trained else ''}"

    @property
    def sentences_per_second(self) -> float:
        """Of the translation."""
        return len(self.measured.hypotheses) / self.measured.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "experts_per_token": self.experts_per_token,
            "trained": self.trained,
            "ops_per_timestep": self.ops_per_timestep,
            "seconds": self.measured.seconds,
            "sentences_per_second": self.sentences_per_second,
            "scores": {score.name: score.value for score in self.measured.scores},
            "perplexity": self.measured.perplexity.pieces,
            "word_perplexity": self.measured.perplexity.words,
            "against_trained": [asdict(comparison) for comparison in self.comparisons],
        }

    def row(self) -> str:
        """A line of the table below `_HEAD`."""
        bleu = self.comparisons[0]
        low, high = bleu.system_interval
        against = "" if self.trained else f"{bleu.difference:+.2f}, p = {bleu.p_value:.3f}"
        cells = (
            f"{self.label:<13}",
            f"{self.ops_per_timestep / 1e6:>11.2f}M",
            f"{self.sentences_per_second:>11,.1f}",
            f"{bleu.system:>6.2f} ({low:>5.2f}-{high:>5.2f})",
            f"{self.measured.scores[1].value:>6.2f}",
            f"{self.measured.perplexity.pieces:>10.3f}",
            against,
        )
        return "  ".join(cells).rstrip()


_HEAD = (
    "experts/token  ops/timestep  sentences/s  BLEU (95 %)            chrF2  perplexity  BLEU against trained\n"
    "-------------  ------------  -----------  --------------------  ------  ----------  --------------------"
)


def dial_counts(text: str, config: Config) -> list[int]:
    """The numbers of experts per token that --dial names. UserError for anything else."""
    if not config.model.moe.num_experts:
        raise UserError("--dial wants a run with experts: model.moe.num_experts is 0")
    if config.decoding.experts_per_token:
        raise UserError(f"--dial and decoding.experts_per_token={config.decoding.experts_per_token}: give one of them")
    if not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", text.replace(" ", ""), re.ASCII):
        raise UserError(f"--dial {text!r}: give numbers of experts, at least 1, such as 1,2,4")
    return [int(number) for number in text.split(",")]


def dial_positions(counts: list[int], moe: MoEConfig) -> list[tuple[int, bool]]:
    """(experts per token, whether as trained) in order; as trained is always among them, to compare with."""
    trained = moe.experts_per_token
    # Every other gate does the same with the number named as without.
    apart = moe.gating == "strictly_balanced"
    positions = {(trained, True), *((count, False) for count in counts if apart or count != trained)}
    return sorted(positions, key=lambda position: (position[0], not position[1]))


def with_experts_per_token(model: ModelConfig, count: int) -> ModelConfig:
    """The configuration of a model trained with `count` experts per token, as the gates share them out to groups."""
    moe = model.moe
    if moe.gating != "hierarchical":
        return replace(model, moe=replace(moe, k=count))
    groups = min(count, moe.primary_k)
    return replace(model, moe=replace(moe, primary_k=groups, k=count // groups))


def _dial(
    counts: list[int], translator: Translator, sources: list[str], references: list[str], config: Config
) -> list[DialPosition]:
    wanted = dial_positions(counts, config.model.moe)
    dialled = []
    for count, trained in wanted:
        decoding = replace(translator.decoding, experts_per_token=0 if trained else count)
        try:
            dialled.append(Translator(translator.model, translator.subwords, decoding, translator.device))
        except ValueError as error:
            raise UserError(f"--dial: {error}") from error
    # The first batch of a process pays for what is made once.
    translator.translate(sources[: config.decoding.batch_sentences])
    measured = []
    for (count, _), each in zip(wanted, dialled, strict=True):
        measured.append(_measure(each, sources, references, config))
        say(f"{count} experts per token: {len(sources):,} sentences in {measured[-1].seconds:.1f} s")
    baseline = measured[[trained for _, trained in wanted].index(True)].hypotheses
    positions = []
    for (count, trained), found in zip(wanted, measured, strict=True):
        ops = model_cost(with_experts_per_token(config.model, count), translator.subwords.size).ops_per_timestep
        compared = paired_bootstrap(baseline, found.hypotheses, references, _BOOTSTRAP_SAMPLES, _BOOTSTRAP_SEED)
        positions.append(DialPosition(count, trained, ops, found, compared))
    return positions


def _keep_dial(positions: list[DialPosition], name: str, run: RunDirectory, config: Config) -> None:
    measured = positions[0].measured
    result = {
        "set": name,
        "sentences": len(measured.hypotheses),
        "signatures": {score.name: score.signature for score in measured.scores},
        "bootstrap": {"samples": _BOOTSTRAP_SAMPLES, "seed": _BOOTSTRAP_SEED},
        "decoding": config.to_dict()["decoding"],
        "positions": [position.to_dict() for position in positions],
    }
    run.report.mkdir(exist_ok=True)
    write_atomically(run.report / "dial.json", json.dumps(result, indent=2).encode())
    say(f"the table is in {run.report / 'dial.json'}")
