"""One optimiser update: what the trainer repeats and the benchmarks time."""

from typing import NamedTuple

import torch
from torch import Tensor

from nmt.batch import Batch
from nmt.config import Config
from nmt.device import autocast
from nmt.model.gating import GateOutput, balance_loss
from nmt.model.seq2seq import Gates, Seq2Seq
from nmt.training.optim import clipped_step


class UpdateOutput(NamedTuple):
    """What an update did; sums over its target tokens, as tensors, so that nobody waits for the device."""

    loss: Tensor
    nll: Tensor
    gradient_norm: Tensor
    skipped: Tensor  # 1.0 if the gradient was not finite and nothing was changed
    gates: list[Gates]  # of each micro-batch, detached


def update(
    model: Seq2Seq,
    optimizer: torch.optim.Adam,
    config: Config,
    micro_batches: list[Batch],
    rate: float,
    device: torch.device,
) -> UpdateOutput:
    """Sum the gradients of the micro-batches, each loss divided by the tokens of all of them, and step at `rate`.

    Balance losses are averaged over the micro-batches, each taken over its own tokens.
    """
    training, moe = config.training, config.model.moe
    target_tokens = sum(batch.num_target_tokens for batch in micro_batches)
    loss = nll = torch.zeros((), device=device)
    gates = []
    for host_batch in micro_batches:
        with autocast(device, training.precision):
            output = model(host_batch.to(device), training.label_smoothing)
        total = output.loss / target_tokens
        for gate in output.gates.values():
            total = total + balance_loss(gate, moe.w_importance, moe.w_load) / len(micro_batches)
        total.backward()
        loss, nll = loss + output.loss.detach(), nll + output.nll.detach()
        # Kept until the next line of metrics: they must not keep the graph alive.
        gates.append({name: GateOutput(*(part.detach() for part in gate)) for name, gate in output.gates.items()})
    norm, skipped = clipped_step(optimizer, training.clip_norm, rate)
    optimizer.zero_grad(set_to_none=True)
    return UpdateOutput(loss, nll, norm, skipped, gates)
