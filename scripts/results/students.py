"""Compare a teacher, a student and the same student without a teacher: one JSON file.

    python -m scripts.results.students --teacher runs/demo --student runs/student --plain runs/plain --json OUT.json

A teacher of several runs is `--teacher runs/demo,runs/demo-2`. For each system: parameters and operations per token,
the size of its exports, perplexity of the references, and BLEU, chrF2 and sentences per second with beams 4 and 1.

Speed is that of the first sentences of the set on one CPU core, text to text. The systems take turns, and a figure is
the median over the turns, because other work on the machine comes and goes. Scores are computed in `decoding.precision`
of the run, on a GPU if there is one.

int8 is a choice made when a model is read (`decoding.quantize`), not a form of export. So it has a speed, but no size
of its own: it is read from either export.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# As the command line has it, and before PyTorch is loaded: see nmt/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from nmt.cli import main as nmt
from nmt.config import Config
from nmt.cost.operations import model_cost
from nmt.decoding.translator import Translator
from nmt.evaluation.measure import measure, timed
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.sets import EvaluationSet, evaluation_set
from nmt.evaluation.tokenizers import bleu_tokenizer
from nmt.run import RunDirectory

BEAMS = (4, 1)
FORMS = {"fp32": ["decoding.precision=fp32"], "int8": ["decoding.quantize=int8", "decoding.precision=auto"]}
"""Settings of the timed searches by name."""

Row = dict[str, Any]


def config_of(system: str, *changes: str) -> tuple[RunDirectory, Config]:
    """Return the first run of a system, with the settings that let the others translate with it."""
    name, *others = system.split(",")
    run = RunDirectory.existing(name)
    return run, run.config([f"decoding.ensemble=[{','.join(others)}]", *changes])


def scores(system: str, text: EvaluationSet) -> Row:
    """Return perplexity, and BLEU and chrF2 by beam."""
    run, config = config_of(system)
    translator = Translator.load(run, config)
    tokenizer = bleu_tokenizer(config.evaluation.tokenize, config.corpus.target_language).name
    row: Row = {"device": translator.device.type}
    for beam in BEAMS:
        options = replace(translator.options, beam_size=beam)
        found = measure(
            translator,
            text,
            lambda hypotheses, references: corpus_scores(hypotheses, references, tokenizer),
            config,
            options,
        )
        row["perplexity"] = round(found.perplexity.pieces, 4)
        row[f"beam_{beam}"] = {score.name: round(score.value, 2) for score in found.scores}
    return row


def size(system: str) -> Row:
    """Return counts of the model, and megabytes of its exports; an ensemble is the sum of its members."""
    row: Row = {"parameters": 0, "ops_per_token": 0, "export_mb": 0.0, "export_bf16_mb": 0.0}
    for name in system.split(","):
        run = RunDirectory.existing(name)
        cost = model_cost(run.config().model, run.corpus_info()["vocabulary_size"])
        row["parameters"] += cost.num_parameters
        row["ops_per_token"] += cost.ops_per_timestep
        if run.exported:
            raise SystemExit(f"{name} is an exported model: give the run, whose exports are measured")
        for key, options in (("export_mb", []), ("export_bf16_mb", ["--bf16"])):
            with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                if nmt(["export", name, f"{folder}/export", *options]) != 0:
                    raise SystemExit(f"{name} cannot be exported")
                files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
            row[key] = round(row[key] + sum(files) / 1e6, 3)
    return row


def speeds(systems: dict[str, str], sources: list[str], turns: int) -> dict[str, Row]:
    """Return sentences per second on one CPU core, by system and by form and beam."""
    torch.set_num_threads(1)
    works = {}
    for name, system in systems.items():
        for form, settings in FORMS.items():
            run, config = config_of(system, *settings, "decoding.device=cpu")
            translator = Translator.load(run, config)
            for beam in BEAMS:
                works[name, f"{form}_beam_{beam}"] = translator, replace(translator.options, beam_size=beam)
    seconds: dict[tuple[str, str], list[float]] = {work: [] for work in works}
    for turn in range(turns + 1):
        for work, (translator, options) in works.items():
            _, taken = timed(translator, sources, options)
            if turn:  # the first one warms up
                seconds[work].append(taken)
    found: dict[str, Row] = {name: {} for name in systems}
    for (name, what), taken in seconds.items():
        found[name][what] = round(len(sources) / statistics.median(taken), 1)
    return found


def kept_share(rows: dict[str, Row], beam: int, metric: str) -> float | None:
    """Return the share of the gap between the plain student and the teacher that the student closes; None: no gap."""
    teacher, student, plain = (rows[name][f"beam_{beam}"][metric] for name in ("teacher", "student", "plain"))
    return round((student - plain) / (teacher - plain), 3) if teacher != plain else None


def main(arguments: list[str] | None = None) -> int:
    """Measure all systems, and print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "plain"):
        parser.add_argument(f"--{name}", required=True, metavar="RUN")
    parser.add_argument("--source", help="text to translate (default: the test set of the student)")
    parser.add_argument("--reference", action="append", default=[], help="its translations")
    parser.add_argument("--sentences", type=int, default=200, help="sentences to time (default: 200)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args(arguments)
    systems = {name: getattr(asked, name) for name in ("teacher", "student", "plain")}
    text = evaluation_set(asked.source, asked.reference, "test", RunDirectory.existing(asked.student))
    rows = {name: {"run": system, **size(system), **scores(system, text)} for name, system in systems.items()}
    threads = torch.get_num_threads()
    for name, row in speeds(systems, text.sources[: asked.sentences], asked.turns).items():
        rows[name]["sentences_per_second"] = row
    torch.set_num_threads(threads)
    closed = {
        f"beam_{beam}": {metric: kept_share(rows, beam, metric) for metric in rows["teacher"][f"beam_{beam}"]}
        for beam in BEAMS
    }
    result = {"set": text.to_dict(), "sentences": text.size, "systems": rows, "share_of_the_gap_closed": closed}
    content = json.dumps(result, indent=2, ensure_ascii=False)
    asked.json.write_text(content + "\n", encoding="utf-8")
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
