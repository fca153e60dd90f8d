"""Searches of fixed shapes, whose work is recorded once and replayed (`nmt.model.graph`).

Launching the hundred kernels of a position takes the host ten times as long as a GPU needs to run them. A lane is a
search for B sentences of up to S source positions. Encoding a batch, and each position of the search, are one launch.
Shapes are rounded up to few sizes; sentences of padding are done from the start. A lane that has lost half of its
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

from nmt.batch import Rows, fit_source, source_batch
from nmt.decoding.rules import Rules
from nmt.decoding.search import BeamSettings, Choose, Search, SearchState, Step, best_of
from nmt.decoding.trace import Hypothesis, Stretch
from nmt.model.attention import Memory
from nmt.model.graph import Graph

# Positions between two looks at which sentences are done: each look waits for the GPU.
_LOOK_EVERY = 4
# A lane of fewer sentences takes hardly less time per position.
_LEAST_SENTENCES = 32
# Lanes that are kept. Each has tensors for its sentences, and shares the memory of its work with the others.
_MOST_LANES = 32


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
    longest: Callable[[int], int]
    """Returns the greatest length of any translation of a source of this many subwords, with its end."""


def wanted_sources(rows: Rows) -> Tensor:
    """Return wanted_BS: the coverage penalty is for the source's subwords only, not for its end of sentence."""
    position_S1 = torch.arange(rows.num_positions, device=rows.length_B.device)[:, None]
    return (position_S1 < rows.length_B - 1).T


def rounded_length(length: int) -> int:
    """Return the source positions of the lane for sentences of this many: a few more, for few different lanes."""
    unit = 8 if length <= 64 else 32 if length <= 256 else 128
    return -(-length // unit) * unit


def rounded_count(sentences: int) -> int:
    """Return the sentences of the lane for this many: the next power of two."""
    return 1 << (sentences - 1).bit_length()


class Lane:
    """A recorded search for up to `sentences` of up to `positions` source subwords, with the end of sentence."""

    def __init__(self, task: Task, sentences: int, positions: int, pool: Any) -> None:
        """Allocate the tensors of the search, and do all of its work once, which compiles kernels."""
        self.task, self.sentences, self.positions, self.pool = task, sentences, positions, pool
        device = task.forbidden_F.device
        self.source_N, rows = self._fitted([np.zeros(1, dtype=np.int64)])
        self.source_N = self.source_N.to(device)
        self.rows = rows.map(lambda tensor: tensor.to(device))
        self.memory = task.encode(self.source_N, self.rows)
        shortest_B = torch.ones(sentences, dtype=torch.int64, device=device)
        self.search = Search.begin(
            task.step,
            task.start(self.memory, sentences),
            wanted_BS=torch.zeros(sentences, positions, dtype=torch.bool, device=device),
            rules=Rules(shortest_B, shortest_B.clone(), task.forbidden_F),
            settings=task.settings,
            choose=task.choose,
            most=task.longest(positions - 1),
        )
        self.encoding: Graph[None] | None = None
        self.position: Graph[None] | None = None
        self.search.advance()

    def _fitted(self, sources: Sequence[np.ndarray]) -> tuple[Tensor, Rows]:
        return fit_source(*source_batch(sources), self.sentences, self.positions)

    def load(self, sources: Sequence[np.ndarray], rules: Rules) -> None:
        """Begin the search of a batch. The rules are on the host, and the same subwords are forbidden everywhere."""
        source_N, rows = self._fitted(sources)
        self.source_N.copy_(source_N, non_blocking=True)
        self.rows.copy_(rows)
        self.search.wanted_BS.copy_(wanted_sources(rows), non_blocking=True)
        own, missing = self.search.rules, self.sentences - len(sources)
        own.min_length_B.copy_(F.pad(rules.min_length_B, (0, missing), value=1), non_blocking=True)
        own.max_length_B.copy_(F.pad(rules.max_length_B, (0, missing), value=1), non_blocking=True)
        self.search.restart(torch.arange(self.sentences, device=self.source_N.device) >= len(sources))
        self.encoding = self.encoding or Graph(self._encode, self.pool)
        self.encoding.replay()

    def _encode(self) -> None:
        for own, new in zip(self.memory, self.task.encode(self.source_N, self.rows), strict=True):
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

    def lane(self, sentences: int, positions: int) -> Lane:
        """Return the lane of this shape."""
        shape = (sentences, positions)
        if shape not in self.lanes:
            while len(self.lanes) >= _MOST_LANES:
                self.lanes.popitem(last=False)
            self.lanes[shape] = Lane(self.task, sentences, positions, self.pool)
        self.lanes.move_to_end(shape)
        return self.lanes[shape]

    def begin(self, sources: Sequence[np.ndarray], rules: Rules) -> "Run":
        """Begin the search of a batch of sources, whose work the device does while the host continues."""
        positions = rounded_length(max(map(len, sources)) + 1)
        lane = self.lane(rounded_count(len(sources)), positions)
        lane.load(sources, rules)
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
            if 2 * num_going <= self.lane.sentences and self.lane.sentences > _LEAST_SENTENCES:
                self._pass_on(going_B)
            self._advance()
        self._keep()
        return lambda: best_of(self.stretches, self.lengths, self.lanes.task.settings)

    def _keep(self) -> None:
        """Copy the record of this lane to the host."""
        record = self.lane.search.record.part(self.first, self.length).on_host()
        self.stretches.append(Stretch(self.sentences, record))
        self.first = self.length

    def _pass_on(self, going_B: Tensor) -> None:
        """Continue the sentences that are not done in a smaller lane, whose other columns are done."""
        self._keep()
        half = self.lanes.lane(self.lane.sentences // 2, self.lane.positions)
        while 2 * int(going_B.sum()) <= half.sentences > _LEAST_SENTENCES:
            half = self.lanes.lane(half.sentences // 2, half.positions)
        # Sentences that are done fill the rest.
        chosen_B = going_B.int().argsort(descending=True, stable=True)[: half.sentences]
        half.search.continue_(self.lane.search, chosen_B)
        self.sentences = [self.sentences[column] for column in chosen_B.tolist()]
        self.lane = half
