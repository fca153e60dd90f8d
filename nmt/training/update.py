"""One optimiser step, as the trainer repeats it and the benchmarks time it."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmt.batch import Batch
from nmt.config import Config
from nmt.device import autocast
from nmt.model.gating import GateSums, balance_loss
from nmt.model.names import is_expert
from nmt.model.one_pass import Gates
from nmt.model.seq2seq import LossOutput, Seq2Seq
from nmt.model.side_by_side import Later
from nmt.parallel.expert_parallel import fixed_sizes
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.training.freezing import Frozen
from nmt.training.optim import ClippedStep, clipped_step, set_rate
from nmt.training.recording import LayerSums, Learned, Recording, Steps, can_record


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
    gates: Gates  # of this process's last micro-batch, detached; the next step may overwrite them


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

    The gradient of a step is the sum over all micro-batches, with each loss divided by the target tokens of the step.
    No factor depends on the number of processes.

    Balance losses are computed over all micro-batches of a step as one batch (S17 section 4). If a process has several
    micro-batches, this needs the sums of all of them before the first backward pass. An extra forward pass up to the
    last gate, with the same dropout and noise, computes them. If all balance weights are 0, there is no extra pass.

    Biases of gates (`model.moe.bias_rate`) move by the counts of the same sums, after the optimiser's step.

    Fitted batches (`nmt.batch.fit`) on GPUs run as a recording: the first step with a shape is captured in CUDA
    graphs, and later steps replay them. They compute the same as a step that is not recorded. Several processes record
    their exchanges in fixed sizes (`FixedSizes`), and sum the gradients of dense parameters after the backward pass.
    """

    def __init__(
        self,
        model: Seq2Seq,
        optimizer: torch.optim.Optimizer,
        config: Config,
        world: World,
        frozen: Frozen | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world
        self.frozen = frozen
        layers = config.model.moe_layer_names()
        self.balanced = any(weight for layer in layers for weight in config.model.moe.balance_weights(layer))
        biased = config.model.moe.bias_rate > 0.0 and "gates" not in config.training.freeze
        self.biased = {layer: moe.gate for layer, moe in model.moe_layers().items() if biased}
        self.experts = [parameter for name, parameter in model.named_parameters() if is_expert(name)]
        exact = torch.promote_types(model.output.weight.dtype, torch.float32)
        self.target_tokens = torch.ones((), dtype=exact, device=world.device)
        self.number = 1
        self.recording: Recording | None = None
        recorded = can_record(config, world)
        self.sizes = FixedSizes(config.model.moe, world.device) if recorded and world.group_size > 1 else None
        self.forward: Callable[..., LossOutput] = model
        self.no_grad_sync: Callable[[], Any] = nullcontext
        self.summed: list[nn.Parameter] = []
        """Dense parameters whose gradients are summed after the backward pass; others are summed in it."""
        dense = [parameter for name, parameter in model.named_parameters() if not is_expert(name)]
        if world.size > 1 and recorded:
            self.summed = dense
        elif world.size > 1 and any(parameter.requires_grad for parameter in dense):
            wrapped = _data_parallel(model, config.parallel.overlap, world)
            self.forward, self.no_grad_sync = wrapped, wrapped.no_sync

    def update(self, micro_batches: Sequence[Batch], step: int, rate: float) -> UpdateOutput:
        """Take step number `step` at learning rate `rate`, with this process's micro-batches, which are on the host."""
        target_tokens = self.world.sum_int(sum(batch.num_target_tokens for batch in micro_batches))
        # A tensor, so that no operation depends on the value, and one that is filled without waiting for the device.
        self.target_tokens.fill_(target_tokens)
        self.number = len(micro_batches) * self.world.size
        set_rate(self.optimizer, rate)
        if not can_record(self.config, self.world) or any(batch.source.real_N is None for batch in micro_batches):
            done = self._update(self, [batch.to(self.world.device) for batch in micro_batches], step, target_tokens)
        else:
            done = self._replay(micro_batches, step, target_tokens)
        self._move_biases(done.sums, done.skipped)
        return done

    def release(self) -> None:
        """Forget the recording. NCCL disconnects no process while there is one."""
        self.recording = None
        gc.collect()  # a recording and what it records refer to each other

    def _replay(self, micro_batches: Sequence[Batch], step: int, target_tokens: int) -> UpdateOutput:
        """Take a step by replaying recordings, which are made first if there are none of this shape."""
        while True:
            with fixed_sizes(self.model, self.sizes):
                if self.recording is None or not self.recording.serves(micro_batches):
                    self.release()  # frees its memory
                    self.recording = Recording(self, list(self.model.parameters()), micro_batches)
                    if self.sizes:
                        self.sizes.exceeded.zero_()  # the warm-up of the recording is no step
                done = self._update(self.recording, micro_batches, step, target_tokens)
            if self.sizes is None or not self.sizes.take_exceeded(self.world):
                return done
            # The gradients were NaN, so that the step changed nothing. Do it again, with more room.
            self.sizes.enlarge()
            self.release()

    def _update(self, steps: Steps, micro_batches: Sequence[Batch], step: int, target_tokens: int) -> UpdateOutput:
        first_pass = len(micro_batches) > 1 and self.balanced
        joined: LayerSums | None = None
        if first_pass:
            own: LayerSums = {}
            for index, batch in enumerate(micro_batches):
                self._seed(step, index)
                own = _added(own, steps.gate_sums(batch))
            joined = self._summed(own)
        own = {}
        loss = nll = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            self._seed(step, index)
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.no_grad_sync():
                learned = steps.learn(batch, joined, index > 0)
            loss, nll = loss + learned.loss, nll + learned.nll
            own = _added(own, learned.sums)
        if joined is None:
            # With one micro-batch and balance losses, these are sums over all processes already.
            joined = own if len(micro_batches) == 1 and self.balanced else self._summed(own)
        norm, skipped = steps.finish()
        return UpdateOutput(loss, nll, norm, target_tokens, skipped, joined, learned.gates)

    @torch.no_grad()
    def gate_sums(self, batch: Batch) -> LayerSums:
        """Return the sums of each layer over a micro-batch."""
        with autocast(self.world.device, self.config.training.precision):
            return _detached_sums(self.model.gates(batch, r_drop=self.config.training.r_drop))

    def learn(self, batch: Batch, joined: LayerSums | None, _more: bool = False) -> Learned:
        """Add the gradient of a micro-batch to the parameters' gradients.

        `joined` has the sums of each layer over all micro-batches of the step; None: this is the only one.
        """
        output = self._forward(batch)
        own = _detached_sums(output.gates)
        if joined is None and self.balanced:
            joined = own = self._summed(own)
        total = output.loss / self.target_tokens
        for layer, gate in output.gates.items():
            total = total + gate.own_loss / self.number
            if self.balanced and joined is not None:
                sums = joined[layer].with_gradient_of(gate.sums)
                total = total + balance_loss(sums, *self.config.model.moe.balance_weights(layer))
        total.backward()
        Later.forget()
        # Detached, as they are kept until the next line of metrics and must not keep the graph alive.
        gates = {layer: gate.detach() for layer, gate in output.gates.items()}
        return Learned(output.loss.detach(), output.nll.detach(), own, gates)

    def finish(self) -> ClippedStep:
        """Take the optimiser's step with the gradients of all micro-batches, and forget them."""
        for parameter in self.experts:
            if parameter.grad is not None:
                self.world.sum_over_replicas(parameter.grad)
        self._sum_dense()
        if self.frozen:
            self.frozen.clear_gradients()
        done = clipped_step(self.optimizer, self.config.training.clip_norm, None, self.experts, self.world)
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def _sum_dense(self) -> None:
        """Sum the gradients that the backward pass has not summed over all processes, in one message per type."""
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.summed:
            if parameter.grad is not None:
                of_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in of_type.values():
            together = self.world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = together.split([gradient.numel() for gradient in gradients])
            views = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, views)

    def _move_biases(self, sums: LayerSums, skipped: Tensor) -> None:
        """Move the biases of all gates by the counts of the whole step, unless the step was skipped.

        This comes after a recorded step, not in it, but the recordings read the biases where they are changed.
        """
        for layer, gate in self.biased.items():
            gate.move_biases(sums[layer], self.config.model.moe.bias_rate * (1.0 - skipped))

    def _forward(self, batch: Batch) -> LossOutput:
        with autocast(self.world.device, self.config.training.precision):
            training = self.config.training
            return self.forward(
                batch,
                label_smoothing=training.label_smoothing,
                r_drop=training.r_drop,
                teacher_weight=training.teacher_weight,
            )

    def _seed(self, step: int, index: int) -> None:
        # Micro-batch i of this process is micro-batch rank + i * size of the step.
        number = self.world.rank + index * self.world.size
        seed_device(self.world.device, self.config.training.seed, step, number)

    def _summed(self, sums: LayerSums) -> LayerSums:
        """Return the sums over all processes, with one all-reduce."""
        if self.world.size == 1 or not sums:
            return sums
        parts = [part for each in sums.values() for part in each.parts()]
        together = self.world.sum(torch.cat(parts)).split([part.numel() for part in parts])
        place = iter(together)
        return {layer: GateSums(*(next(place).to(part.dtype) for part in each.parts())) for layer, each in sums.items()}


def _detached_sums(gates: Gates) -> LayerSums:
    return {layer: gate.sums.detach() for layer, gate in gates.items()}


def _added(sums: LayerSums, more: LayerSums) -> LayerSums:
    return {layer: sums[layer].plus(each) if layer in sums else each for layer, each in more.items()}


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
