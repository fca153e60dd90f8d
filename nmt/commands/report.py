"""nmt experts RUN: what the experts do."""

import argparse
import json

from nmt.commands import say
from nmt.commands.evaluate import evaluation_text
from nmt.config import Config
from nmt.decoding.translator import Translator
from nmt.evaluation.expert_report import expert_report
from nmt.files import write_atomically
from nmt.run import RunDirectory


def report(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Print the table of each layer and keep it in the run's report folder."""
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
    )
    print("\n\n".join(str(layer) for layer in layers))
    run.report.mkdir(exist_ok=True)
    content = json.dumps({"split": split, "layers": [layer.to_dict() for layer in layers]}, indent=2)
    write_atomically(run.report / "experts.json", content.encode())
    say(f"the whole table is in {run.report / 'experts.json'}")
