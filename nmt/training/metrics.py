"""Where numbers go during training: metrics.jsonl, TensorBoard, and the terminal."""

import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nmt.model.gating import GateOutput, GateSums, cv_squared
from nmt.model.seq2seq import Gates


@torch.no_grad()
def gate_health(gate: GateOutput, sums: GateSums, interval_count_E: Tensor) -> dict[str, Tensor]:
    """The figures by which a gate is watched, as tensors of one element.

    cv_importance and cv_load (S17 Table 6), max_over_mean_load, the mean entropy of a token's gates in nats, and
    idle_experts: those without any token since the last line of metrics.
    """
    gates_TK = gate.gates_TK.clamp_min(1e-20)
    return {
        "cv_importance": cv_squared(sums.importance_E).sqrt(),
        "cv_load": cv_squared(sums.load()).sqrt(),
        "max_over_mean_load": sums.count_E.max() / sums.count_E.mean().clamp_min(1e-20),
        "gate_entropy": -(gates_TK * gates_TK.log()).sum(1).mean(),
        "idle_experts": (interval_count_E == 0).sum().float(),
    }


class Interval:
    """Sums since the last line of metrics, kept on the device until the line is written."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device, dtype=torch.float64)  # loss, nll, gradient norm, skipped
        self.counts: dict[str, Tensor] = {}
        self.gates: Gates = {}
        self.sums_of_layers: dict[str, GateSums] = {}
        self.updates = 0
        self.source_tokens = 0
        self.target_tokens = 0
        self.flops = 0.0

    def add(self, loss: Tensor, nll: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """One update's summed loss and negative log-likelihood, gradient norm and whether it was skipped."""
        self.sums += torch.stack([loss, nll, torch.where(skipped > 0, 0.0, norm), skipped]).double()
        self.updates += 1

    def count(self, source_tokens: int, target_tokens: int, flops: float) -> None:
        """One micro-batch's real tokens and training FLOPs."""
        self.source_tokens += source_tokens
        self.target_tokens += target_tokens
        self.flops += flops

    def watch(self, sums: dict[str, GateSums], gates: Gates) -> None:
        """Count the tokens of each expert, and keep the newest gates for their figures."""
        self.sums_of_layers, self.gates = sums, gates
        for name, each in sums.items():
            self.counts[name] = self.counts[name] + each.count_E if name in self.counts else each.count_E

    def read(self) -> dict[str, float]:
        """The figures; waits for the device once."""
        names, values = ["loss", "nll", "gradient_norm", "skipped_updates"], [self.sums]
        for layer, gate in self.gates.items():
            health = gate_health(gate, self.sums_of_layers[layer], self.counts[layer])
            names += [f"{layer}.{name}" for name in health]
            values.append(torch.stack(list(health.values())).double())
        figures = dict(zip(names, torch.cat(values).tolist(), strict=True))
        tokens = max(self.target_tokens, 1)
        figures["loss"] /= tokens
        figures["nll"] /= tokens
        figures["gradient_norm"] /= max(self.updates - figures["skipped_updates"], 1)
        figures["perplexity"] = math.exp(min(figures["nll"], 50.0))
        return figures


class MetricsWriter:
    """metrics.jsonl, TensorBoard curves and a progress bar (plain lines where there is no terminal).

    Going on from step n, lines of later steps are dropped first: every step stands there once.
    """

    def __init__(self, path: Path, tensorboard: Path, step: int, max_steps: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1)
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def write(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """One line and one point on each curve."""
        self.file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self.file.flush()
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(step - self.bar.n)

    def say(self, line: str) -> None:
        """A line for the person, on stderr, above the bar if there is one."""
        self.bar.write(line, file=sys.stderr)
        sys.stderr.flush()

    def show(self, text: str, line: str) -> None:
        """Newest figures: beside the bar on a terminal, else as a line."""
        if self.bar.disable:
            self.say(line)
        else:
            self.bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.file.close()
        self.tensorboard.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash goes too
