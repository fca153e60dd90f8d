"""nmt evaluate: BLEU, chrF and perplexity of a test set, with one or several numbers of experts per token."""

import argparse
import json

from nmt.commands import Parser, say, show
from nmt.commands.keep import keep
from nmt.config import Config
from nmt.data.held_out import describe_cut
from nmt.decoding.translator import Translator
from nmt.evaluation.dial import HEAD, dial, dial_counts
from nmt.evaluation.kept import origin
from nmt.evaluation.measure import Measured, measure
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, SEED
from nmt.evaluation.sets import EvaluationSet, evaluation_set
from nmt.evaluation.tokenizers import Tokenizer, bleu_tokenizer, misfit
from nmt.run import RunDirectory
from nmt.wording import counted, steps_of


def parser() -> Parser:
    """Options of `nmt evaluate`."""
    parser = Parser(
        "evaluate",
        "Print BLEU and chrF of a run's translations and the perplexity of the references. With --dial, compare scores "
        "and cost with fewer or more experts per token than in training.",
        "  nmt evaluate runs/demo --show 10\n"
        "  nmt evaluate demo --source newstest2014.en --reference newstest2014.de decoding.beam_size=8\n"
        "  nmt evaluate demo --source my.en --reference first.de --reference second.de evaluation.tokenize=intl\n"
        "  nmt evaluate demo --dial 1,2,4",
    )
    parser.add_argument("--source", metavar="F", help="sentences to translate (default: the run's own test set)")
    parser.add_argument(
        "--reference",
        metavar="F",
        action="append",
        default=[],
        help="their translations, line by line; repeat it for several references (perplexity is of the first)",
    )
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which of the run's own sets")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N translations beside source and reference"
    )
    parser.add_argument(
        "--dial", metavar="N,N,...", help="a table for these numbers of experts per token (report/dial.json)"
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Score a set, print the scores and write them to the run's report folder."""
    counts = [] if options.dial is None else dial_counts(options.dial, config)
    tokenizer = bleu_tokenizer(config.evaluation.tokenize, config.corpus.target_language)
    text = evaluation_set(options.source, options.reference, options.split, run)
    for references in text.references:
        if not "".join(references).strip():
            say(f"every reference of {text.title} is blank: its scores mean nothing")
    doubt = misfit(tokenizer.name, text.references[0])
    if doubt:
        say(doubt)
    translator = Translator.load(run, config)
    if counts:
        _dial(counts, options.show, translator, text, tokenizer, run, config)
        return
    found = measure(translator, text, tokenizer.name, config)
    _show(options.show, text, {"translation": found.hypotheses})
    for score in found.scores:
        show(score)
    show(f"perplexity {found.perplexity.pieces:,.3f} per subword, {found.perplexity.words:,.2f} per word")
    speed = f"{len(text.sources) / found.seconds:,.1f} sentences/s"
    show(f"{counted(len(text.sources), 'sentence')} of {text.title}, {speed}, {_decoding_line(translator)}")
    show(tokenizer)
    _say_what_was_cut(found)
    result = {
        **text.to_dict(),
        **origin(found.hypotheses, translator.steps, run.chosen(config.decoding)),
        "steps": translator.steps,
        "scores": {score.name: score.to_dict() for score in found.scores},
        "perplexity": found.perplexity.pieces,
        "word_perplexity": found.perplexity.words,
        "sentences": len(text.sources),
        "seconds": found.seconds,
        "decoding": config.to_dict()["decoding"],
    }
    hypotheses = "".join(f"{line}\n" for line in found.hypotheses)
    contents = {f"{text.name}.hypotheses": hypotheses, f"{text.name}.json": json.dumps(result, indent=2)}
    keep(run, contents, f"translations and scores are in {run.report / text.name}.hypotheses and .json")


def _say_what_was_cut(found: Measured) -> None:
    told = describe_cut(found.perplexity.cut)
    if told:
        say(f"perplexity: {told}")


def _show(count: int, text: EvaluationSet, translations: dict[str, list[str]]) -> None:
    """Print `count` sentences, each with its references and its translations with their labels."""
    size = len(text.sources)
    for index in range(min(count, size)):
        # Spread evenly over the set, instead of its first lines.
        place = index * size // min(count, size)
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
    show(f"{counted(len(text.sources), 'sentence')} of {text.title}, {_decoding_line(translator)}")
    show("\n".join(f"{score.name}: {score.signature}" for score in measured.scores))
    show(tokenizer)
    show(f"p and 95 %: paired bootstrap, {BOOTSTRAP_SAMPLES} samples")
    _say_what_was_cut(measured)
    result = {
        **text.to_dict(),
        "sentences": len(text.sources),
        "signatures": {score.name: score.signature for score in measured.scores},
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": SEED},
        "decoding": config.to_dict()["decoding"],
        "positions": [position.to_dict() for position in positions],
    }
    name = text.report("dial", "json")
    keep(run, {name: json.dumps(result, indent=2)}, f"the table is in {run.report / name}")
