"""One optimiser step, as the trainer repeats it and the benchmarks time it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nmt.batch import Batch
from nmt.config import Config
from nmt.device import autocast
from nmt.model.gating import GateSums, balance_loss
from nmt.model.names import is_expert
from nmt.model.seq2seq import Gates, LossOutput, Seq2Seq
from nmt.parallel.mesh import World
from nmt.training.optim import clipped_step

LayerSums = dict[str, GateSums]
"""Sums of each MoE layer over all tokens of a step, detached."""


class UpdateOutput(NamedTuple):
    """Figures of one step, as tensors, so that the host does not wait for the device.

    `loss` and `nll` are sums over the target tokens of this process. All others except `gates` are equal in all
    processes.
    """

    loss: Tensor
    nll: Tensor
    gradient_norm: Tensor
    target_tokens: int
    skipped: Tensor  # float32: 1 if the gradient was not finite and nothing changed, else 0
    sums: LayerSums
    gates: Gates  # of this process's last micro-batch, detached


def seed_device(device: torch.device, seed: int, step: int, micro_batch: int) -> None:
    """Seed the device's generator, so that dropout and gate noise depend on these three numbers only.

    They do not depend on what ran before or on which process has the micro-batch. The generators of other devices are
    not seeded: seeding all of them takes a hundred times as long.
    """
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(2, np.uint32)
    own = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    own.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class Updater:
    """Optimiser steps by the processes of a world, each with its share of the micro-batches of a step.

    A micro-batch is one or more batches (bands of sentences with similar lengths) that pass through the network
    together. The gradient of a step is the sum over all micro-batches, with each loss divided by the target tokens of
    the step. No factor depends on the number of processes.

    Balance losses are computed over all micro-batches of a step as one batch (S17 section 4). If a process has several
    micro-batches, this needs the sums of all of them before the first backward pass. An extra forward pass up to the
    last gate, with the same dropout and noise, computes them. If all balance weights are 0, there is no extra pass.
    """

    def __init__(self, model: Seq2Seq, optimizer: torch.optim.Optimizer, config: Config, world: World) -> None:
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world
        layers = config.model.moe_layer_names()
        self.balanced = any(weight for layer in layers for weight in config.model.moe.balance_weights(layer))
        self.experts = [parameter for name, parameter in model.named_parameters() if is_expert(name)]
        self.forward: Callable[..., LossOutput] = model
        self.no_grad_sync: Callable[[], Any] = nullcontext
        if world.size > 1:
            wrapped = _data_parallel(model, config.parallel.overlap, world)
            self.forward, self.no_grad_sync = wrapped, wrapped.no_sync

    def update(self, micro_batches: Sequence[Sequence[Batch]], step: int, rate: float) -> UpdateOutput:
        """Take step number `step` at learning rate `rate`, with this process's micro-batches."""
        target_tokens = self.world.sum_int(sum(batch.num_target_tokens for bands in micro_batches for batch in bands))
        # A tensor, so that no operation depends on the value, and one that is filled without waiting for the device.
        exact = torch.promote_types(self.model.output.weight.dtype, torch.float32)
        divisor = torch.full((), target_tokens, dtype=exact, device=self.world.device)
        micro_batches = [[batch.to(self.world.device) for batch in bands] for bands in micro_batches]
        number = len(micro_batches) * self.world.size
        first_pass = len(micro_batches) > 1 and self.balanced
        joined = self._summed(self._sums_of_gates(micro_batches, step)) if first_pass else {}
        own: LayerSums = {}
        loss = nll = torch.zeros((), device=self.world.device)
        gates: Gates = {}
        forward = partial(self.forward, label_smoothing=self.config.training.label_smoothing)
        for index, bands in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.no_grad_sync():
                output = self._forward(forward, bands, step, index)
                if not first_pass:
                    _add_sums(own, output.gates)
                    joined = self._summed(own) if last else own
                total = output.loss / divisor
                for layer, gate in output.gates.items():
                    total = total + gate.own_loss / number
                    if self.balanced:
                        sums = joined[layer].with_gradient_of(gate.sums)
                        total = total + balance_loss(sums, *self.config.model.moe.balance_weights(layer))
                total.backward()
            loss, nll = loss + output.loss.detach(), nll + output.nll.detach()
            # Detached, as they are kept until the next line of metrics and must not keep the graph alive.
            gates = {layer: gate.detach() for layer, gate in output.gates.items()}
        for parameter in self.experts:
            if parameter.grad is not None:
                self.world.sum_over_replicas(parameter.grad)
        norm, skipped = clipped_step(self.optimizer, self.config.training.clip_norm, rate, self.experts, self.world)
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateOutput(loss, nll, norm, target_tokens, skipped, joined, gates)

    def _forward(self, call: Callable[..., Any], bands: Sequence[Batch], step: int, index: int) -> Any:
        # Micro-batch i of this process is micro-batch rank + i * size of the step.
        number = self.world.rank + index * self.world.size
        seed_device(self.world.device, self.config.training.seed, step, number)
        with autocast(self.world.device, self.config.training.precision):
            return call(*bands)

    @torch.no_grad()
    def _sums_of_gates(self, micro_batches: Sequence[Sequence[Batch]], step: int) -> LayerSums:
        """Return the sums of each layer over this process's micro-batches."""
        sums: LayerSums = {}
        for index, bands in enumerate(micro_batches):
            _add_sums(sums, self._forward(self.model.gates, bands, step, index))
        return sums

    def _summed(self, sums: LayerSums) -> LayerSums:
        """Return the sums over all processes, with one all-reduce."""
        if self.world.size == 1 or not sums:
            return sums
        parts = [part for each in sums.values() for part in each.parts()]
        together = self.world.sum(torch.cat(parts)).split([part.numel() for part in parts])
        place = iter(together)
        return {layer: GateSums(*(next(place).to(part.dtype) for part in each.parts())) for layer, each in sums.items()}


def _add_sums(sums: LayerSums, gates: Gates) -> None:
    for layer, gate in gates.items():
        own = gate.sums.detach()
        sums[layer] = sums[layer].plus(own) if layer in sums else own


def _data_parallel(model: Seq2Seq, overlap: bool, world: World) -> DistributedDataParallel:
    """Return the model wrapped so that gradients of dense parameters, not of experts, are summed over all processes."""
    names = [name for name, _ in model.named_parameters() if is_expert(name)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    wrapped = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        # Without overlap, one bucket has all gradients, so that none is sent before the backward pass is over.
        bucket_cap_mb=25 if overlap else size / 2**20 + 1,
        gradient_as_bucket_view=True,
        # Otherwise the layout of buckets changes after the first step. With three or more processes, this changes the
        # order in which gradients are added, and a run that resumes would differ in the last bit.
        find_unused_parameters=True,
    )
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
