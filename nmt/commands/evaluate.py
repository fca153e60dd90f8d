"""nmt evaluate: scores of test sets, or of one set with several numbers of experts per token."""

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from nmt.commands import Parser, say, show
from nmt.commands.direction import asked_direction, check_tag, directions_of, is_given
from nmt.commands.keep import keep
from nmt.config import TOKENIZERS, Config
from nmt.data.held_out import describe_cut
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.dial import HEAD, dial, dial_counts
from nmt.evaluation.kept import origin
from nmt.evaluation.measure import Measured, Scorer, measure
from nmt.evaluation.results import SetResult, means, table
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, SEED, all_scores
from nmt.evaluation.sets import EvaluationSet, Request, by_direction, evaluation_sets, requests
from nmt.evaluation.tokenizers import Tokenizer, bleu_tokenizer, describe, misfit
from nmt.evaluation.tune import FEW_SENTENCES, SURE, Point, tune
from nmt.run import RunDirectory
from nmt.wording import counted, steps_of


class _Describe(argparse.Action):
    """Add the option and its value to the list that describes the sets; the order of the options counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.sets = [*namespace.sets, ((option_string or "").lstrip("-"), values)]


def parser() -> Parser:
    """Options of `nmt evaluate`."""
    parser = Parser(
        "evaluate",
        "Print BLEU, chrF and the paper's multi-bleu of a run's translations, and the perplexity of the references.\n"
        "Each set is --split, --set, or --source with one or more --reference; several sets may follow each other.\n"
        "With --hypothesis, score translations made elsewhere; RUN is then needed for its own sets only. With --dial,\n"
        "compare scores and cost with fewer or more experts per token than in training. With --tune, choose settings\n"
        "of the search by BLEU on the dev set, and write them into the run. The own sets of a run of several\n"
        "directions have a line for each; --from and --to choose one, and say which one the files have.",
        "  nmt evaluate runs/demo --show 10\n"
        "  nmt evaluate demo --source newstest2014.en --reference newstest2014.de decoding.beam_size=8\n"
        "  nmt evaluate demo --source my.en --reference first.de --reference second.de --tokenize intl\n"
        "  nmt evaluate demo --split dev --split test --source my.en --reference my.de --json\n"
        "  nmt evaluate demo --set wmt14 --set wmt13\n"
        "  nmt evaluate --hypothesis other.de --reference my.de --ter\n"
        "  nmt evaluate demo --dial 1,2,4\n"
        "  nmt evaluate demo --tune\n"
        "  nmt evaluate many --from en --to fr --source my.en --reference my.fr",
        takes_run=False,
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a run, or its name in runs/")
    for option, metavar, choices, meaning in (
        ("--split", None, ("test", "dev"), "one of the run's own sets (default: test, unless another set is given)"),
        ("--set", "NAME", None, "a set that sacreBLEU knows, such as wmt14, in the languages of the run"),
        ("--source", "F", None, "sentences to translate"),
        ("--reference", "F", None, "their translations, line by line; repeat it for several (perplexity: the first)"),
        ("--hypothesis", "F", None, "translations of the set that were made elsewhere, to be scored instead"),
    ):
        parser.add_argument(
            option, metavar=metavar, choices=choices, help=meaning, action=_Describe, dest="sets", default=[]
        )
    parser.add_direction()
    parser.add_argument(
        "--tokenize",
        choices=TOKENIZERS,
        help="tokeniser of BLEU, as in sacreBLEU (default: evaluation.tokenize of the run)",
    )
    parser.add_argument("--lowercase", action="store_true", help="BLEU without regard to case, as in sacreBLEU")
    parser.add_argument("--ter", action="store_true", help="also the translation edit rate, which is slow")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON, with the keys of sacreBLEU")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N translations beside source and reference"
    )
    parser.add_argument(
        "--dial", metavar="N,N,...", help="a table for these numbers of experts per token (report/dial.json)"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose decoding.alpha, beta and beam_size on the dev set (or --source and --reference), and write them "
        "to config.yaml (report/tune.json)",
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory | None, config: Config) -> None:
    """Score the sets, print the scores, and write those of the run's own translations to its report folder."""
    wanted = requests(options.sets) or [Request(split="dev" if options.tune else "test")]
    counts = [] if options.dial is None else dial_counts(options.dial, config)
    if counts:
        _check_alone("--dial", options, wanted)
    if options.show < 0:
        raise UserError(f"--show {options.show} must be at least 0")
    if options.tune:
        _check_alone("--tune", options, wanted)
        _check_tunable(wanted[0], run, config)
    texts = _texts(options, wanted, run, config)
    for note in dict.fromkeys(note for text in texts for note in text.notes):
        say(note)
    targets = [(text.direction or config.corpus.direction).target if run else "" for text in texts]
    tokenizers = [_tokenizer(options.tokenize, target, config) for target in targets]
    told = describe(dict(zip(targets, tokenizers, strict=True)))
    for text, tokenizer in zip(texts, tokenizers, strict=True):
        _say_doubts(text, tokenizer)
    if run is None or all(text.hypotheses is not None for text in texts):
        scored = [_scored(text, tokenizer, options) for text, tokenizer in zip(texts, tokenizers, strict=True)]
        _print(scored, options, [told])
        return
    if len(texts) > 1 and (counts or options.tune):
        option = "--tune" if options.tune else "--dial"
        raise UserError(f"{option} takes a single direction of {run.path}: give --from and --to")
    translator = Translator.load(run, config)
    if counts:
        _dial(counts, options.show, translator, texts[0], tokenizers[0], run, config)
        return
    if options.tune:
        _tune(translator, texts[0], tokenizers[0], run)
        return
    results = []
    for text, tokenizer in zip(texts, tokenizers, strict=True):
        if text.hypotheses is not None:
            results.append(_scored(text, tokenizer, options))
            continue
        found = measure(translator, text, _scorer(tokenizer, options), config)
        _say_what_was_cut(text, found)
        results.append(SetResult(text, found.hypotheses, found.scores, found))
        _keep(results[-1], translator, run, config)
    _print(results, options, [_decoding_line(translator), told])


def _texts(
    options: argparse.Namespace, wanted: Sequence[Request], run: RunDirectory | None, config: Config
) -> list[EvaluationSet]:
    """Return the sets, each in one direction."""
    if run is None:
        if is_given(options) or options.tag:
            raise UserError("--from, --to and --tag are for a RUN: leave them out")
        return evaluation_sets(wanted, run, "")
    directions = directions_of(run, config)
    check_tag(options, directions)
    named = any(each.named for each in wanted)
    asked = asked_direction(options, directions) if is_given(options) or named else None
    languages = "-".join(re.split("[-_]", code)[0] for code in asked) if asked and named else ""
    texts = evaluation_sets(wanted, run, languages)
    return [part for text in texts for part in by_direction(text, directions, asked, options.tag)]


def _check_alone(option: str, options: argparse.Namespace, wanted: Sequence[Request]) -> None:
    """Raise UserError unless an option has a single set that the run translates, and no option that it would ignore."""
    ignored = [name for name in ("ter", "lowercase", "json") if getattr(options, name)]
    if option == "--tune":
        ignored += [name for name in ("dial", "show") if getattr(options, name)]
    if ignored:
        raise UserError(f"{option} with --{ignored[0]}: leave out one of them")
    if len(wanted) > 1 or wanted[0].hypothesis is not None:
        raise UserError(f"{option} takes a single set, without --hypothesis")


def _check_tunable(wanted: Request, run: RunDirectory | None, config: Config) -> None:
    """Raise UserError if the run's test set would be tuned on, or if settings to be tuned are given."""
    if wanted.split == "test":
        raise UserError("--tune on the test set would make its scores worthless: leave out --split test")
    if run is None:
        return
    stored = run.config().decoding
    for name in Point._fields:
        if getattr(config.decoding, name) != getattr(stored, name):
            raise UserError(f"--tune chooses decoding.{name}: leave it out")


def _tokenizer(name: str | None, language: str, config: Config) -> Tokenizer:
    if name is None:
        return bleu_tokenizer(config.evaluation.tokenize, language)
    return bleu_tokenizer(name, language, "--tokenize ")


def _say_doubts(text: EvaluationSet, tokenizer: Tokenizer) -> None:
    for references in text.references:
        if not "".join(references).strip():
            say(f"every reference of {text.title} is blank: its scores mean nothing")
    doubt = misfit(tokenizer.name, text.references[0], "--tokenize ")
    if doubt:
        say(doubt)


def _scorer(tokenizer: Tokenizer, options: argparse.Namespace) -> Scorer:
    return partial(all_scores, tokenizer=tokenizer.name, lowercase=options.lowercase, ter=options.ter)


def _scored(text: EvaluationSet, tokenizer: Tokenizer, options: argparse.Namespace) -> SetResult:
    """Return the scores of translations made elsewhere."""
    assert text.hypotheses is not None
    return SetResult(text, text.hypotheses, _scorer(tokenizer, options)(text.hypotheses, text.references))


def _print(results: Sequence[SetResult], options: argparse.Namespace, notes: Sequence[str]) -> None:
    """Print examples, scores and notes; with --json, the scores alone on standard output."""
    if options.json:
        scored = [each for result in results for each in result.json_scores()]
        scored += [each for mean in means(results) for each in mean.json_scores()]
        show(json.dumps(scored, indent=1, ensure_ascii=False))
        for note in notes:
            say(note)
        return
    for result in results:
        _show(options.show, result.text, {"translation": result.hypotheses})
    show("\n".join([table(results), *notes]))


def _keep(result: SetResult, translator: Translator, run: RunDirectory, config: Config) -> None:
    """Write the run's translations of a set, and their scores."""
    report = {
        **result.report(),
        **origin(result.hypotheses, translator.steps, run.chosen(config.decoding)),
        "steps": translator.steps,
        "decoding": config.to_dict()["decoding"],
    }
    name = result.text.name
    hypotheses = "".join(f"{line}\n" for line in result.hypotheses)
    contents = {f"{name}.hypotheses": hypotheses, f"{name}.json": json.dumps(report, indent=2)}
    keep(run, contents, f"translations and scores are in {run.report / name}.hypotheses and .json")


def _say_what_was_cut(text: EvaluationSet, found: Measured) -> None:
    told = describe_cut(found.perplexity.cut)
    if told:
        say(f"perplexity of {text.title}: {told}")


def _show(count: int, text: EvaluationSet, translations: dict[str, list[str]]) -> None:
    """Print `count` sentences, each with its references and its translations with their labels."""
    for index in range(min(count, text.size)):
        # Spread evenly over the set, instead of its first lines.
        place = index * text.size // min(count, text.size)
        if text.sources:
            show(f"source      {text.sources[place]}")
        for references in text.references:
            show(f"reference   {references[place]}")
        for label, hypotheses in translations.items():
            show(f"{label:<11} {hypotheses[place]}")
        show()


def _decoding_line(translator: Translator) -> str:
    options, steps = translator.options, steps_of(translator.steps)
    return f"beam {options.beam_size}, alpha {options.alpha}, beta {options.beta}, {steps}"


def _dial(
    counts: list[int],
    examples: int,
    translator: Translator,
    text: EvaluationSet,
    tokenizer: Tokenizer,
    run: RunDirectory,
    config: Config,
) -> None:
    """Print and write the table for these numbers of experts per token."""
    positions = dial(counts, translator, text, tokenizer.name, config, say)
    measured = positions[0].measured
    _show(examples, text, {each.label: each.measured.hypotheses for each in positions})
    show("\n".join([HEAD, *(position.row() for position in positions)]))
    show(f"{counted(text.size, 'sentence')} of {text.title}, {_decoding_line(translator)}")
    show("\n".join(f"{score.name}: {score.signature}" for score in measured.scores))
    show(tokenizer)
    show(f"p and 95 %: paired bootstrap, {BOOTSTRAP_SAMPLES} samples")
    _say_what_was_cut(text, measured)
    result = {
        **text.to_dict(),
        "sentences": text.size,
        "signatures": {score.name: score.signature for score in measured.scores},
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": SEED},
        "decoding": config.to_dict()["decoding"],
        "positions": [position.to_dict() for position in positions],
    }
    name = text.report("dial", "json")
    keep(run, {name: json.dumps(result, indent=2)}, f"the table is in {run.report / name}")


def _tune(translator: Translator, text: EvaluationSet, tokenizer: Tokenizer, run: RunDirectory) -> None:
    """Choose settings of the search, print why, and write them into the run."""
    found = tune(translator, text, tokenizer.name, say)
    show(found.table())
    show()
    show(f"{counted(text.size, 'sentence')} of {text.title}, {steps_of(translator.steps)}")
    show(tokenizer)
    show(f"p and 95 %: paired bootstrap, {BOOTSTRAP_SAMPLES} samples; a value is changed if its gain has p < {SURE}")
    show("\n".join(found.verdicts()))
    if text.size < FEW_SENTENCES:
        low, high = found.tried[0].bleu.system_interval
        say(
            f"{text.title} has only {counted(text.size, 'sentence')}: its BLEU is uncertain by "
            f"{(high - low) / 2:.2f} either way, so small gains are not seen; 1,000 are better"
        )
    chosen = found.chosen._asdict()
    if found.chosen == found.before:
        say("nothing was changed")
    elif run.exported:
        given = " ".join(f"decoding.{name}={value}" for name, value in chosen.items())
        say(f"{run.path} is an exported model, which is not changed: tune its run and export that, or give {given}")
    else:
        run.write_tuned(chosen, {**text.to_dict(), **found.to_dict()})
        say(f"written to {run.config_path}; {run.tuned_path} has the old values and the table")
