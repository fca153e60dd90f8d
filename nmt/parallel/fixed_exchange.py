"""Exchanges of tokens whose sizes the host knows before the gates have chosen, so that a step can be recorded.

An exchange as the gates ask for it has sizes that only the device knows, and the host must wait for them. A CUDA graph
cannot. So every process sends the same number of places to every other one, some of which are empty, and has experts
for the same number of rows. No capacity limits the experts, and no token is dropped: if there are not enough places or
rows, the results of this process are NaN, and `exceeded` is true. The sums of gradients are then NaN in all processes,
and the caller does the step again with more room. What is computed is otherwise the same, in the same order, as
`AllToAllDispatcher.exchange` computes it.

Unless `exceeded`, the last place for each process and the last row of the experts are never filled. Empty slots refer
to them, as their results and gradients are zeros.

Letters: T tokens, K slots per token, S = T * K slots, M processes, P places for the visits to one process, V = M * P
places that a process sends or receives, E experts of a process, R rows of its experts, D width.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from nmt.config import MoEConfig
from nmt.cost.step import ROOM, places
from nmt.model.experts import Experts
from nmt.model.gating import GateOutput
from nmt.model.kernels.dispatch import sort_slots
from nmt.model.routes import Route
from nmt.model.rows import add_rows, combine_rows, route_rows
from nmt.parallel.mesh import World
from nmt.parallel.transfer import Begin, Finish, Transfer, plan_visits

_FEW = 2.5
"""If all rows that can come are at most this many times those of even loads, there is room for all of them."""


class FixedSizes:
    """The sizes of all exchanges of a model, and whether one of them was too small."""

    def __init__(self, moe: MoEConfig, device: torch.device) -> None:
        self.moe, self.room = moe, ROOM
        self.exceeded = torch.zeros((), dtype=torch.bool, device=device)
        """Whether any exchange since this was set to false had too little room."""
        self.suffices = True
        """Whether all exchanges with this room have had enough for all tokens to choose the experts of one process."""

    def enlarge(self) -> None:
        """Have twice the room, which is enough sooner or later: no more than all tokens can visit a process."""
        self.room, self.suffices = 2.0 * self.room, True

    def take_exceeded(self, world: World) -> bool:
        """Return whether `exceeded` is true in any process, and set it to false. Waits for the device if it can be."""
        if self.suffices:
            return False
        exceeded = bool(world.max(self.exceeded.float()))
        self.exceeded.zero_()
        return exceeded

    def exchange(
        self, experts: Experts, x_TD: Tensor, gate: GateOutput, group: dist.ProcessGroup, processes: int
    ) -> Tensor:
        """Return y_t = sum_j gate_tj E_j(x_t), with experts of all processes of the group; NaN if `exceeded`.

        All processes must have the same number of tokens, which may be padding.
        """
        expert_TK, num_experts = gate.expert_TK, gate.sums.count_E.numel()
        num_tokens, num_slots = expert_TK.shape
        held, num_places = num_experts // processes, places(self.moe, num_experts, processes, num_tokens, self.room)
        process_TK = expert_TK // held
        visited_TK, visits, *_ = plan_visits(process_TK, processes)
        begin_M = torch.cat([visits.ends_E.new_zeros(1), visits.ends_E[:-1]]).long()
        count_M = visits.ends_E - begin_M
        self._need(count_M.max() < num_places)

        place_P = torch.arange(num_places, device=x_TD.device)
        full_V = (place_P < count_M[:, None]).flatten()
        # An empty place has the token of any other visit.
        visit_V = (begin_M[:, None] + place_P).flatten().clamp(max=expert_TK.numel() - 1)
        token_V = visits.order_S[visit_V] // num_slots
        to_S = visited_TK.flatten().clamp(max=processes - 1)
        place_S = (to_S * num_places + visits.row_S - begin_M[to_S]).clamp(max=len(token_V) - 1)
        place_S = place_S.where(visited_TK.flatten() < processes, num_places - 1)
        begin_T = torch.arange(num_tokens, device=x_TD.device) * num_slots

        process_V = torch.arange(processes, device=x_TD.device).repeat_interleave(num_places)
        here_VK = (process_TK[token_V] == process_V[:, None]) & full_V[:, None]
        gates_VK = gate.gates_TK.index_select(0, token_V).where(here_VK, 0.0)
        number_VK = (expert_TK[token_V] % held).where(here_VK, held)
        slots_V2K = torch.cat([self._checked(gates_VK), number_VK.to(gates_VK.dtype)], 1)
        rows_VD = route_rows(x_TD, token_V, place_S, begin_T)

        sizes = [[num_places] * processes] * 2
        there, back = Transfer(group, sizes, sizes), Transfer(group, sizes[:1], sizes[:1])
        came = Finish.apply(there, *Begin.apply(there, rows_VD, slots_V2K))
        rows = self._rows(expert_TK.numel(), len(token_V) * num_slots)
        self.suffices = self.suffices and num_places > num_tokens and rows > len(token_V) * num_slots
        y_VD = self._serve(experts, came, rows)
        (y_VD,) = Finish.apply(back, *Begin.apply(back, y_VD))
        return add_rows(y_VD, token_V, place_S, begin_T)

    def _serve(self, experts: Experts, came: tuple[Tensor, ...], most: int) -> Tensor:
        """Return, for each place that came, the results of its experts here, weighted by their gates and added up.

        The experts have `most` rows, of which the last must be empty.
        """
        rows_VD, slots_V2K = came
        gates_VK, number_VK = slots_V2K.chunk(2, 1)
        num_rows, num_slots = number_VK.shape
        slots = sort_slots(number_VK.long().flatten(), len(experts.weights[0]))
        self._need(slots.ends_E[-1] < most)
        order_R = slots.order_S[:most].clone()
        begin_V = torch.arange(num_rows, device=rows_VD.device) * num_slots
        route = Route(order_R // num_slots, order_R, slots.row_S.clamp(max=most - 1), begin_V)
        rows_RD = experts(rows_VD, slots.ends_E.clamp(max=most), route)
        return combine_rows(rows_RD, self._checked(gates_VK).contiguous(), *route)

    def _rows(self, even: int, most: int) -> int:
        """Return R, if experts have `even` rows with even loads, and never more than `most`."""
        if most <= _FEW * even:
            return most + 1
        return min(most, math.ceil(self.room * (even + 6.0 * math.sqrt(even)))) + 1

    def _need(self, enough: Tensor) -> None:
        """Note whether there was enough room."""
        self.exceeded.logical_or_(~enough)

    def _checked(self, gates_VK: Tensor) -> Tensor:
        """Return the gates, or NaN if there was too little room."""
        return gates_VK + torch.where(self.exceeded, torch.nan, 0.0).to(gates_VK.dtype)
