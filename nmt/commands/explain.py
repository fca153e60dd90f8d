"""nmt experts RUN --explain SENTENCE: explain the translation of a sentence."""

import argparse
import hashlib
import json
import re
from dataclasses import replace

from nmt.commands import show
from nmt.commands.direction import asked_direction, directions_of
from nmt.commands.keep import keep
from nmt.config import Config
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.experts.explain import explain_sentence
from nmt.pages.explain import explanation_page
from nmt.run import RunDirectory

_LONGEST_SLUG = 40


def explain(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Print the experts of each token and what each contributes, and write a page and JSON to report/."""
    if options.source is not None or options.reference is not None:
        raise UserError("--source and --reference are for the report: leave them out with --explain")
    # Arguments of the command line may not be valid Unicode.
    sentence = options.explain.encode(errors="replace").decode()
    if not sentence.strip():
        raise DataError("the sentence of --explain is blank: give one with words")
    directions = directions_of(run, config)
    direction = asked_direction(options, directions)
    translator = Translator.load(run, config)
    chosen = replace(translator.options, direction=direction, tag=options.tag)
    explanation = explain_sentence(translator, sentence, chosen)
    show(explanation)
    content = {**explanation.to_dict(), "decoding": config.to_dict()["decoding"]}
    name = f"explain-{slug(sentence)}"
    if directions.are_several:
        content |= {"direction": str(direction), "tag": options.tag}
        name = "-".join([name, str(direction), *filter(None, [options.tag])])
    contents = {f"{name}.json": json.dumps(content, indent=2), f"{name}.html": explanation_page(explanation)}
    page = run.report / f"{name}.html"
    keep(run, contents, f"a page is in {page}, all digits are in {name}.json")


def slug(sentence: str) -> str:
    """Return a file name for a sentence: the ASCII letters and digits of its first words, and a hash of all of it."""
    words = "-".join(re.findall(r"[a-z0-9]+", sentence.lower()))[:_LONGEST_SLUG].strip("-")
    digest = hashlib.sha256(sentence.encode()).hexdigest()[:8]
    return f"{words}-{digest}" if words else digest
