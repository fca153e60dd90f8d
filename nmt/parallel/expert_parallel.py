"""One copy of every expert, spread over processes, each fed by all of them (S17 section 3.1).

Rows travel to the process that holds their expert and back by two all-to-all exchanges, after one that says how many
there are. Experts are numbered by process: with M processes, process r holds experts r E/M .. (r+1) E/M - 1. For a
hierarchical gate these are whole groups wherever M divides their number, as in the paper.

Letters: T tokens, K places for experts a token has, R rows sent, G rows received, E experts, L = E / M of them here,
P parts in which tokens travel, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from nmt.config import Config
from nmt.errors import UserError
from nmt.model.experts import ExpertShard, LocalDispatcher, MoE, Route
from nmt.model.gating import GateOutput
from nmt.model.rows import inverse_permutation, take_rows
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World


class _Transfer:
    """One exchange of rows, and in the backward pass of their gradients: begun at one place, awaited at another."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        self.group, self.send, self.receive = group, send, receive

    def begin(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """The tensor that will hold what comes."""
        # Kept here as long as they travel.
        self.rows_RD = rows_RD.contiguous()
        self.came_GD = rows_RD.new_empty(sum(receive), *rows_RD.shape[1:])
        self.work = dist.all_to_all_single(self.came_GD, self.rows_RD, receive, send, group=self.group, async_op=True)
        return self.came_GD

    def finish(self) -> Tensor:
        """Wait for what comes (on a GPU its stream waits, not the host)."""
        self.work.wait()
        came_GD = self.came_GD
        del self.work, self.rows_RD, self.came_GD
        return came_GD


class _Begin(Function):
    """Rows set off; backward, their gradients have come back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin(rows_RD, transfer.send, transfer.receive)

    @staticmethod
    def backward(ctx: Any, _grad_GD: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Finish(Function):
    """Rows have come; backward, their gradients set off, and nothing that is handed on is read."""

    @staticmethod
    def forward(ctx: Any, came_GD: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish().view_as(came_GD)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.begin(grad_GD, transfer.receive, transfer.send)
        return grad_GD, None


class _Part(NamedTuple):
    """Some of the tokens on their way: how they were sorted here, how many rows come from where, and the transfer."""

    gates_TK: Tensor
    local: Route
    received_ML: Tensor
    transfer: _Transfer
    coming_GD: Tensor


class AllToAllDispatcher:
    """`LocalDispatcher`, for experts that live in a group of processes.

    `halves`: tokens travel in two halves, one while experts work on the other, forward and backward. The results are
    the same; experts see fewer rows at a time.
    """

    def __init__(self, group: dist.ProcessGroup, group_size: int, halves: bool) -> None:
        self.group, self.group_size, self.halves = group, group_size, halves
        self.local = LocalDispatcher()
        self.turns: _Turns | None = None
        """Set while every process goes its own way through the layers (`independent_passes`)."""

    def run(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """y_t = sum_j gate_tj E_j(x_t), each x_t sent to the process of its experts, and their results fetched."""
        if self.turns is not None:
            self.turns.wait(self)
        return self.exchange(experts, x_TD, gate)

    def exchange(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """`run`, with all processes of the group at this layer now. A process may have no tokens."""
        back = []
        for part in self._send(x_TD, gate):
            came_GD = _Finish.apply(part.coming_GD, part.transfer)
            # Rows came by process and in it by expert; the experts want them by expert.
            counts_ML = part.received_ML
            expert_M = torch.arange(counts_ML.shape[1], device=x_TD.device).repeat(self.group_size)
            expert_G = expert_M.repeat_interleave(counts_ML.flatten(), output_size=len(came_GD))
            order_G = expert_G.argsort(stable=True)
            rows_GD = experts(take_rows(came_GD, order_G), counts_ML.sum(0).cumsum(0).int())
            home = _Transfer(self.group, part.transfer.receive, part.transfer.send)
            back.append((part, home, _Begin.apply(take_rows(rows_GD, inverse_permutation(order_G)), home)))
        parts = [
            self.local.combine(_Finish.apply(coming_RD, home), part.gates_TK, part.local)
            for part, home, coming_RD in back
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _send(self, x_TD: Tensor, gate: GateOutput) -> list[_Part]:
        """All parts set off, after one exchange that says how many rows there are."""
        if gate.num_routed is None:
            gate = gate._replace(num_routed=int((gate.expert_TK < gate.sums.count_E.numel()).sum()))
        pieces = [(x_TD, gate)]
        if self.halves:
            pieces = list(zip(x_TD.tensor_split(2), _halves(gate), strict=True))
        sorted_pieces = [self.local.dispatch(*piece) for piece in pieces]
        ends = [ends_E.diff(prepend=ends_E.new_zeros(1)) for _, ends_E, _ in sorted_pieces]
        # By process, part, and expert there.
        count_MPL = torch.stack(ends).long().view(len(pieces), self.group_size, -1).transpose(0, 1).contiguous()
        received_MPL = torch.empty_like(count_MPL)
        dist.all_to_all_single(received_MPL, count_MPL, group=self.group)
        # The one wait for the device: the exchanges must be told their sizes.
        send_PM, receive_PM = torch.stack([count_MPL.sum(2).T, received_MPL.sum(2).T]).tolist()
        parts = []
        for place, ((_, part_gate), (rows_RD, _, route)) in enumerate(zip(pieces, sorted_pieces, strict=True)):
            transfer = _Transfer(self.group, send_PM[place], receive_PM[place])
            coming_GD = _Begin.apply(rows_RD, transfer)
            parts.append(_Part(part_gate.gates_TK, route, received_MPL[:, place], transfer, coming_GD))
        return parts


def _halves(gate: GateOutput) -> list[GateOutput]:
    """The decisions for the first and for the second half of the tokens; the sums stay those of all."""
    experts, gates = gate.expert_TK.tensor_split(2), gate.gates_TK.tensor_split(2)
    if gate.num_routed == gate.expert_TK.numel():
        routed = [expert_TK.numel() for expert_TK in experts]
    else:
        routed = torch.stack([(expert_TK < gate.sums.count_E.numel()).sum() for expert_TK in experts]).tolist()
    return [
        gate._replace(expert_TK=expert_TK, gates_TK=gates_TK, num_routed=count)
        for expert_TK, gates_TK, count in zip(experts, gates, routed, strict=True)
    ]


class _Turns:
    """Whose layer comes next, where each process of a group goes its own way through the MoE layers of a model.

    An exchange needs all of them at one layer. So before each, every process names the layer that it has come to, and
    the first of these, in the order of the network, is next. Those that are elsewhere take part in it without tokens of
    their own. One that is done goes on doing so until all are. What a process computes thus hangs on nothing that
    another decides, such as when a sentence is finished.
    """

    def __init__(self, layers: list[MoE], group: dist.ProcessGroup) -> None:
        self.layers, self.group = layers, group

    def wait(self, dispatcher: AllToAllDispatcher) -> None:
        """Return when the layer of `dispatcher` is next."""
        self._take_part([layer.dispatcher for layer in self.layers].index(dispatcher))

    def finish(self) -> None:
        """Return when all processes are done."""
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
            nothing_0D = weight_EIO.new_empty(0, weight_EIO.shape[1])
            layer.dispatcher.exchange(layer.experts, nothing_0D, layer.gate(nothing_0D))


@contextmanager
def independent_passes(model: Seq2Seq) -> Iterator[None]:
    """Passes outside training, of which each process makes as many as it likes, over tokens of its own.

    All processes must enter; they leave together.
    """
    layers = list(model.moe_layers().values())
    dispatchers = [layer.dispatcher for layer in layers if isinstance(layer.dispatcher, AllToAllDispatcher)]
    if not dispatchers:
        yield
        return
    turns = _Turns(layers, dispatchers[0].group)
    for each in dispatchers:
        each.turns = turns
    try:
        yield
        turns.finish()
    finally:
        for each in dispatchers:
            each.turns = None


def make_model(config: Config, vocab_size: int, world: World) -> Seq2Seq:
    """The network that the processes of `world` train together, new: this one makes its share of the experts alone.

    All parameters are those of a single process with the same seed. UserError if the experts do not divide.
    """
    moe = config.model.moe
    for layer in config.model.moe_layer_names():
        if moe.experts_at(layer) % world.group_size:
            raise UserError(
                f"the {moe.experts_at(layer)} experts of {layer} cannot be spread over {world.group_size} processes: "
                "their number must be a multiple (or set parallel.expert_group_size)"
            )
    model = Seq2Seq(config.model, vocab_size, ExpertShard(world.group_rank, world.group_size))
    if world.group_size > 1:
        group = world.expert_group
        assert group is not None
        for moe_layer in model.moe_layers().values():
            moe_layer.dispatcher = AllToAllDispatcher(group, world.group_size, config.parallel.overlap_exchange)
    return model
