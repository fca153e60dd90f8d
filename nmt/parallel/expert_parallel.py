"""One copy of every expert, spread over processes, each fed by all of them (S17 section 3.1).

Rows travel to the process that holds their expert and back by two all-to-all exchanges, after one that says how many
there are. Experts are numbered by process: with M processes, process r holds experts r E/M .. (r+1) E/M - 1. For a
hierarchical gate these are whole groups wherever M divides their number, as in the paper.

Letters: T tokens, K places for experts a token has, R rows sent, G rows received, E experts, L = E / M of them here,
D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from nmt.errors import UserError
from nmt.model.experts import Experts, LocalDispatcher, MoE, Route
from nmt.model.gating import GateOutput
from nmt.model.rows import inverse_permutation, route_rows
from nmt.parallel.mesh import World


class _AllToAll(Function):
    """Rows to the other processes, and theirs here; backward, their gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_GD, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out_GD = rows_RD.new_empty(sum(receive), *rows_RD.shape[1:])
    dist.all_to_all_single(out_GD, rows_RD.contiguous(), receive, send, group=group)
    return out_GD


class _Route(NamedTuple):
    """How rows were sorted here, how many went where, and how those that came were sorted."""

    local: Route
    send: list[int]
    receive: list[int]
    order_G: Tensor
    inverse_G: Tensor


class AllToAllDispatcher:
    """`LocalDispatcher`, for experts that live in a group of processes."""

    def __init__(self, group: dist.ProcessGroup, group_size: int) -> None:
        self.group, self.group_size = group, group_size
        self.local = LocalDispatcher()
        self.main_decides = False
        """Take every result from the first process: for passes in which all have the same tokens and must not part."""

    def dispatch(self, x_TD: Tensor, gate: GateOutput, num_experts: int) -> tuple[Tensor, Tensor, _Route]:
        """(rows_GD for the experts here, grouped by expert; ends_L; the way back)."""
        rows_RD, ends_E, local = self.local.dispatch(x_TD, gate, num_experts)
        count_ML = ends_E.diff(prepend=ends_E.new_zeros(1)).long().view(self.group_size, -1)
        received_ML = torch.empty_like(count_ML)
        dist.all_to_all_single(received_ML, count_ML, group=self.group)
        # The one wait for the device: the exchange must be told its sizes.
        send, receive = torch.stack([count_ML.sum(1), received_ML.sum(1)]).tolist()
        came_GD = _AllToAll.apply(rows_RD, send, receive, self.group)
        # Rows came by process and in it by expert; the experts want them by expert.
        expert_M = torch.arange(count_ML.shape[1], device=x_TD.device).repeat(self.group_size)
        expert_G = expert_M.repeat_interleave(received_ML.flatten(), output_size=sum(receive))
        order_G = expert_G.argsort(stable=True)
        route = _Route(local, send, receive, order_G, inverse_permutation(order_G))
        ends_L = received_ML.sum(0).cumsum(0).int()
        return route_rows(came_GD, order_G, route.inverse_G), ends_L, route

    def combine(self, rows_GD: Tensor, gates_TK: Tensor, route: _Route) -> Tensor:
        """y_t = sum_j gate_tj row_tj, the rows fetched from where their experts are."""
        back_GD = route_rows(rows_GD, route.inverse_G, route.order_G)
        rows_RD = _AllToAll.apply(back_GD, route.receive, route.send, self.group)
        y_TD = self.local.combine(rows_RD, gates_TK, route.local)
        if self.main_decides:
            dist.broadcast(y_TD, group=self.group, group_src=0)
        return y_TD


def is_expert(name: str) -> bool:
    """Whether a parameter of `Seq2Seq` belongs to an expert, by its name."""
    return ".experts.weights." in name


@contextmanager
def passes_alike(model: nn.Module) -> Iterator[None]:
    """Passes in which all processes have the same tokens, and must take the same way: the first one's results count."""
    dispatchers = [m.dispatcher for m in model.modules() if isinstance(m, MoE)]
    changed = [each for each in dispatchers if isinstance(each, AllToAllDispatcher)]
    for each in changed:
        each.main_decides = True
    try:
        yield
    finally:
        for each in changed:
            each.main_decides = False


def distribute(model: nn.Module, world: World) -> None:
    """Keep this process's share of the experts, and let the MoE layers exchange rows. UserError if they do not divide.

    Nothing changes for a single process.
    """
    if world.group_size == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            if module.num_experts % world.group_size:
                raise UserError(
                    f"the {module.num_experts} experts of {name} cannot be spread over {world.group_size} processes: "
                    "their number must be a multiple (or set parallel.expert_group_size)"
                )
            group = world.expert_group
            assert group is not None
            module.dispatcher = AllToAllDispatcher(group, world.group_size)
            _keep_share(module.experts, world)


@torch.no_grad()
def _keep_share(experts: Experts, world: World) -> None:
    for place, w_EIO in enumerate(experts.weights):
        experts.weights[place] = nn.Parameter(w_EIO.chunk(world.group_size)[world.group_rank].clone())
