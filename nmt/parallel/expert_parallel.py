"""Expert parallelism: the processes of a group share one copy of every expert, and send it their tokens (S17 3.1).

A token visits every process that holds at least one of its experts. Its row travels there once, with the gates and the
numbers of all its experts on that process. The process returns one row, their results weighted by the gates and added
up. At home, the rows of a token are added up in the order of its slots: y_t = sum_m sum_(i on m) g_ti E_i(x_t).
Gradients travel back in the same way. A first all-to-all exchange announces how many rows and gates there are.

Experts are numbered by process: with M processes, process m holds experts m E/M to (m+1) E/M - 1. For a hierarchical
gate, these are whole groups if M divides the number of groups, as in the paper. A token then visits at most as many
processes as it selects groups.

Letters: T tokens, K slots per token, S = T * K slots, R full slots, V visits of own tokens, W visits of others to this
process, G full slots of these, E experts, M processes, P parts of a batch that are sent separately, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nmt.config import Config
from nmt.errors import UserError
from nmt.model.assemble import assemble
from nmt.model.experts import Experts, ExpertShard, MoE
from nmt.model.gating import GateOutput
from nmt.model.kernels.dispatch import sort_slots
from nmt.model.routes import Route, make_route
from nmt.model.rows import add_rows, combine_rows, route_rows, take_rows
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.parallel.transfer import Begin, Finish, Transfer, plan_visits


class _Part(NamedTuple):
    """A part of the tokens during an exchange: between tokens and visits, the exchange, and what it will bring."""

    route: Route
    transfer: Transfer
    coming: tuple[Tensor, ...]


class AllToAllDispatcher:
    """Dispatcher for experts that are spread over a group of processes; the counterpart of `LocalDispatcher`.

    With `halves`, tokens are sent in two halves. One half is exchanged while experts process the other, forward and
    backward. The results are the same, but experts get fewer rows per call.
    """

    def __init__(self, group: dist.ProcessGroup, group_size: int, halves: bool) -> None:
        self.group, self.group_size, self.halves = group, group_size, halves
        self.turns: _Turns | None = None
        """Set while the processes make passes independently of each other (`independent_passes`)."""
        self.fixed: FixedSizes | None = None
        """Set while exchanges must have sizes that the host knows (`fixed_sizes`)."""

    def run(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Return y_t = sum_j gate_tj E_j(x_t). Each x_t is sent once to each process that holds experts of it."""
        if self.fixed is not None:
            return self.fixed.exchange(experts, x_TD, gate, self.group, self.group_size)
        if self.turns is not None:
            self.turns.wait(self)
        return self.exchange(experts, x_TD, gate)

    def exchange(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Do `run`'s work when all processes of the group are at this layer. A process may have no tokens."""
        back = []
        for route, transfer, coming in self._send(x_TD, gate):
            y_WD = _serve(experts, *Finish.apply(transfer, *coming))
            home = Transfer(self.group, transfer.receive[:1], transfer.send[:1])
            back.append(_Part(route, home, Begin.apply(home, y_WD)))
        parts = []
        for route, home, coming in back:
            (y_VD,) = Finish.apply(home, *coming)
            parts.append(add_rows(y_VD, route.token_R, route.row_R, route.begin_T))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _send(self, x_TD: Tensor, gate: GateOutput) -> list[_Part]:
        """Exchange the numbers of visits and of their slots, then start sending all parts."""
        num_parts, held = 1 + self.halves, gate.sums.count_E.numel() // self.group_size
        pieces = list(zip(*(x.tensor_split(num_parts) for x in (x_TD, gate.expert_TK, gate.gates_TK)), strict=True))
        plans = [plan_visits(expert_TK // held, self.group_size) for _, expert_TK, _ in pieces]
        # By process, part, and what is counted: visits, slots.
        ends_MP2 = torch.stack([torch.stack([plan.visits.ends_E, plan.slots.ends_E], 1) for plan in plans], 1).long()
        count_MP2 = ends_MP2.diff(dim=0, prepend=torch.zeros_like(ends_MP2[:1]))
        received_MP2 = torch.empty_like(count_MP2)
        dist.all_to_all_single(received_MP2, count_MP2, group=self.group)
        # The only wait for the device: the exchanges need their sizes on the host.
        send_P2M, receive_P2M = torch.stack([count_MP2, received_MP2]).permute(0, 2, 3, 1).tolist()
        parts = []
        for piece, plan, send, receive in zip(pieces, plans, send_P2M, receive_P2M, strict=True):
            part_TD, expert_TK, gates_TK = piece
            num_visits, num_slots = map(sum, send)
            route = make_route(plan.visits, plan.process_TK, self.group_size, num_visits)
            rows_VD = route_rows(part_TD, route.token_R, route.row_R, route.begin_T)
            slot_R, first_R = plan.slots.order_S[:num_slots], plan.first_S[:num_slots]
            gates_R, expert_R = take_rows(gates_TK.flatten(), slot_R), expert_TK.flatten()[slot_R] % held
            # One tensor of the type of the gates: in float32, numbers are exact up to 2^24 experts per process.
            slots_R3 = torch.stack([gates_R, expert_R.to(gates_R.dtype), first_R.to(gates_R.dtype)], 1)
            transfer = Transfer(self.group, send, receive)
            parts.append(_Part(route, transfer, Begin.apply(transfer, rows_VD, slots_R3)))
        return parts


def _serve(experts: Experts, rows_WD: Tensor, slots_G3: Tensor) -> Tensor:
    """Return, for each visit, the results of its experts here, weighted by their gates and added up.

    `slots_G3` has the slots of all visits in turn: gate, number of the expert among those of this process, and whether
    it marks the visit.
    """
    gates_G, expert_G, first_G = slots_G3.unbind(1)
    visit_G = first_G.long().cumsum(0) - 1
    begin_W = torch.searchsorted(visit_G, torch.arange(len(rows_WD), device=visit_G.device))
    slots = sort_slots(expert_G.long(), len(experts.weights[0]))
    route = Route(visit_G[slots.order_S], slots.order_S, slots.row_S, begin_W)
    return combine_rows(experts(rows_WD, slots.ends_E, route), gates_G.contiguous(), *route)


class _Turns:
    """Order of the MoE layers' exchanges when each process of a group makes its own passes through the model.

    An exchange needs all processes at the same layer. Before each exchange, every process announces the layer that it
    has reached. The earliest of these layers in the network is next. Processes at other layers take part in its
    exchange without tokens. A finished process keeps taking part until all have finished. So the results of a process
    do not depend on decisions of others, such as when a sentence ends.
    """

    def __init__(self, layers: list[MoE], group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self.layers, self.group, self.dtype = layers, group, dtype

    def wait(self, dispatcher: AllToAllDispatcher) -> None:
        """Return when the layer of `dispatcher` is next, after taking part in the exchanges before it."""
        self._take_part([layer.dispatcher for layer in self.layers].index(dispatcher))

    def finish(self) -> None:
        """Return when all processes have finished, after taking part in their exchanges."""
        self._take_part(len(self.layers))

    @torch.no_grad()
    def _take_part(self, wanted: int) -> None:
        device = self.layers[0].experts.weights[0].device
        while True:
            next_1 = torch.tensor([wanted], device=device)
            dist.all_reduce(next_1, op=dist.ReduceOp.MIN, group=self.group)
            next_layer = int(next_1)
            if next_layer == wanted:
                return
            layer = self.layers[next_layer]
            assert isinstance(layer.dispatcher, AllToAllDispatcher)
            weight_EIO = layer.experts.weights[0]
            nothing_0D = weight_EIO.new_empty(0, weight_EIO.shape[1], dtype=self.dtype)
            layer.dispatcher.exchange(layer.experts, nothing_0D, layer.gate(nothing_0D))


@contextmanager
def independent_passes(model: Seq2Seq) -> Iterator[None]:
    """Context in which each process may make any number of passes outside training, over its own tokens.

    All processes must enter it, and each waits at its end for the others.
    """
    layers = list(model.moe_layers().values())
    dispatchers = [layer.dispatcher for layer in layers if isinstance(layer.dispatcher, AllToAllDispatcher)]
    if not dispatchers:
        yield
        return
    turns = _Turns(layers, dispatchers[0].group, model.dtype)
    for each in dispatchers:
        each.turns = turns
    try:
        yield
        turns.finish()
    finally:
        for each in dispatchers:
            each.turns = None


@contextmanager
def fixed_sizes(model: Seq2Seq, sizes: FixedSizes | None) -> Iterator[None]:
    """Context in which exchanges have these fixed sizes; None: those that the gates ask for."""
    dispatchers = [layer.dispatcher for layer in model.moe_layers().values()]
    parallel = [each for each in dispatchers if isinstance(each, AllToAllDispatcher)]
    for each in parallel:
        each.fixed = sizes
    try:
        yield
    finally:
        for each in parallel:
            each.fixed = None


def shard_of(config: Config, world: World) -> ExpertShard:
    """Return the part of the experts that this process holds.

    UserError if the number of processes does not divide the number of experts.
    """
    moe = config.model.moe
    for layer in config.model.moe_layer_names():
        if moe.experts_at(layer) % world.group_size:
            raise UserError(
                f"the {moe.experts_at(layer)} experts of {layer} cannot be spread over {world.group_size} processes: "
                "their number must be a multiple (or set parallel.expert_group_size)"
            )
    return ExpertShard(world.group_rank, world.group_size)


def make_model(
    config: Config, vocab_size: int, world: World, parameters: Mapping[str, Tensor] | None = None
) -> Seq2Seq:
    """Return a network for the processes of `world` to train together, with this process's share of the experts.

    New parameters are those of a single process with the same seed. With `parameters` (see `load_parameters`) none is
    drawn, and the network uses these in place. UserError as for `shard_of`.
    """
    shard = shard_of(config, world)
    if parameters is None:
        model = Seq2Seq(config.model, vocab_size, shard)
    else:
        model = assemble(config.model, vocab_size, parameters, shard)
    if world.group_size > 1:
        group = world.expert_group
        assert group is not None
        for moe_layer in model.moe_layers().values():
            moe_layer.dispatcher = AllToAllDispatcher(group, world.group_size, config.parallel.overlap_exchange)
    return model
