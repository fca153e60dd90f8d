"""What experts, gates and balance losses are worth: runs the studies of docs/results/studies.md by the nmt command.

  python scripts/results/studies.py run                                # all, on one GPU: about a minute per run
  python scripts/results/studies.py run balance gates count optimizer      # the same by name
  python scripts/results/studies.py show                               # tables of what has been run
  python scripts/results/studies.py plot docs/results/experts.svg  # curves of the study `count` (needs .[plots])

All runs are variations of one experiment (--experiment; europarl_en_fr_study_small is for CPUs, six minutes per run
on a core); a run that exists already is not run again. Options that start with a key, such as
corpus.root=/data/europarl, go to every `nmt train`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nmt.compose import compose_config
from nmt.cost.operations import model_cost
from nmt.metrics.record import DevLine, TrainLine, read_lines

BALANCED = ["model.moe.w_importance=0.1", "model.moe.w_load=0.1"]

# Runs by name. `moe_32` is the paper's network with 32 experts and both losses at 0.1.
RUNS: dict[str, list[str]] = {
    "moe_32": BALANCED,
    "balance_none": ["model.moe.w_importance=0", "model.moe.w_load=0"],
    "balance_importance": ["model.moe.w_importance=0.2", "model.moe.w_load=0"],
    "balance_load": ["model.moe.w_importance=0", "model.moe.w_load=0.2"],
    "balance_0.01": ["model.moe.w_importance=0.01", "model.moe.w_load=0.01"],
    "hierarchical_8x4": [*BALANCED, "model.moe.gating=hierarchical", "model.moe.branching=8", "model.moe.k=2"],
    "strictly_balanced": [*BALANCED, "model.moe.gating=strictly_balanced"],
    "softmax_top_k": [*BALANCED, "model.moe.gating=softmax_top_k"],
    "factored": [*BALANCED, "training.expert_optimizer=factored"],
    "none": ["model.moe.num_experts=0"],
    "moe_1_wide": ["model.moe.num_experts=1", "model.moe.k=1"],  # and as wide as four: see `wide`,
    "moe_4": [*BALANCED, "model.moe.num_experts=4"],
    "moe_128": [*BALANCED, "model.moe.num_experts=128"],
}
STUDIES: dict[str, tuple[str, list[str]]] = {
    "balance": (
        "Balance losses, 32 experts (S17 Table 6)",
        ["balance_none", "balance_importance", "balance_load", "moe_32", "balance_0.01"],
    ),
    "gates": (
        "Gates, 32 experts, 4 per token",
        ["moe_32", "hierarchical_8x4", "strictly_balanced", "softmax_top_k"],
    ),
    "count": ("Number of experts, 4 per token", ["none", "moe_1_wide", "moe_4", "moe_32", "moe_128"]),
    "optimizer": ("Optimiser of 32 experts: Adam, and without first moment (S17 appendix D)", ["moe_32", "factored"]),
}


def nmt(*arguments: str) -> str:
    """Run the command; its standard output. Ends the program where it fails."""
    print("nmt", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "nmt.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"nmt {' '.join(arguments)} ended with status {done.returncode}")
    return done.stdout


def train(name: str, runs: Path, overrides: list[str], common: list[str]) -> None:
    """Train run `name` of the study to its end."""
    nmt("train", *common[:1], f"run.directory={runs}", f"run.name={name}", *overrides, *common[1:])


def run_one(name: str, runs: Path, common: list[str]) -> None:
    """Whatever run `name` needs, if it does not exist yet."""
    if (runs / name / "report" / "test.json").exists():
        return
    experiment = common[0].removeprefix("experiment=")
    train(name, runs, RUNS[name] + [wide(experiment)] * (name == "moe_1_wide"), common)
    nmt("evaluate", str(runs / name), "decoding.batch_tokens=8192", "decoding.checkpoint=last")


def wide(experiment: str) -> str:
    """The setting that makes one expert as wide as the four that a token uses (S17 MoE-1-Wide)."""
    moe = compose_config([f"experiment={experiment}"]).model.moe
    return f"model.moe.hidden_sizes=[{moe.k * moe.hidden_sizes[0]}]"


def median(values: list[float]) -> float:
    """The upper median."""
    return sorted(values)[len(values) // 2]


def figures(run: Path) -> dict[str, float]:
    """What a row of a table holds; gate figures are means over the last four lines of training."""
    training, dev = read_lines(run / "metrics.jsonl", TrainLine), read_lines(run / "metrics.jsonl", DevLine)
    test = json.loads((run / "report" / "test.json").read_text())
    row = {
        "dev perplexity": dev[-1].perplexity,
        "BLEU": test["scores"]["BLEU"]["score"],
        "ktokens/s": median([line.tokens_per_second for line in training[2:]]) / 1000,
    }
    for side in ("encoder", "decoder"):
        for name in ("cv_importance", "cv_load", "max_over_mean_load"):
            values = [
                gate[name] for line in training[-4:] for layer, gate in line.gates.items() if layer.startswith(side)
            ]
            row[f"{side} {name}"] = sum(values) / len(values) if values else float("nan")
    return row


def show(runs: Path) -> None:
    """Tables of the studies, in Markdown."""
    for title, names in STUDIES.values():
        rows = {name: figures(runs / name) for name in names if (runs / name / "report" / "test.json").exists()}
        if not rows:
            continue
        columns = list(next(iter(rows.values())))
        print(f"\n{title}\n\n| run | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in rows.items():
            print(f"| {name} | {' | '.join(f'{row[column]:.2f}' for column in columns)} |")


def collect(runs: Path, experiment: str) -> dict[str, Any]:
    """Everything the tables and the plot need, small enough to carry away."""
    done = [path.parent.parent for path in sorted(runs.glob("*/report/test.json"))]
    config = compose_config([f"experiment={experiment}"])
    of_four = model_cost(config.model, config.corpus.subwords.num_pieces).ops_per_timestep
    title = f"Europarl en-fr, {config.corpus.max_pairs:,} pairs, {of_four / 1e6:.1f}M ops/timestep with 32 experts"
    step = f"updates of {config.training.batch_tokens / 1024:.0f}k tokens per side"
    collected = {
        run.name: {
            "figures": figures(run),
            "dev": [line.to_dict() for line in read_lines(run / "metrics.jsonl", DevLine)],
        }
        for run in done
    }
    return {"title": title, "step": step, "runs": collected}


def plot(collected: dict[str, Any], output: Path) -> None:
    """Dev perplexity over updates of the study `count`."""
    import matplotlib.pyplot as plt  # an optional dependency of this one function

    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(7, 4))
    labels = {"none": "no MoE (fewer ops)", "moe_1_wide": "1 expert, 4 x as wide", "moe_4": "4 experts, all active"}
    for name in STUDIES["count"][1]:
        if name in collected["runs"]:
            line = collected["runs"][name]["dev"]
            label = labels.get(name, f"{name.removeprefix('moe_')} experts, 4 active")
            axes.plot([each["step"] for each in line], [each["perplexity"] for each in line], marker="o", label=label)
    axes.set(xlabel=collected["step"], ylabel="dev perplexity", yscale="log")
    axes.set_title(collected["title"], fontsize=10)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "show", "plot"))
    parser.add_argument("what", nargs="*", help="studies or runs; the file to plot to; settings key=value")
    parser.add_argument("--experiment", default="europarl_en_fr_study", help="what all runs are variations of")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder of the runs")
    options = parser.parse_args()
    results = options.runs / "results.json"
    if options.action == "plot":
        plot(json.loads(results.read_text()), Path(options.what[0]))
        return
    if options.action == "run":
        common = [f"experiment={options.experiment}", *(each for each in options.what if "=" in each)]
        wanted = [each for each in options.what if "=" not in each] or list(STUDIES)
        for each in wanted:
            for name in STUDIES[each][1] if each in STUDIES else [each]:
                run_one(name, options.runs, common)
                results.write_text(json.dumps(collect(options.runs, options.experiment), indent=1))
    show(options.runs)


if __name__ == "__main__":
    main()
