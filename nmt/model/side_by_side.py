"""Independent pieces of work that a GPU does at the same time while a recorded step is replayed.

An LSTM's positions follow each other, and the later ones leave most of a GPU idle. Outside of a recording, all work is
done in order, as launching it would take longer than it does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def side_by_side(*works: Callable[[], Tensor]) -> list[Tensor]:
    """Return the results of independent pieces of work, which must not draw random numbers.

    Their backward passes are independent pieces of work, too.
    """
    if not _recording():
        return [work() for work in works]
    main = torch.cuda.current_stream()
    results = []
    sides = [main, *(torch.cuda.Stream() for _ in works[1:])]
    for side in sides[1:]:
        side.wait_stream(main)
    for side, work in zip(sides, works, strict=True):
        with torch.cuda.stream(side):
            results.append(work())
    for side in sides[1:]:
        main.wait_stream(side)
    return results


class Later:
    """Gradients of the weights of one operation, which are computed aside while the backward pass continues.

    The backward pass of the operation calls `leave` instead of computing them, and returns the weights themselves as
    placeholders of their gradients. `weights` must pass through this object:

        later = Later()
        weights = later.through(cast)
        y = Operation.apply(x, later, *weights)
    """

    _running: ClassVar[dict[int, tuple[torch.cuda.Event, Any]]] = {}
    """By the stream that left it: the end of work that may still be running, and what it reads."""

    def __init__(self) -> None:
        self.work: Callable[[], tuple[Tensor, ...]] | None = None
        self.left_by = 0

    def through(self, cast: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the weights that `cast` returns. Their gradients, and those of the cast, are computed aside."""
        with _aside():
            return list(_Weights.apply(self, *cast()))

    def leave(self, work: Callable[[], tuple[Tensor, ...]]) -> None:
        """Leave the gradients of the weights, in order, to be computed by `work`."""
        self.work = work
        if _recording():
            stream = torch.cuda.current_stream()
            self.left_by = stream.cuda_stream
            # What the last work reads may be overwritten once this stream has waited for its end.
            ended, _ = self._running.pop(self.left_by, (None, None))
            if ended is not None:
                stream.wait_event(ended)

    def compute(self) -> tuple[Tensor, ...]:
        """Do the work, on the stream on which the weights passed through."""
        assert self.work is not None
        work, self.work = self.work, None
        gradients = work()
        if _recording():
            ended = torch.cuda.Event()
            ended.record()
            self._running[self.left_by] = (ended, work)
        return gradients

    @classmethod
    def forget(cls) -> None:
        """Release what work aside read. Call this once its stream has been waited for: after a backward pass."""
        cls._running.clear()


class _Weights(Function):
    """Weights unchanged; the gradients of `Later`."""

    @staticmethod
    def forward(ctx: Any, later: Later, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.later = later
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *_placeholders: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.later.compute()


@contextmanager
def _aside() -> Iterator[None]:
    """Do work on another stream, for which the current one then waits; its backward pass runs on that stream."""
    if not _recording():
        yield
        return
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)
