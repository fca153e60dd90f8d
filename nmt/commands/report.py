"""nmt experts RUN: report what the experts do."""

import argparse
import json
from dataclasses import asdict, replace

from nmt.commands import say, show
from nmt.commands.direction import asked_direction, check_tag, directions_of, is_given
from nmt.commands.keep import keep
from nmt.config import Config
from nmt.data.held_out import describe_cut, encode_pairs
from nmt.decoding.translator import Translator
from nmt.evaluation.sets import EvaluationSet, by_direction, evaluation_set
from nmt.experts.report import expert_report
from nmt.pages.experts import to_html, to_markdown
from nmt.run import RunDirectory
from nmt.wording import counted


def report(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Print a table of each layer, and write the report to the report folder as HTML, Markdown and JSON."""
    # Without a test set, use the dev set. If there is neither, the error names the test set.
    split = "dev" if run.text("dev")[0] and not run.text("test")[0] else "test"
    references = [] if options.reference is None else [options.reference]
    text = _text(options, evaluation_set(options.source, references, split, run), run, config)
    for note in text.notes:
        say(note)
    translator = Translator.load(run, config)
    lines = text.directions or [text.direction] * text.size
    pairs = translator.pairs(text.sources, text.references[0], text.options(translator.options), lines)
    layers = expert_report(
        translator.model,
        translator.subwords,
        pairs.sources,
        pairs.targets,
        text.domains,
        config.decoding.experts_per_token,
        text.directions,
        pairs.symbols,
        translator.shown_symbols(),
        config.model.moe.copies,
    )
    told = describe_cut(encode_pairs(translator.subwords, pairs.sources, pairs.targets).cut)
    if told:
        say(told)
    name = f"{text.title} set" if text.own else text.title
    subject = f"{name}, {counted(len(text.sources), 'sentence pair')}"
    subject += f", {counted(len(set(text.domains)), 'domain')}" if text.domains else ""
    subject += f", {counted(len(set(text.directions)), 'direction')}" if text.directions else ""
    title = run.path.resolve().name
    result = {"split": split, **text.to_dict(), "set": name, "layers": [asdict(layer) for layer in layers]}
    # Files of reports on other text have the name of that text.
    stem = "experts" if text.own and text.name == split else f"experts-{text.name}"
    contents = {
        f"{stem}.json": json.dumps(result, indent=2),
        f"{stem}.html": to_html(layers, title, subject),
        f"{stem}.md": to_markdown(layers, title, subject),
    }
    show("\n\n".join(str(layer) for layer in layers))
    page = run.report / f"{stem}.html"
    keep(run, contents, f"{page} shows what each expert is chosen for (also {stem}.md and {stem}.json)")


def _text(options: argparse.Namespace, text: EvaluationSet, run: RunDirectory, config: Config) -> EvaluationSet:
    """Return the text in the direction and with the tag that are asked for; without, a run's own set has all of its."""
    directions = directions_of(run, config)
    check_tag(options, directions)
    if is_given(options) or not text.directions:
        return by_direction(text, directions, asked_direction(options, directions), options.tag)[0]
    return replace(text, name=f"{text.name}-{options.tag}", tag=options.tag) if options.tag else text
