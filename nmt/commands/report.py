"""nmt experts RUN: what the experts do."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from nmt.commands import say
from nmt.commands.evaluate import evaluation_text
from nmt.config import Config
from nmt.decoding.translator import Translator
from nmt.evaluation.expert_page import to_html, to_markdown
from nmt.evaluation.expert_report import expert_report
from nmt.files import write_atomically
from nmt.run import RunDirectory


def report(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Keep all that was found, for people and for programs, in the report folder; print the table of each layer."""
    split = "test" if run.text("test")[0] else "dev"
    sources, targets, domains = evaluation_text(options.source, options.reference, split, run)
    translator = Translator.load(run, config)
    layers = expert_report(
        translator.model,
        translator.subwords,
        sources,
        targets,
        domains,
        translator.device,
        config.decoding.precision,
        config.decoding.experts_per_token,
    )
    name = f"{split} set" if options.source is None else Path(options.source).name
    subject = f"{name}, {len(sources):,} sentence pairs" + (f", {len(set(domains))} domains" if domains else "")
    title = run.path.resolve().name
    contents = {
        "json": json.dumps({"split": split, "set": name, "layers": [asdict(layer) for layer in layers]}, indent=2),
        "html": to_html(layers, title, subject),
        "md": to_markdown(layers, title, subject),
    }
    run.report.mkdir(exist_ok=True)
    for ending, content in contents.items():
        write_atomically(run.report / f"experts.{ending}", content.encode())
    print("\n\n".join(str(layer) for layer in layers))
    say(f"{run.report / 'experts.html'} shows what each expert is chosen for (also experts.md and experts.json)")
