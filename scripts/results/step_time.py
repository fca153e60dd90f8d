"""Fit the constants of the time model (nmt/cost/cards.py) to measured steps: python -m scripts.results.step_time

The steps are the rows of the first table of results/step_time.json: `ms` was measured on `gpus` cards of a kind at a
`commit`. A row has the `settings`, `vocabulary`, `micro_batches` per GPU and mean micro-batch (`batch`) of a training
step, or the `experts`, perhaps `groups`, and `tokens` of one MoE layer, forward and backward. `parts` are milliseconds
of parts of the step, by the beginning of their names in nmt/cost/step.py. With a `part`, `ms` is of that part only.
`rows_per_token` are the rows that a step sent to experts, if they are not as many as now.

With files of scripts/bench/gpu.py --json and scripts/bench/step.py, measured at one commit on one card, their steps
replace all whole steps:

  python -m scripts.results.step_time --card h100 --commit COMMIT SPEED.json STEPS.json

It writes the constants, what they predict for each row, and the table of growing numbers of experts. Then run
`python -m scripts.results.pages`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nmt.compose import compose_config
from nmt.config import Config, MoEConfig
from nmt.cost.activations import Precision
from nmt.cost.budget import SentenceLengths, training_budget
from nmt.cost.cards import CARDS, Rates, link_of
from nmt.cost.step import SPENT_ON, Machines, MicroBatch, bound_of, moe_parts, places, predict_step, step_parts
from nmt.wording import scaled

ROOT = Path(__file__).parents[2]
RESULTS, CONSTANTS = ROOT / "results" / "step_time.json", ROOT / "nmt" / "cost" / "cards.py"
_BF16 = Precision(on_gpu=True, size=2)
# What single kernels reached on an H100. Constants that no step depends on stay so.
START = Rates(
    products=0.75,
    recurrent=0.3,
    softmax=0.5,
    experts=0.7,
    weights=1.0,
    memory=0.85,
    passes=1.5,
    position_us=8.0,
    launch_ms=0.5,
    message_us=2.0,
)
# Weight of a constant's change from there, against the error of one step.
_INERTIA = 0.1
# Shares of what a card reaches.
_SHARES = ("products", "recurrent", "softmax", "experts", "weights", "memory")

Row = dict[str, Any]


@cache
def _composed(*settings: str) -> Config:
    return compose_config(settings)


def predicted_parts(row: Row, rates: Rates) -> dict[str, float]:
    """Return the milliseconds of each part that the model predicts for a row of measurements."""
    machines = Machines(CARDS[row["card"]], rates, row["gpus"])
    if "experts" in row:
        moe = MoEConfig(row["experts"], k=4)
        if "groups" in row:
            moe = MoEConfig(row["experts"], k=2, gating="hierarchical", branching=row["groups"])
        parts = list(moe_parts(512, moe, row["experts"], row["tokens"], machines))
    else:
        number = row["micro_batches"] * row["gpus"]
        config = _composed(*row["settings"], f"training.micro_batches={number}")
        group = row["gpus"] if config.model.moe_layer_names() else 1
        machines = machines._replace(group=group, link_gbs=CARDS[row["card"]].link_gbs)
        parts = step_parts(config, row["vocabulary"], MicroBatch(*row["batch"]), _BF16, machines)
    ms = {part.name: part.ms for part in parts}
    if "rows_per_token" in row:
        moe, tokens = config.model.moe, row["batch"][0]
        now = places(moe, moe.num_experts, row["gpus"], tokens) * row["gpus"] / tokens
        ms["exchange of rows"] *= row["rows_per_token"] / now
    return ms


def predicted_ms(row: Row, rates: Rates) -> float:
    """Return the milliseconds that the model predicts for a row of measurements."""
    return _sum(predicted_parts(row, rates), row.get("part", ""))


def _sum(parts: dict[str, float], begin: str) -> float:
    return sum(ms for name, ms in parts.items() if name.startswith(begin))


def fitted(rows: Sequence[Row], start: Rates = START) -> Rates:
    """Return the rates that minimise the squares of the relative errors.

    Those are the logarithms of predicted over measured times, and for each part that was measured, its error over the
    time of the step. The method is Levenberg's and Marquardt's in the logarithms of the rates, which therefore stay
    above 0. Shares stay at most 1.
    """
    first = np.log(np.array(start))

    def rates_of(logs: np.ndarray) -> Rates:
        rates = Rates(*np.exp(logs).tolist())
        return rates._replace(**{name: min(getattr(rates, name), 1.0) for name in _SHARES})

    def errors(logs: np.ndarray) -> np.ndarray:
        found = list(_INERTIA * (logs - first))
        for row in rows:
            parts = predicted_parts(row, rates_of(logs))
            found.append(np.log(_sum(parts, row.get("part", "")) / row["ms"]))
            found += [(_sum(parts, part) - ms) / row["ms"] for part, ms in row.get("parts", {}).items()]
        return np.array(found)

    logs, damping, step = first, 1.0, 1e-4
    now = errors(logs)
    for _ in range(40):
        slopes = np.stack([(errors(logs + step * unit) - now) / step for unit in np.eye(len(logs))], axis=1)
        change = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), -slopes.T @ now)
        then = errors(logs + change)
        better = then @ then < now @ now
        logs, now, damping = (logs + change, then, damping / 3) if better else (logs, now, damping * 4)
    return Rates(*(float(f"{rate:.3g}") for rate in rates_of(logs)))


# ------------------------------------------------------------------------------------------------- measurements

_PARTS = {"LSTM": "LSTMs", "attention": "attention", "softmax": "softmax", "optimiser": "optimiser"}
_PARTS |= {"gate": "gates", "experts": "experts"}
"""Parts of scripts/bench/step.py, and the beginning of their names here. The others have none."""


def measured_rows(speeds: Row, steps: Row, card: str, commit: str) -> list[Row]:
    """Return the rows that scripts/bench/gpu.py and scripts/bench/step.py measured."""
    # Needs a GPU build only to measure.
    from scripts.bench.gpu import CASES, prepare

    rows = []
    for name, figures in speeds.items():
        row = {"step": name, "card": card, "gpus": 1, "commit": commit}
        if name in CASES:
            _, vocabulary, updates, shape = prepare(CASES[name])
            # Batches are padded to the positions of the longest.
            positions = len(shape.source), len(shape.target)
            batches = [batch for update in updates for batch in update]
            sizes = [(b.num_source_tokens, b.num_target_tokens, b.num_sentences, *positions) for b in batches]
            row |= {"settings": CASES[name].settings, "vocabulary": vocabulary, "micro_batches": len(updates[0])}
            row |= {"batch": np.mean(sizes, axis=0).round(1).tolist(), "ms": round(figures["ms_per_update"], 3)}
            if name in steps:
                row["parts"] = {_PARTS[part]: ms for part, ms in steps[name]["parts"].items() if part in _PARTS}
            rows.append(row)
        elif layer := re.fullmatch(r"MoE layer, E = (\d+), (\d+) tokens", name):
            row |= {"experts": int(layer[1]), "tokens": int(layer[2]), "ms": round(figures["ms"], 3)}
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- the tables

GROWTH = ((4, 1), (32, 1), (512, 1), (2048, 1), (2048, 8), (16384, 64), (131072, 1024))
"""Experts per layer, and GPUs."""
_COUNTS = ((1e9, "billion"), (1e6, "million"))


def growing(rates: Rates) -> list[Row]:
    """Return the rows of the table of growing numbers of experts, on H100 cards."""
    rows, card = [], CARDS["h100"]
    for count, gpus in GROWTH:
        config = grown(count, gpus)
        vocabulary = config.corpus.subwords.num_pieces
        budget = training_budget(config, vocabulary, SentenceLengths(), gpus, on_gpu=True)
        step = predict_step(config, vocabulary, budget, card, link_of(card, gpus), rates)
        row = {"experts": count, "gpus": gpus, "parameters": scaled(budget.cost.num_parameters, _COUNTS)}
        row |= {"gb": round(budget.memory_bytes / 1e9, 1), "ms": round(step.seconds * 1e3, 1)}
        row["network"] = round(sum(part.ms for part in step.parts if part.bound == "network") / row["ms"], 3)
        row["spent_on"] = SPENT_ON[bound_of(step.parts)]
        rows.append(row | {"tokens_per_second_per_gpu": round(step.tokens_per_second / gpus)})
    return rows


def grown(count: int, gpus: int) -> Config:
    """Return the settings of one row of that table: gates of two levels from 2048 experts on."""
    settings = [f"model.moe.num_experts={count}", "training.batch_tokens=32768", "training.expert_weights=bfloat16"]
    if count < 2048:
        settings += ["model.moe.gating=noisy_top_k", "model.moe.branching=0", "model.moe.k=4"]
    else:
        settings += [f"model.moe.branching={max(64, gpus)}"]
    settings += [f"training.micro_batches={gpus}"]
    return _composed("experiment=wmt14_en_fr_moe_2048", *settings)


def with_rates(text: str, rates: Rates) -> str:
    """Return the text of cards.py with these constants."""
    for name, value in rates._asdict().items():
        text, count = re.subn(rf"(?m)^    {name}: float = .+$", f"    {name}: float = {value!r}", text)
        assert count == 1, name
    return text


def with_predictions(result: Row, rates: Rates) -> Row:
    """Return the file of results with what these constants predict."""
    measured, growth = result["tables"]
    rows = [row | {"predicted_ms": round(predicted_ms(row, rates), 3)} for row in measured["rows"]]
    for row in rows:
        row["difference"] = round(row["predicted_ms"] / row["ms"] - 1.0, 3)
    return result | {"tables": [measured | {"rows": rows}, growth | {"rows": growing(rates)}]}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", nargs="*", type=Path, help="the file of gpu.py, then that of step.py")
    parser.add_argument("--card", choices=tuple(CARDS), default="h100")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = result["tables"][0]["rows"]
    if options.measured:
        speeds, steps = (json.loads(path.read_text(encoding="utf-8")) for path in options.measured)
        of_parts = [row for row in rows if "part" in row]
        rows[:] = [*measured_rows(speeds, steps["steps"], options.card, options.commit), *of_parts]
    rates = fitted(rows)
    result = with_predictions(result, rates)
    for row in result["tables"][0]["rows"]:
        print(
            f"{row['step']:<44}{row['card']:>6}{row['ms']:>10.2f}{row['predicted_ms']:>10.2f}{row['difference']:>8.1%}"
        )
        parts = predicted_parts(row, rates)
        for part, ms in row.get("parts", {}).items():
            print(f"    {part:<46}{ms:>10.2f}{_sum(parts, part):>10.2f}")
    print(rates)
    CONSTANTS.write_text(with_rates(CONSTANTS.read_text(encoding="utf-8"), rates), encoding="utf-8")
    RESULTS.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
