"""Expert parallelism: the processes of a group share one copy of every expert, and send it their tokens (S17 3.1).

A first all-to-all exchange announces the numbers of rows. A second one sends each row to the process of its expert, and
a third one returns the results. Experts are numbered by process: with M processes, process r holds experts r E/M to
(r+1) E/M - 1. For a hierarchical gate, these are whole groups if M divides the number of groups, as in the paper.

Letters: T tokens, K experts per token, R rows sent, G rows received, E experts, L = E / M experts of this process,
P parts of a batch that are sent separately, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from nmt.config import Config
from nmt.errors import UserError
from nmt.model.assemble import assemble
from nmt.model.experts import Experts, ExpertShard, LocalDispatcher, MoE
from nmt.model.gating import GateOutput
from nmt.model.routes import Route
from nmt.model.rows import inverse_permutation, route_rows, take_rows
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World


class _Transfer:
    """One asynchronous exchange of rows, and of their gradients in the backward pass."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        self.group, self.send, self.receive = group, send, receive

    def begin(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Start the exchange. Return the tensor that will hold the received rows after `finish`."""
        # References keep both tensors alive during the exchange.
        self.rows_RD = rows_RD.contiguous()
        self.came_GD = rows_RD.new_empty(sum(receive), *rows_RD.shape[1:])
        self.work = dist.all_to_all_single(self.came_GD, self.rows_RD, receive, send, group=self.group, async_op=True)
        return self.came_GD

    def finish(self) -> Tensor:
        """Wait for the received rows and return them. On a GPU, its stream waits, not the host."""
        self.work.wait()
        came_GD = self.came_GD
        del self.work, self.rows_RD, self.came_GD
        return came_GD


class _Begin(Function):
    """Forward: start sending the rows. Backward: wait for their gradients."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin(rows_RD, transfer.send, transfer.receive)

    @staticmethod
    def backward(ctx: Any, _grad_GD: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Finish(Function):
    """Forward: wait for the rows. Backward: start sending their gradients back.

    The gradient that backward returns is a placeholder, which `_Begin` ignores.
    """

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
    """A part of the tokens during its exchange: gates, sorting, rows received per process and expert, and transfer."""

    gates_TK: Tensor
    local: Route
    received_ML: Tensor
    transfer: _Transfer
    coming_GD: Tensor


class AllToAllDispatcher:
    """Dispatcher for experts that are spread over a group of processes; the counterpart of `LocalDispatcher`.

    With `halves`, tokens are sent in two halves. One half is exchanged while experts process the other, forward and
    backward. The results are the same, but experts get fewer rows per call.
    """

    def __init__(self, group: dist.ProcessGroup, group_size: int, halves: bool) -> None:
        self.group, self.group_size, self.halves = group, group_size, halves
        self.local = LocalDispatcher()
        self.turns: _Turns | None = None
        """Set while the processes make passes independently of each other (`independent_passes`)."""

    def run(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Return y_t = sum_j gate_tj E_j(x_t). Each x_t is sent to the processes of its experts."""
        if self.turns is not None:
            self.turns.wait(self)
        return self.exchange(experts, x_TD, gate)

    def exchange(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Do `run`'s work when all processes of the group are at this layer. A process may have no tokens."""
        back = []
        for part in self._send(x_TD, gate):
            came_GD = _Finish.apply(part.coming_GD, part.transfer)
            # Rows arrive sorted by process, then by expert. Experts need them sorted by expert.
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
        """Exchange the numbers of rows, then start sending all parts."""
        if gate.num_routed is None:
            gate = gate._replace(num_routed=int((gate.expert_TK < gate.sums.count_E.numel()).sum()))
        pieces = [(x_TD, gate)]
        if self.halves:
            pieces = list(zip(x_TD.tensor_split(2), _halves(gate), strict=True))
        sorted_pieces = [self.local.sort(part_gate) for _, part_gate in pieces]
        ends = [ends_E.diff(prepend=ends_E.new_zeros(1)) for ends_E, _ in sorted_pieces]
        # Rows to send, by destination process, part, and expert of that process.
        count_MPL = torch.stack(ends).long().view(len(pieces), self.group_size, -1).transpose(0, 1).contiguous()
        received_MPL = torch.empty_like(count_MPL)
        dist.all_to_all_single(received_MPL, count_MPL, group=self.group)
        # The only wait for the device: the exchanges need their sizes on the host.
        send_PM, receive_PM = torch.stack([count_MPL.sum(2).T, received_MPL.sum(2).T]).tolist()
        parts = []
        for place, ((part_TD, part_gate), (_, route)) in enumerate(zip(pieces, sorted_pieces, strict=True)):
            transfer = _Transfer(self.group, send_PM[place], receive_PM[place])
            rows_RD = route_rows(part_TD, route.token_R, route.row_R, route.begin_T)
            coming_GD = _Begin.apply(rows_RD, transfer)
            parts.append(_Part(part_gate.gates_TK, route, received_MPL[:, place], transfer, coming_GD))
        return parts


def _halves(gate: GateOutput) -> list[GateOutput]:
    """Return the gate's outputs for the first and second half of the tokens; `sums` remain those of all tokens."""
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
