"""One optimiser update: what the trainer repeats and the benchmarks time."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import Batch
from nmt.config import Config
from nmt.device import autocast
from nmt.model.gating import GateSums, balance_loss
from nmt.model.seq2seq import Gates, Seq2Seq
from nmt.training.optim import clipped_step

LayerSums = dict[str, GateSums]
"""The sums of each MoE layer over all tokens of an update, without graph."""


class UpdateOutput(NamedTuple):
    """What an update did; sums over its target tokens, as tensors, so that nobody waits for the device."""

    loss: Tensor
    nll: Tensor
    gradient_norm: Tensor
    skipped: Tensor  # 1.0 if the gradient was not finite and nothing was changed
    sums: LayerSums
    gates: Gates  # of the last micro-batch, detached


def seed_everything(seed: int, step: int, micro_batch: int) -> None:
    """Seed PyTorch for one micro-batch: dropout and gate noise are a function of these three numbers alone.

    So they do not depend on what ran before, nor on which device a micro-batch falls to.
    """
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def update(
    model: Seq2Seq,
    optimizer: torch.optim.Adam,
    config: Config,
    micro_batches: list[Batch],
    step: int,
    rate: float,
    device: torch.device,
) -> UpdateOutput:
    """Sum the gradients of the micro-batches, each loss divided by the tokens of all of them, and step at `rate`.

    Balance losses are those of all micro-batches taken as one batch (S17 section 4 sums over the batch, whatever its
    parts). With several micro-batches that needs the sums of all before the first backward pass: a forward pass up to
    the last gate, with the same dropout and noise, finds them.
    """
    training, moe = config.training, config.model.moe
    target_tokens = sum(batch.num_target_tokens for batch in micro_batches)
    joined = _joined_sums(model, config, micro_batches, step, device) if len(micro_batches) > 1 else {}
    loss = nll = torch.zeros((), device=device)
    gates: Gates = {}
    for index, host_batch in enumerate(micro_batches):
        seed_everything(training.seed, step, index)
        with autocast(device, training.precision):
            output = model(host_batch.to(device), training.label_smoothing)
        total = output.loss / target_tokens
        for layer, gate in output.gates.items():
            sums = joined[layer].with_gradient_of(gate.sums) if joined else gate.sums
            total = total + balance_loss(sums, *moe.balance_weights(layer)) + gate.own_loss / len(micro_batches)
        total.backward()
        loss, nll = loss + output.loss.detach(), nll + output.nll.detach()
        # Kept until the next line of metrics: they must not keep the graph alive.
        gates = {layer: gate.detach() for layer, gate in output.gates.items()}
    norm, skipped = clipped_step(optimizer, training.clip_norm, rate)
    optimizer.zero_grad(set_to_none=True)
    return UpdateOutput(loss, nll, norm, skipped, joined or {layer: gate.sums for layer, gate in gates.items()}, gates)


@torch.no_grad()
def _joined_sums(
    model: Seq2Seq, config: Config, micro_batches: list[Batch], step: int, device: torch.device
) -> LayerSums:
    joined: LayerSums = {}
    if not config.model.moe_layers():
        return joined
    for index, host_batch in enumerate(micro_batches):
        seed_everything(config.training.seed, step, index)
        with autocast(device, config.training.precision):
            gates = model.gates(host_batch.to(device))
        for layer, gate in gates.items():
            joined[layer] = joined[layer].plus(gate.sums) if layer in joined else gate.sums
    return joined
