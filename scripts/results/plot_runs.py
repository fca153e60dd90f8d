"""Lay a curve of several runs over each other: python scripts/results/plot_runs.py RUN RUN .. -o FILE.svg

The upper picture has the curves, the lower one how far each lies from the first, relative to it. Needs matplotlib:
pip install -e '.[plots]'.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from nmt.metrics.record import DevLine, Line, TrainLine, read_lines

KINDS: dict[str, type[Line]] = {"train": TrainLine, "dev": DevLine}


def curve(run: Path, kind: str, figure: str) -> dict[int, float]:
    """The figure at each step that metrics.jsonl has it for."""
    lines = (line.to_dict() for line in read_lines(run / "metrics.jsonl", KINDS[kind]))
    return {line["step"]: line[figure] for line in lines if figure in line}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--kind", default="train", choices=KINDS, help="train (default) or dev")
    parser.add_argument("--figure", default="loss", help="a figure of metrics.jsonl (default: loss)")
    parser.add_argument("--labels", nargs="*", help="names of the curves (default: of the runs)")
    options = parser.parse_args()
    curves = [curve(run, options.kind, options.figure) for run in options.runs]
    labels = options.labels or [run.name for run in options.runs]
    plt.rcParams["svg.fonttype"] = "none"
    picture, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), height_ratios=[3, 2])
    # Wide lines below, narrow ones on top: all stay visible where they agree.
    widths = [2.0 * (len(curves) - place) for place in range(len(curves))]
    for values, label, width in zip(curves, labels, widths, strict=True):
        above.plot(list(values), list(values.values()), label=label, linewidth=width, alpha=0.8)
        shared = [step for step in values if step in curves[0]]
        away = [abs(values[step] / curves[0][step] - 1.0) for step in shared]
        if any(away):
            below.plot(shared, away, label=label, color=above.lines[-1].get_color())
    above.set(ylabel=f"{options.kind} {options.figure}", yscale="log")
    below.set(xlabel="update", ylabel=f"relative difference\nfrom {labels[0]}", yscale="log")
    above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    picture.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
