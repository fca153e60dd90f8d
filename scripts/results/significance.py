"""Test whether runs of the queue differ on their test sets, with the translations that run_queue.py left behind.

  python scripts/results/significance.py claim.seed_1.moe_4:claim.seed_1.moe_32 -o results/claim/moe_32_over_moe_4.json

For each pair BASELINE:SYSTEM and set, the file has the scores of both, their difference with its 95 % interval, and
the p-value of sacreBLEU's paired bootstrap. Results of other pairs stay in the file, as runs may come one by one.
A run that has a record must have the BLEU of its record: a later `nmt evaluate` may have replaced its translations.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nmt.errors import DataError, UserError, exit_status
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, SEED, SystemScores
from nmt.evaluation.sets import evaluation_set, read_lines
from nmt.evaluation.tokenizers import bleu_tokenizer
from nmt.files import read_json, write_atomically
from nmt.run import RunDirectory

SETS = ("test", "newstest2014", "newstest2012", "newsdiscusstest2015")


def translations(run: RunDirectory, name: str, texts: Path) -> tuple[list[str], list[str]]:
    """The run's translations of a set, and the references. DataError if one is missing."""
    sides = run.config().corpus.sides
    source, reference = (str(texts / f"{name}.{language}.gz") for language in sides)
    own = name == "test"
    text = evaluation_set(None if own else source, () if own else (reference,), "test", run)
    return read_lines(str(run.report / f"{text.name}.hypotheses"))[0], text.references[0]


def compared(baseline: RunDirectory, system: RunDirectory, name: str, texts: Path) -> dict[str, Any]:
    """Both scores and the difference of a set, by metric. DataError if the runs have other references."""
    (first, references), (second, others) = (translations(run, name, texts) for run in (baseline, system))
    if references != others:
        raise DataError(f"{baseline.path} and {system.path} have different texts of {name}: compare runs of one corpus")
    tokenizer = bleu_tokenizer("auto", system.config().corpus.sides.target).name
    scores = SystemScores([first, second], [references], tokenizer, False)
    found: dict[str, Any] = {"set": name, "sentences": len(references)}
    for metric, tested in scores.tested().items():
        before, after = scores.scores(metric)
        low, high = scores.intervals(metric, range(len(references)))[1]
        found[metric] = {
            "baseline": round(before, 3),
            "system": round(after, 3),
            "difference": round(after - before, 3),
            "interval": [round(low, 3), round(high, 3)],
            "p": tested[1].bootstrap,
        }
    return found | {"signatures": scores.signatures()}


def check_record(run: str, name: str, bleu: float, records: Path) -> None:
    """DataError if a run's translations of a set are not those that its record was made of."""
    path = records / f"{run}.json"
    if path.is_file():
        recorded = read_json(path, {"scores": {str: object}})["scores"].get(name, {}).get("BLEU", bleu)
        if abs(bleu - recorded) > 0.002:
            what = f"{run}: its translations of {name} have {bleu:.3f} BLEU, but {path} has {recorded:.3f}"
            raise DataError(f"{what}: translate the set again with the settings of the record")


def before(output: Path) -> dict[str, Any]:
    """What is in a file already. UserError if it is no file of comparisons."""
    if not output.exists():
        return {"pairs": {}}
    try:
        return read_json(output, {"pairs": {str: object}})
    except (OSError, ValueError) as error:
        raise UserError(f"{output} is no file of comparisons ({error}): write to another file") from error


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="BASELINE:SYSTEM", help="names of runs in --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/queue"), help="folder of the runs")
    parser.add_argument("--texts", type=Path, default=Path("data/news"), help="folder of test sets")
    parser.add_argument("--records", type=Path, default=Path("results/runs"), help="folder of their records")
    parser.add_argument("--sets", nargs="+", default=SETS, help=f"(default {' '.join(SETS)})")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    output: Path = options.output
    try:
        record = before(output) | {"bootstrap": BOOTSTRAP_SAMPLES, "seed": SEED}
        for pair in options.pairs:
            names = pair.split(":")
            if len(names) != 2:
                raise UserError(f"{pair} is not BASELINE:SYSTEM")
            runs = [RunDirectory.existing(str(options.runs / name)) for name in names]
            record["pairs"][pair] = [compared(*runs, name, options.texts) for name in options.sets]
            for found in record["pairs"][pair]:
                for name, side in zip(names, ("baseline", "system"), strict=True):
                    check_record(name, found["set"], found["BLEU"][side], options.records)
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, (json.dumps(record, indent=1) + "\n").encode())
    except (UserError, OSError) as error:
        print(f"significance: {error}", file=sys.stderr)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
