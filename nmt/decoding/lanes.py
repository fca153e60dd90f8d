"""Searches of fixed shapes, whose work is recorded once and replayed (`nmt.model.graph`).

Launching the hundred kernels of a position takes the host ten times as long as a GPU needs to run them. A lane is a
search for B sentences of up to S source positions. Encoding a batch, and each position of the search, are one launch.
Shapes are rounded up to few sizes; sentences of padding are done from the start. A lane that has lost most of its
sentences passes the rest on to a smaller one.

Nothing here depends on a GPU: a test replays by calling the work again.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.batch import Rows, source_rectangle
from nmt.decoding.rules import Rules
from nmt.decoding.search import BeamSettings, Choose, Search, SearchState, Step, best_of
from nmt.decoding.trace import Hypothesis, Stretch
from nmt.model.attention import Memory
from nmt.model.graph import Graph

# Positions between two looks at which sentences are done: each look waits for the GPU.
_LOOK_EVERY = 4
# A lane passes its sentences on when this many times fewer are left, since each lane takes time to make.
_SHRINK = 4
# A lane of fewer sentences takes hardly less time per position.
_LEAST_SENTENCES = 32
# Lanes that are kept. Each has tensors for its sentences, and shares the memory of its work with the others.
_MOST_LANES = 64


class LaneState(SearchState, Protocol):
    """State of a recorded search, which is used again for other sentences."""

    def restart_(self) -> None:
        """Go back to before the first position, in place."""

    def copy_(self, other: Self) -> None:
        """Become a copy of another state of the same size, in place."""


class Task(NamedTuple):
    """What all lanes of one kind of search share."""

    encode: Callable[[Tensor, Rows], Memory]
    start: Callable[[Memory, int], LaneState]
    """start(memory, sentences) returns the state of a search before its first position."""
    step: Step
    choose: Choose
    settings: BeamSettings
    forbidden_F: Tensor
    no_repeat: int
    longest: Callable[[int], int]
    """Returns the greatest length of any translation of a source of this many subwords, with its end."""


def wanted_sources(rows: Rows, symbols: int = 0) -> Tensor:
    """Return wanted_BS: the coverage penalty is for the source's subwords only.

    It is not for the end of sentence, nor for this many symbols before the subwords.
    """
    position_S1 = torch.arange(rows.num_positions, device=rows.length_B.device)[:, None]
    return ((position_S1 >= symbols) & (position_S1 < rows.length_B - 1)).T


def rounded_length(length: int) -> int:
    """Return the source positions of the lane for sentences of this many: a few more, for few different lanes."""
    unit = 8 if length <= 32 else 16 if length <= 64 else 32 if length <= 128 else 64 if length <= 256 else 128
    return -(-length // unit) * unit


def rounded_count(sentences: int) -> int:
    """Return the sentences of the lane for this many: the next power of two."""
    return 1 << (sentences - 1).bit_length()


class Lane:
    """A recorded search for up to `sentences` of up to `positions` source subwords, with the end of sentence."""

    def __init__(self, task: Task, memory: Memory, pool: Any) -> None:
        """Allocate the tensors of the search, and do a position once, which compiles kernels.

        `memory` is the encoded source of a batch, in tensors that the lane may overwrite.
        """
        self.task, self.memory, self.pool = task, memory, pool
        self.positions, self.sentences = positions, sentences = memory.padding_SB.shape
        device = task.forbidden_F.device
        self.sources: tuple[Tensor, Rows] | None = None
        shortest_B = torch.ones(sentences, dtype=torch.int64, device=device)
        self.search = Search.begin(
            task.step,
            task.start(self.memory, sentences),
            wanted_BS=torch.zeros(sentences, positions, dtype=torch.bool, device=device),
            rules=Rules(shortest_B, shortest_B.clone(), task.forbidden_F, no_repeat=task.no_repeat),
            settings=task.settings,
            choose=task.choose,
            most=task.longest(positions - 1),
        )
        self.encoding: Graph[None] | None = None
        self.position: Graph[None] | None = None
        self.search.advance()

    def load(self, sources: Sequence[np.ndarray], rules: Rules, symbols: int) -> None:
        """Begin the search of a batch. The rules are on the host, and fit all batches.

        Each source begins with this many `symbols`, which need no coverage.
        """
        source_N, rows = source_rectangle(sources, self.sentences, self.positions)
        if self.sources is None:
            device = self.task.forbidden_F.device
            self.sources = source_N.to(device), rows.map(lambda tensor: tensor.to(device))
            # Done once without a recording, which compiles kernels.
            self._encode()
            self.encoding = Graph(self._encode, self.pool)
        own_N, own_rows = self.sources
        own_N.copy_(source_N, non_blocking=True)
        own_rows.copy_(rows)
        self.search.wanted_BS.copy_(wanted_sources(rows, symbols), non_blocking=True)
        own, missing = self.search.rules, self.sentences - len(sources)
        own.min_length_B.copy_(F.pad(rules.min_length_B, (0, missing), value=1), non_blocking=True)
        own.max_length_B.copy_(F.pad(rules.max_length_B, (0, missing), value=1), non_blocking=True)
        self.search.restart(torch.arange(self.sentences, device=own_N.device) >= len(sources))
        assert self.encoding is not None
        self.encoding.replay()

    def _encode(self) -> None:
        assert self.sources is not None
        for own, new in zip(self.memory, self.task.encode(*self.sources), strict=True):
            own.copy_(new)

    def advance(self, positions: int) -> None:
        """Extend the hypotheses of all sentences by this many positions."""
        self.position = self.position or Graph(self.search.advance, self.pool)
        for _ in range(positions):
            self.position.replay()


class Lanes:
    """Lanes by their shapes, for one task. They are used by one thread at a time."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.lanes: OrderedDict[tuple[int, int], Lane] = OrderedDict()
        self.example: Memory | None = None
        """The memory of some batch, for the widths and types of its tensors."""

    def lane(self, sentences: int, positions: int) -> Lane:
        """Return the lane of this shape."""
        shape = (sentences, positions)
        if shape not in self.lanes:
            while len(self.lanes) >= _MOST_LANES:
                self.lanes.popitem(last=False)
            self.lanes[shape] = Lane(self.task, self._memory(sentences, positions), self.pool)
        self.lanes.move_to_end(shape)
        return self.lanes[shape]

    def _memory(self, sentences: int, positions: int) -> Memory:
        """Return the memory of a new lane, whose contents do not matter."""
        if self.example is None:
            source_N, rows = source_rectangle([np.zeros(1, dtype=np.int64)], 1, 2)
            device = self.task.forbidden_F.device
            self.example = self.task.encode(source_N.to(device), rows.map(lambda tensor: tensor.to(device)))
        values_SBD, keys_SBA, padding_SB, v_A = self.example
        return Memory(
            values_SBD.new_zeros(positions, sentences, values_SBD.shape[2]),
            keys_SBA.new_zeros(positions, sentences, keys_SBA.shape[2]),
            padding_SB.new_zeros(positions, sentences),
            v_A.clone(),
        )

    def begin(self, sources: Sequence[np.ndarray], rules: Rules, symbols: int = 0) -> "Run":
        """Begin the search of a batch of sources, whose work the device does while the host continues.

        `symbols` is as for `Lane.load`.
        """
        positions = rounded_length(max(map(len, sources)) + 1)
        lane = self.lane(rounded_count(len(sources)), positions)
        lane.load(sources, rules, symbols)
        # Few translations are done at half of the shortest source's length, so the host need not look before it.
        return Run(self, lane, rules.max_length_B.tolist(), max(min(map(len, sources)) // 2, _LOOK_EVERY))


class Run:
    """The search of one batch."""

    def __init__(self, lanes: Lanes, lane: Lane, lengths: list[int], before: int) -> None:
        """Begin with this many positions, while the host has time for other work."""
        self.lanes, self.lane, self.lengths = lanes, lane, lengths
        self.sentences = [*range(len(lengths)), *[-1] * (lane.sentences - len(lengths))]
        """The sentence of each column of the lane; -1 for padding."""
        self.stretches: list[Stretch] = []
        self.first = self.length = 0
        self._advance(before)

    def _advance(self, positions: int = _LOOK_EVERY) -> None:
        steps = min(positions, max(self.lengths) - self.length)
        self.lane.advance(steps)
        self.length += steps

    def finish(self) -> Callable[[], list[list[Hypothesis]]]:
        """Search until all sentences are done, and return a function that reads the results on the host."""
        while self.length < max(self.lengths):
            going_B = ~self.lane.search.beam.done_B
            num_going = int(going_B.sum())
            if not num_going:
                break
            if _SHRINK * num_going <= self.lane.sentences and self.lane.sentences > _LEAST_SENTENCES:
                self._pass_on(going_B, num_going)
            self._advance()
        self._keep()
        return lambda: best_of(self.stretches, self.lengths, self.lanes.task.settings)

    def _keep(self) -> None:
        """Copy the record of this lane to the host."""
        record = self.lane.search.record.part(self.first, self.length).on_host()
        self.stretches.append(Stretch(self.sentences, record))
        self.first = self.length

    def _pass_on(self, going_B: Tensor, num_going: int) -> None:
        """Continue the sentences that are not done in a smaller lane, whose other columns are done."""
        self._keep()
        size = self.lane.sentences
        while _SHRINK * num_going <= size > _LEAST_SENTENCES:
            size //= _SHRINK
        smaller = self.lanes.lane(max(size, 1), self.lane.positions)
        # Sentences that are done fill the rest.
        chosen_B = going_B.int().argsort(descending=True, stable=True)[: smaller.sentences]
        smaller.search.continue_(self.lane.search, chosen_B)
        self.sentences = [self.sentences[column] for column in chosen_B.tolist()]
        self.lane = smaller
