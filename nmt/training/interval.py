"""Sums between two lines of metrics, and the figures computed from them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.config import MoEConfig
from nmt.model.gate_statistics import GateFigures, LayerTally, read_tally
from nmt.model.gating import GateSums
from nmt.model.seq2seq import Gates
from nmt.parallel.mesh import World


class Means(NamedTuple):
    """The first figures of a `TrainLine`, under the same names."""

    loss: float
    nll: float
    perplexity: float
    gradient_norm: float
    skipped_updates: float


class Interval:
    """Sums since the last line of metrics, kept on the device until the line is written."""

    def __init__(self, device: torch.device, moe: MoEConfig) -> None:
        self.moe = moe
        self.sums = torch.zeros(4, device=device, dtype=torch.float64)  # loss, nll, gradient norm, skipped
        self.layers: dict[str, LayerTally] = {}
        self.updates = 0
        self.source_tokens = 0
        self.target_tokens = 0
        self.flops = 0.0

    def add(self, loss: Tensor, nll: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Add one step: summed loss and negative log-likelihood, gradient norm, and 1 if it was skipped, else 0."""
        self.sums += torch.stack([loss, nll, torch.where(skipped > 0, 0.0, norm), skipped]).double()
        self.updates += 1

    def count(self, source_tokens: int, target_tokens: int, flops: float) -> None:
        """Add one batch: tokens without padding, and training FLOPs."""
        self.source_tokens += source_tokens
        self.target_tokens += target_tokens
        self.flops += flops

    def watch(self, sums: dict[str, GateSums], gates: Gates) -> None:
        """Add one step's gates: count the tokens of each expert, and keep the newest gates for their figures."""
        for layer, each in sums.items():
            if layer in self.layers:
                self.layers[layer].add(each, gates[layer])
            else:
                self.layers[layer] = LayerTally(each, gates[layer])

    def read(self, world: World) -> tuple[Means, dict[str, GateFigures]]:
        """Return the means of a line and the figures of each MoE layer. Waits for the device once.

        Sums losses and counts over all processes, in place.
        """
        world.sum(self.sums[:2])
        counted = world.sum(torch.tensor([self.source_tokens, self.target_tokens, self.flops], dtype=torch.float64))
        self.source_tokens, self.target_tokens, self.flops = (int(value) for value in counted)
        parts = [self.sums, *(tally.measure() for tally in self.layers.values())]
        values, *of_layers = torch.cat(parts).cpu().split([part.numel() for part in parts])
        loss, nll, norm, skipped = values.tolist()
        gates = {
            layer: read_tally(layer_values, self.moe.balance_weights(layer), world.group_size)
            for layer, layer_values in zip(self.layers, of_layers, strict=True)
        }
        tokens = max(self.target_tokens, 1)
        means = Means(
            loss=loss / tokens,
            nll=nll / tokens,
            perplexity=math.exp(min(nll / tokens, 50.0)),
            gradient_norm=norm / max(self.updates - skipped, 1),
            skipped_updates=skipped,
        )
        return means, gates
