"""nmt evaluate: BLEU, chrF and perplexity of a test set."""

import argparse
import json
import time
from pathlib import Path

from nmt.commands import Parser, say
from nmt.config import Config
from nmt.decoding.lines import read_all
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.evaluation.scores import corpus_scores
from nmt.files import write_atomically
from nmt.run import RunDirectory
from nmt.training.validation import perplexity


def parser() -> Parser:
    """Options of `nmt evaluate`."""
    parser = Parser(
        "evaluate",
        "BLEU and chrF of a run's translations, and the perplexity of the references.",
        "  nmt evaluate runs/demo --show 10\n"
        "  nmt evaluate demo --source newstest2014.en --reference newstest2014.de decoding.beam_size=8",
    )
    parser.add_argument("--source", metavar="F", help="sentences to translate (default: the run's own test set)")
    parser.add_argument("--reference", metavar="F", help="their translations, line by line")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which of the run's own sets")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N translations beside source and reference"
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Score a set, print the scores and keep them in the run's report folder."""
    sources, references, _ = evaluation_text(options.source, options.reference, options.split, run)
    translator = Translator.load(run, config)
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
        translator.device,
        config.decoding.precision,
    )
    name = options.split if options.source is None else Path(options.source).name
    for index in range(min(options.show, len(sources))):
        # Spread over the set, so that more is seen than its first lines.
        place = index * len(sources) // options.show
        print(f"source      {sources[place]}\nreference   {references[place]}\ntranslation {hypotheses[place]}\n")
    for score in scores:
        print(score)
    print(f"perplexity {measured.pieces:.3f} per piece, {measured.words:.2f} per word")
    print(f"{len(sources):,} sentences of {name}, {len(sources) / seconds:,.1f} sentences/s, {_decoding_line(config)}")
    folder = run.report
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.hypotheses", "".join(f"{line}\n" for line in hypotheses).encode())
    result = {
        "set": name,
        "scores": {score.name: {"value": score.value, "signature": score.signature} for score in scores},
        "perplexity": measured.pieces,
        "word_perplexity": measured.words,
        "sentences": len(sources),
        "seconds": seconds,
        "decoding": config.to_dict()["decoding"],
    }
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=2).encode())
    say(f"translations and scores are in {folder}")


def _decoding_line(config: Config) -> str:
    decoding = config.decoding
    return f"beam {decoding.beam_size}, alpha {decoding.alpha}, beta {decoding.beta}, checkpoint {decoding.checkpoint}"


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
