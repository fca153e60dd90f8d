"""Rows on their way between processes, and the visits for which they travel (see `expert_parallel.py`).

Letters: T tokens, K slots per token, S = T * K slots, M processes.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.dispatch import SortedSlots, sort_slots


class Transfer:
    """One asynchronous exchange of tensors, and of their gradients in the backward pass.

    `send` and `receive` have the numbers of rows to and from each process, for each of the tensors.
    """

    def __init__(self, group: dist.ProcessGroup, send: list[list[int]], receive: list[list[int]]) -> None:
        self.group, self.send, self.receive = group, send, receive

    def begin(self, tensors: tuple[Tensor, ...], send: list[list[int]], receive: list[list[int]]) -> tuple[Tensor, ...]:
        """Start the exchange. Return the tensors that will hold what is received after `finish`."""
        # References keep all tensors alive during the exchange.
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.came = tuple(x.new_empty(sum(rows), *x.shape[1:]) for x, rows in zip(self.sent, receive, strict=True))
        self.works = [
            dist.all_to_all_single(came, sent, to, of, group=self.group, async_op=True)
            for came, sent, to, of in zip(self.came, self.sent, receive, send, strict=True)
        ]
        return self.came

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for the received tensors and return them. On a GPU, its stream waits, not the host."""
        for work in self.works:
            work.wait()
        came = self.came
        del self.works, self.sent, self.came
        return came


class Begin(Function):
    """Forward: start sending the tensors. Backward: wait for their gradients."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.begin(tensors, transfer.send, transfer.receive)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.transfer.finish()


class Finish(Function):
    """Forward: wait for the tensors. Backward: start sending their gradients back.

    The gradients that backward returns are placeholders, which `Begin` ignores.
    """

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *coming: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return tuple(came.view_as(came) for came in transfer.finish())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.transfer.begin(grads, ctx.transfer.receive, ctx.transfer.send)
        return None, *grads


class Visits(NamedTuple):
    """The visits of some tokens. Of the slots that a token has on a process, the first one marks the visit."""

    process_TK: Tensor  # int64, the process that is visited; M in a slot that marks no visit
    visits: SortedSlots  # of `process_TK`: visits by process, then token
    slots: SortedSlots  # all slots by process, then token, as visits are
    first_S: Tensor  # bool, of each sorted slot: whether it marks a visit


def plan_visits(process_TK: Tensor, num_processes: int) -> Visits:
    """Return the visits of tokens whose experts are on these processes; slots of process M are empty."""
    slots = sort_slots(process_TK.flatten(), num_processes)
    process_S, token_S = process_TK.flatten()[slots.order_S], slots.order_S // process_TK.shape[1]
    # Pairs of process and token as numbers, which rise from visit to visit.
    visit_S = process_S * len(process_TK) + token_S
    first_S = visit_S.diff(prepend=visit_S.new_full((1,), -1)) > 0
    visited_TK = process_TK.where(first_S[slots.row_S].view_as(process_TK), num_processes)
    return Visits(visited_TK, sort_slots(visited_TK.flatten(), num_processes), slots, first_S)
