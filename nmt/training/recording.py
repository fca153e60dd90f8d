"""Record the work of a step in CUDA graphs, and replay it.

Launching the thousands of kernels of a step one by one takes the host longer than a GPU needs to run them. A CUDA graph
launches them all at once. It fixes the shapes and addresses of all tensors, so that batches are copied into one fixed
batch, and all numbers that change from step to step are tensors.

Four pieces of work are recorded for a shape: the sums of a micro-batch's gates, its gradient (one recording for the
first micro-batch of a step, one for those that add to it), and the optimiser's step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nmt.batch import Batch
from nmt.config import Config
from nmt.device import product_dtype
from nmt.model.gating import GateSums
from nmt.model.graph import Graph
from nmt.model.one_pass import Gates
from nmt.parallel.mesh import World
from nmt.training.optim import ClippedStep

LayerSums = dict[str, GateSums]
"""Sums of each MoE layer over tokens, detached."""


class Learned(NamedTuple):
    """Results of a micro-batch, detached: summed losses, sums of its gates, and the gates."""

    loss: Tensor
    nll: Tensor
    sums: LayerSums
    gates: Gates


class Steps(Protocol):
    """The pieces of work of a step, as `nmt.training.update.Updater` does them."""

    def gate_sums(self, batch: Batch) -> LayerSums:
        """Return the sums of each layer over a micro-batch."""

    def learn(self, batch: Batch, joined: LayerSums | None, more: bool = False) -> Learned:
        """Add the gradient of a micro-batch to the gradients; `more`: there are gradients of this step already."""

    def finish(self) -> ClippedStep:
        """Take the optimiser's step."""


def can_record(config: Config, world: World) -> bool:
    """Return whether steps can be recorded: on GPUs, in bf16, by gates with the same number of experts per token.

    Strictly balanced gates wait for the host, and so do exchanges in halves. Recordings in float32 were not tested.
    """
    in_bf16 = product_dtype(world.device, config.training.precision) == torch.bfloat16
    waits = config.model.moe.k_is_average or (world.group_size > 1 and config.parallel.overlap_exchange)
    return world.device.type == "cuda" and in_bf16 and not waits


class Recording:
    """`Steps` for fitted batches of one shape, which replay recordings of the steps of `live`."""

    def __init__(self, live: Steps, parameters: Sequence[Tensor], micro_batches: Sequence[Batch]) -> None:
        self.live, self.parameters = live, parameters
        self.shape, self.count = micro_batches[0].shape, len(micro_batches)
        device = parameters[0].device
        self.batch = micro_batches[0].to(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.gates: Graph[LayerSums] | None = None
        self.joined: LayerSums | None = None
        self.gradients: list[Tensor | None] = []
        """Gradients of the parameters, which all recordings share."""
        self.learning: dict[bool, Graph[Learned]] = {}
        self.step: Graph[ClippedStep] | None = None
        # With R-Drop, the gradients of a weight in the two passes come from different streams (`Later`). The engine
        # waits for both, and needs not warn of it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self._warm_up(device)

    def _warm_up(self, device: torch.device) -> None:
        """Do all the work once without recording it: this compiles kernels and lets libraries allocate memory."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.live.gate_sums(self.batch)
            self.live.learn(self.batch, None)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    # The optimiser changes nothing if the gradient is not finite.
                    parameter.grad.fill_(torch.nan)
            self.live.finish()
        torch.cuda.current_stream(device).wait_stream(side)

    def serves(self, micro_batches: Sequence[Batch]) -> bool:
        """Return whether these batches can be copied into the recorded one."""
        return self.count == len(micro_batches) and all(batch.shape == self.shape for batch in micro_batches)

    def gate_sums(self, batch: Batch) -> LayerSums:
        """Return the sums of each layer over a micro-batch."""
        self.batch.copy_(batch)
        if self.gates is None:
            self.gates = Graph(lambda: self.live.gate_sums(self.batch), self.pool)
        return _cloned(self.gates.replay())

    def learn(self, batch: Batch, joined: LayerSums | None, more: bool = False) -> Learned:
        """Set the gradients to those of a micro-batch; with `more`, add them to those of the step's earlier ones."""
        self.batch.copy_(batch)
        if joined is not None:
            self.joined = self.joined or _cloned(joined)
            for layer, sums in self.joined.items():
                for own, new in zip(sums.parts(), joined[layer].parts(), strict=True):
                    own.copy_(new)
        if more not in self.learning:
            fixed = None if joined is None else self.joined
            with self._gradients():
                self.learning[more] = Graph(lambda: self.live.learn(self.batch, fixed, more), self.pool)
        learned = self.learning[more].replay()
        return learned._replace(loss=learned.loss.clone(), nll=learned.nll.clone(), sums=_cloned(learned.sums))

    def finish(self) -> ClippedStep:
        """Take the optimiser's step."""
        if self.step is None:
            with self._gradients():
                self.step = Graph(self.live.finish, self.pool)
        return ClippedStep(*(figure.clone() for figure in self.step.replay()))

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Give the parameters their recorded gradients, and keep these: nothing else may use their memory."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=bool(self.gradients)):
            parameter.grad = gradient
        try:
            yield
            if not self.gradients:
                self.gradients = [parameter.grad for parameter in self.parameters]
        finally:
            for parameter in self.parameters:
                parameter.grad = None


def _cloned(sums: LayerSums) -> LayerSums:
    return {layer: GateSums(*(part.clone() for part in each.parts())) for layer, each in sums.items()}
