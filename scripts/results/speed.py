"""Write what `make bench-gpu` measured into results/speed.json: python -m scripts.results.speed BENCH.json --commit C

BENCH.json is a file of scripts/bench/gpu.py --json. Its figures replace the rows of the first two tables, which are
training and the MoE layer. Then run `python scripts/results/profile_step.py`, and
`python -m scripts.results.pages`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from scripts.bench.gpu import comparison

RESULTS = Path(__file__).parents[2] / "results" / "speed.json"
LABELS = {
    "GNMT v2, batch 128": "GNMT v2, 128 sentences per batch",
    "GNMT v2, batch 512": "GNMT v2, 512 sentences per batch",
    "no MoE": "the paper's network without experts",
    "MoE-32, one length": "with 32 experts, all sentences of one length",
    "MoE-32": "with 32 experts",
    "MoE-32, 4 micro-batches": "with 32 experts, in four micro-batches",
    "MoE-512": "with 512 experts",
    "MoE-2048": "with 2048 experts, 8.7 billion parameters",
    "S17, parallel": "wmt14_en_de_s17 with parallel wiring",
    "S17, feedback": "wmt14_en_de_s17, which feeds back",
}
"""What the pages call the cases of the benchmark."""

TRAINING = {
    "training": "{training}",
    "tokens/s": "{tokens_per_second:,}",
    "TFLOP/s": "{tflops}",
    "share": "{share:.0%}",
    "ms per update": "{ms:.1f}",
    "GPU idle": "{idle:.1%}",
    "GB": "{gb:.1f}",
    "compared": "{against}",
}
LAYER = {
    "tokens": "{tokens:,}",
    "experts": "{experts:,}",
    "ms": "{ms:.2f}",
    "bound": "{bound:.2f}",
    "over the bound": "{ratio:.2f}",
    "dense pair": "{dense:.2f}",
}
"""Columns of the two tables: titles and cells."""
PICTURE = {"file": "step.svg", "text": "Milliseconds of one training step before and after, by part"}
ABOUT_TRAINING = [
    "Updates have about 32,000 tokens per side, of all lengths unless a row names another choice.",
    "Batches of GNMT v2 are those of NVIDIA's benchmark: 15 to 50 tokens per sentence.",
    "GPU idle is the share of an update in which no kernel runs.",
]
READING = [
    "The picture has a step before and after the work on speed, on one NVIDIA H100. Both have about as many tokens.",
    "Before, all sentences of a step of the paper's network had one length, which is faster. Now a step mixes them.",
]
ABOUT_LAYER = [
    "Forward and backward pass of a layer with d 512, hidden 2048 and k 4, as one CUDA graph.",
    "The times include the whole layer: gate, noise, load estimate, sorting, experts and combination.",
    "`scripts/bench/gpu.py` has the formula of the bound. The last column is a dense pair of layers with the same "
    "operations.",
]

Result = dict[str, Any]


def _columns(cells: dict[str, str]) -> list[dict[str, str]]:
    return [{"title": title, "cell": cell} for title, cell in cells.items()]


def training_rows(bench: Result) -> list[Result]:
    """A row for each network."""
    rows = []
    for name in (name for name in LABELS if name in bench):
        figures = bench[name]
        against = comparison(name, bench, bench["device"])
        for short, label in LABELS.items():
            against = re.sub(f" x {re.escape(short)}$", f" x {label}", against)
        row = {"training": LABELS[name], "tokens_per_second": round(figures["tokens_per_second"], -2)}
        row |= {"tokens_per_second": int(row["tokens_per_second"]), "tflops": round(figures["tflops"])}
        row |= {"share": round(figures["tflops"] / bench["ceilings"]["matmul_tflops"], 3)}
        row |= {"ms": round(figures["ms_per_update"], 1), "idle": round(figures["idle"], 3)}
        row |= {"gb": round(figures["memory_gb"], 1)}
        rows.append(row | ({"against": against} if against else {}))
    return rows


def layer_rows(bench: Result) -> list[Result]:
    """A row for each number of tokens and experts."""
    rows = []
    for name, figures in bench.items():
        if found := re.fullmatch(r"MoE layer, E = (\d+), (\d+) tokens", name):
            row = {"tokens": int(found[2]), "experts": int(found[1]), "ms": round(figures["ms"], 2)}
            row |= {"bound": round(figures["bound_ms"], 2), "ratio": round(figures["ms"] / figures["bound_ms"], 2)}
            rows.append(row | {"dense": round(figures["dense_pair_ms"], 2)})
    return rows


def with_bench(result: Result, bench: Result, commit: str) -> Result:
    """The file of results with these figures."""
    training, layer, *others = result["tables"]
    top = bench["ceilings"]
    card = re.search(r"H\d+", bench["device"])
    torch = bench["torch"].split("+")[0]
    about = (
        "The share is that of the measured ceiling of a bf16 matrix product, "
        f"{top['matmul_tflops']:.0f} TFLOP/s. A copy reaches {top['copy_tbs']:.2f} TB/s."
    )
    return result | {
        "about": [result["about"][0], about],
        "hardware": f"one NVIDIA {card[0] if card else bench['device']}; torch {torch}, bf16",
        "commit": commit,
        "tables": [
            training
            | {"about": ABOUT_TRAINING, "columns": _columns(TRAINING), "rows": training_rows(bench)}
            | {"reading": READING, "picture": PICTURE},
            layer | {"about": ABOUT_LAYER, "columns": _columns(LAYER), "rows": layer_rows(bench), "reading": []},
            *others,
        ],
    }


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    result, bench = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, options.bench))
    text = json.dumps(with_bench(result, bench, options.commit), indent=2, ensure_ascii=False) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
