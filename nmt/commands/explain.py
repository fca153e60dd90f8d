"""nmt experts RUN --explain SENTENCE."""

import argparse
import hashlib
import json
import re

from nmt.commands import show
from nmt.commands.keep import keep
from nmt.config import Config
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.experts.explain import explain_sentence
from nmt.pages.explain import explanation_page
from nmt.run import RunDirectory

_LONGEST_SLUG = 40


def explain(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """The experts of every token of a sentence, and what each contributed: a table, and a page and JSON in report/."""
    if options.source is not None or options.reference is not None:
        raise UserError("--source and --reference are for the report: --explain has its sentence")
    # What came from the command line need not be Unicode.
    sentence = options.explain.encode(errors="replace").decode()
    if not sentence.strip():
        raise DataError("the sentence of --explain is blank")
    explanation = explain_sentence(Translator.load(run, config), sentence)
    show(explanation)
    content = {**explanation.to_dict(), "decoding": config.to_dict()["decoding"]}
    name = f"explain-{slug(sentence)}"
    contents = {f"{name}.json": json.dumps(content, indent=2), f"{name}.html": explanation_page(explanation)}
    page = run.report / f"{name}.html"
    keep(run, contents, f"the same as a page is in {page}, with all digits in {name}.json")


def slug(sentence: str) -> str:
    """A file name for a sentence: its first words as far as they are plain letters and digits, and a hash of it all."""
    words = "-".join(re.findall(r"[a-z0-9]+", sentence.lower()))[:_LONGEST_SLUG].strip("-")
    digest = hashlib.sha256(sentence.encode()).hexdigest()[:8]
    return f"{words}-{digest}" if words else digest
