"""nmt experts RUN: report what the experts do."""

import argparse
import json
from dataclasses import asdict

from nmt.commands import say, show
from nmt.commands.keep import keep
from nmt.config import Config
from nmt.data.held_out import describe_cut, encode_pairs
from nmt.decoding.translator import Translator
from nmt.evaluation.sets import evaluation_set
from nmt.experts.report import expert_report
from nmt.pages.experts import to_html, to_markdown
from nmt.run import RunDirectory
from nmt.wording import counted


def report(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Print a table of each layer, and write the report to the report folder as HTML, Markdown and JSON."""
    # Without a test set, use the dev set. If there is neither, the error names the test set.
    split = "dev" if run.text("dev")[0] and not run.text("test")[0] else "test"
    references = [] if options.reference is None else [options.reference]
    text = evaluation_set(options.source, references, split, run)
    translator = Translator.load(run, config)
    layers = expert_report(
        translator.model,
        translator.subwords,
        text.sources,
        text.references[0],
        text.domains,
        config.decoding.experts_per_token,
    )
    told = describe_cut(encode_pairs(translator.subwords, text.sources, text.references[0]).cut)
    if told:
        say(told)
    name = f"{split} set" if text.own else text.title
    subject = f"{name}, {counted(len(text.sources), 'sentence pair')}"
    subject += f", {counted(len(set(text.domains)), 'domain')}" if text.domains else ""
    title = run.path.resolve().name
    result = {"split": split, **text.to_dict(), "set": name, "layers": [asdict(layer) for layer in layers]}
    # Files of reports on other text have the name of that text.
    stem = "experts" if text.own else f"experts-{text.name}"
    contents = {
        f"{stem}.json": json.dumps(result, indent=2),
        f"{stem}.html": to_html(layers, title, subject),
        f"{stem}.md": to_markdown(layers, title, subject),
    }
    show("\n\n".join(str(layer) for layer in layers))
    page = run.report / f"{stem}.html"
    keep(run, contents, f"{page} shows what each expert is chosen for (also {stem}.md and {stem}.json)")
