"""Recorded steps on a CPU: a stand-in for a CUDA graph does the work again, into the same tensors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import nmt.training.recording
import nmt.training.update
from nmt.batch import Batch
from nmt.model.seq2seq import Seq2Seq


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Replayed:
    """As a graph does: making it computes nothing, but fixes the results' and the gradients' tensors."""

    state: Callable[[], list[Tensor]]
    """All that a step changes: parameters and the optimiser's state."""
    parameters: list[Tensor]

    def __init__(self, work: Callable[[], Any], _pool: Any) -> None:
        self.work, self.before = work, [parameter.grad for parameter in self.parameters]
        changed = [*self.state(), *(grad for grad in self.before if grad is not None)]
        values, noise = [tensor.clone() for tensor in changed], torch.get_rng_state()
        self.results = work()
        self.after = [parameter.grad for parameter in self.parameters]
        for tensor, value in zip(changed, values, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(noise)

    def replay(self) -> Any:
        for parameter, grad in zip(self.parameters, self.before, strict=True):
            parameter.grad = grad
        for old, new in zip(tensors_in(self.results), tensors_in(self.work()), strict=True):
            old.detach().copy_(new.detach())
        for parameter, grad in zip(self.parameters, self.after, strict=True):
            if grad is not None and parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = None
        return self.results


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


@contextmanager
def recordings(model: Seq2Seq, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which an `Updater` that is made of these records its steps."""
    Replayed.parameters = list(model.parameters())
    Replayed.state = staticmethod(
        lambda: [
            *(parameter.data for parameter in model.parameters()),
            *(value for each in optimizer.state.values() for value in each.values()),
        ]
    )
    with ExitStack() as stack:
        for name in ("Stream", "current_stream"):
            stack.enter_context(patch.object(torch.cuda, name, lambda *_: Stream()))
        stack.enter_context(patch.object(torch.cuda, "stream", lambda _: nullcontext()))
        stack.enter_context(patch.object(torch.cuda, "graph_pool_handle", lambda: None))
        stack.enter_context(patch.object(nmt.training.recording, "Graph", Replayed))
        stack.enter_context(patch.object(nmt.training.update, "can_record", lambda *_: True))
        # A batch that is recorded must not share its memory with the one that it was copied from.
        stack.enter_context(patch.object(Batch, "to", lambda batch, _: batch.map(torch.clone)))
        yield
