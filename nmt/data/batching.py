"""Divide the training pairs into steps of micro-batches, and stream these to training.

The order of the data is a pure function of (lengths, settings, seed, epoch). It does not depend on the number of GPUs,
and two numbers, epoch and step, are enough to resume a run.
"""

import heapq
import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from types import TracebackType
from typing import NamedTuple

import numpy as np

from nmt.batch import Batch, Shape, fit, make_flat_batch
from nmt.config import TrainingConfig
from nmt.data.shards import ParallelShards

QUEUE_STEPS = 4  # steps prepared ahead of training
_ORDER = 2
"""Version of the order that `plan_epoch` defines. A checkpoint without this number has version 1."""
_POLL_SECONDS = 0.2
# The next epoch is planned after this share of an epoch.
_PLAN_AT = 0.75

Step = list[list[np.ndarray]]
"""One step: its micro-batches; each is a list of bands of similar lengths; each band is an array of pair numbers.

The sentences of all bands of a micro-batch form one `Batch`.
"""


def plan_epoch(
    source_lengths: np.ndarray, target_lengths: np.ndarray, training: TrainingConfig, epoch: int
) -> list[Step]:
    """Return the steps of one epoch, each of exactly `micro_batches` micro-batches; every pair occurs exactly once.

    A step mixes lengths. With a single length, it would follow the gradient of that length alone, however many tokens
    it has. The function works in three stages:

    1. It sorts the pairs by shape and cuts them into batches of similar lengths, to keep padding low. A batch has at
       most batch_tokens / bands positions per side, padding and EOS included. A longer pair is a batch by itself.
    2. It puts `alike` neighbouring batches into a group, and divides the groups into equal strata: one stratum per
       group of a step.
    3. A step takes one random group from every stratum. Each band of a micro-batch comes from a different range of
       strata, so that a micro-batch mixes lengths too.

    ValueError if there are too few pairs for one step, or if the batches cannot be divided into whole steps.
    """
    num_pairs, micro_batches = len(source_lengths), training.micro_batches
    num_batches = micro_batches * training.bands
    if num_pairs < num_batches:
        raise ValueError(
            f"training.micro_batches={micro_batches} x training.bands={training.bands} is more than the number of "
            f"training pairs, {num_pairs}: lower either of them"
        )
    budget = max(1, training.batch_tokens // training.bands)
    generator = np.random.default_rng((training.seed, epoch))
    shuffled = generator.permutation(np.arange(num_pairs, dtype=np.int32))
    order = _by_shape(source_lengths, target_lengths, budget, shuffled)
    longest = np.maximum(source_lengths, target_lengths) + 1
    batches = _even_out(cut_batches(order, longest, budget), num_batches)
    if len(batches) % num_batches:
        raise ValueError(
            f"{num_pairs} training pairs do not divide into steps of training.micro_batches={micro_batches} and "
            f"training.bands={training.bands} with training.batch_tokens={training.batch_tokens}: lower the first two "
            "or raise the last"
        )
    # Ascending pair numbers make reads of the files sequential.
    batches = [np.sort(batch) for batch in batches]
    return _mixed(batches, training, generator)


def _mixed(batches: list[np.ndarray], training: TrainingConfig, generator: np.random.Generator) -> list[Step]:
    """Return the steps, given batches in order of shape. Their number is a multiple of the batches per step."""
    alike, bands = training.alike, training.bands
    turns = training.micro_batches // alike  # in each turn, `alike` processes work on similar micro-batches
    num_steps = len(batches) // (training.micro_batches * bands)
    # group_SX[s, x]: number of the group that step s takes from stratum x.
    group_SX = np.stack([x * num_steps + generator.permutation(num_steps) for x in range(turns * bands)], axis=1)
    steps = []
    for group_X in group_SX:
        # Band b of a turn comes from one of the strata b * turns to (b + 1) * turns - 1.
        group_BT = generator.permuted(group_X.reshape(bands, turns), axis=1)
        steps.append(
            [
                [batches[group * alike + place] for group in group_BT[:, turn]]
                for turn in range(turns)
                for place in range(alike)
            ]
        )
    return steps


def _by_shape(
    source_lengths: np.ndarray, target_lengths: np.ndarray, batch_tokens: int, shuffled: np.ndarray
) -> np.ndarray:
    """Return the pairs in an order in which neighbours have similar lengths on both sides.

    Pairs are sorted by target length and cut into rows of equal numbers of tokens. Each row is sorted by source length,
    alternately ascending and descending, so that the source length does not jump between rows. With about
    1.4 sqrt(batches) rows, source and target lengths vary about equally within a batch. Pairs of equal shape keep the
    order of `shuffled`.
    """
    order = shuffled[_sorted_by(target_lengths[shuffled])]
    tokens = np.cumsum(np.maximum(source_lengths[order], target_lengths[order]) + 1, dtype=np.int64)
    num_rows = max(1, round(1.4 * (tokens[-1] / batch_tokens) ** 0.5))
    # The last token of a pair decides its row.
    ends = np.searchsorted(tokens, -(-tokens[-1] * np.arange(num_rows + 1) // num_rows), side="right")
    for row, (start, end) in enumerate(pairwise(ends)):
        source = source_lengths[order[start:end]]
        upward = source if row % 2 == 0 else source.max(initial=0) - source
        order[start:end] = order[start:end][_sorted_by(upward)]
    return order


def _sorted_by(lengths: np.ndarray) -> np.ndarray:
    """Return a stable argsort. For 16-bit numbers, NumPy sorts in linear time."""
    short = lengths.max(initial=0) < 1 << 16
    return np.argsort(lengths.astype(np.uint16) if short else lengths, kind="stable")


def cut_batches(order: np.ndarray, longest: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut `order` into batches, each as large as `batch_tokens` allows. `longest`: longer side of a pair, with EOS."""
    batches, start = [], 0
    while start < len(order):
        first = longest[order[start]]
        window = order[start : start + max(1, int(batch_tokens // first))]
        positions = np.maximum.accumulate(longest[window]) * np.arange(1, len(window) + 1)
        size = max(1, int(np.searchsorted(positions, batch_tokens, side="right")))
        batches.append(window[:size])
        start += size
    return batches


def _even_out(batches: list[np.ndarray], micro_batches: int) -> list[np.ndarray]:
    """Halve the largest batches until `micro_batches` divides their number, or until none can be halved."""
    # (-sentences, batch, first sentence, end): the largest batch comes first; among equals, the lowest number.
    parts = [(-len(batch), number, 0, len(batch)) for number, batch in enumerate(batches)]
    heapq.heapify(parts)
    while len(parts) % micro_batches and parts[0][0] < -1:
        _, number, first, end = heapq.heappop(parts)
        middle = first + (end - first) // 2
        heapq.heappush(parts, (first - middle, number, first, middle))
        heapq.heappush(parts, (middle - end, number, middle, end))
    return [batches[number][first:end] for _, number, first, end in sorted(parts, key=lambda part: part[1:])]


def common_shape(steps: list[Step], source_lengths: np.ndarray, target_lengths: np.ndarray, batch_tokens: int) -> Shape:
    """Return a shape that holds every micro-batch of a plan.

    It is rounded up, so that most epochs of a run have the same one. `training.bands` makes micro-batches alike, which
    keeps padding low.
    """
    most = np.zeros(5, dtype=np.int64)
    for bands in chain.from_iterable(steps):
        pairs_B = np.concatenate(bands)
        source_B, target_B = source_lengths[pairs_B] + 1, target_lengths[pairs_B] + 1
        sizes = len(pairs_B), source_B.max(), target_B.max(), source_B.sum(), target_B.sum()
        most = np.maximum(most, sizes)
    # Sentences and positions cost next to nothing; rows cost as much as real ones.
    rows = max(8, batch_tokens >> 7)
    return Shape(*(int(-(-size // unit) * unit) for size, unit in zip(most, (256, 32, 32, rows, rows), strict=True)))


class _Ready(NamedTuple):
    """Item of the background thread's queue: a step and the position after it, or an error."""

    micro_batches: list[Batch]
    epoch: int
    step: int
    error: BaseException | None = None


class BatchStream:
    """Endless iterator over the steps of all epochs; a step is a list of micro-batches.

    With `fitted`, all batches of an epoch have one shape.

    A thread prepares steps ahead. With `num_ranks` processes, process `rank` gets every num_ranks-th micro-batch of a
    step. Close the stream, or use it as a context manager. Otherwise its thread ends when the stream is
    garbage-collected.
    """

    def __init__(
        self,
        shards: ParallelShards,
        config: TrainingConfig,
        rank: int = 0,
        num_ranks: int = 1,
        pin_memory: bool = False,
        fitted: bool = False,
    ) -> None:
        if config.micro_batches % num_ranks:
            raise ValueError(
                f"training.micro_batches={config.micro_batches} must be a multiple of {num_ranks}, "
                "the number of processes"
            )
        self._shards, self._config, self._pin_memory, self._fitted = shards, config, pin_memory, fitted
        self._share = slice(rank, None, num_ranks)
        self._epoch = self._step = 0
        self._stop: weakref.finalize[[threading.Thread, threading.Event], BatchStream] | None = None
        self._queue: queue.Queue[_Ready] = queue.Queue()

    def state_dict(self) -> dict[str, int]:
        """Return the position of the step that the next call of `next` returns; steps prepared ahead do not count."""
        return {"order": _ORDER, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> bool:
        """Continue from the position `state`, and return True.

        If `state` is a position in the order of another version, continue with its next epoch, and return False.
        """
        self.close()
        if state.get("order", 1) != _ORDER:
            self._epoch, self._step = state["epoch"] + 1, 0
            return False
        self._epoch, self._step = state["epoch"], state["step"]
        return True

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._stop is None:
            self._start()
        ready = self._queue.get()
        if ready.error is not None:
            self.close()
            raise ready.error
        self._epoch, self._step = ready.epoch, ready.step
        return ready.micro_batches

    def _start(self) -> None:
        self._queue = queue.Queue(QUEUE_STEPS)
        stopped = threading.Event()
        # The thread must not reference the stream, or the stream would never be garbage-collected.
        arguments = (self._shards, self._config, self._share, self._pin_memory, self._fitted, self._epoch, self._step)
        thread = threading.Thread(
            target=_work, args=(*arguments, self._queue, stopped), name="BatchStream", daemon=True
        )
        self._stop = weakref.finalize(self, _end, thread, stopped)
        thread.start()

    def close(self) -> None:
        """End the thread. The position stays, and the next call of `next` starts another thread."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end(thread: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    # Garbage collection can run in any thread, including this one.
    if thread is not threading.current_thread():
        thread.join()


def _work(
    shards: ParallelShards,
    config: TrainingConfig,
    share: slice,
    pin_memory: bool,
    fitted: bool,
    epoch: int,
    step: int,
    out: "queue.Queue[_Ready]",
    stopped: threading.Event,
) -> None:
    """Prepare steps until `stopped` is set; runs in the background thread."""
    try:
        for micro_batches, next_epoch, next_step in _steps(shards, config, share, fitted, epoch, step):
            if pin_memory:
                micro_batches = [batch.pin_memory() for batch in micro_batches]
            if not _put(out, _Ready(micro_batches, next_epoch, next_step), stopped):
                return
    except BaseException as error:
        _put(out, _Ready([], epoch, step, error), stopped)


def _put(out: "queue.Queue[_Ready]", ready: _Ready, stopped: threading.Event) -> bool:
    """Put `ready` into the queue. Return False if the stream was closed first."""
    while not stopped.is_set():
        try:
            out.put(ready, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            pass
    return False


def _steps(
    shards: ParallelShards, config: TrainingConfig, share: slice, fitted: bool, epoch: int, step: int
) -> Iterator[tuple[list[Batch], int, int]]:
    """Yield (step, epoch and step number of the position after it), starting at the given position."""
    planner = ThreadPoolExecutor(1, thread_name_prefix="BatchStream-planner")

    def plan(epoch: int) -> tuple[list[Step], Shape | None]:
        lengths = shards.source_lengths, shards.target_lengths
        steps = plan_epoch(*lengths, config, epoch)
        return steps, common_shape(steps, *lengths, config.batch_tokens) if fitted else None

    def planned(epoch: int) -> "Future[tuple[list[Step], Shape | None]]":
        return planner.submit(plan, epoch)

    try:
        coming = planned(epoch)
        while True:
            steps, shape = coming.result()
            if step >= len(steps):
                raise ValueError(f"no step {step} in epoch {epoch}, which has {len(steps)}: the data has changed")
            for index in range(step, len(steps)):
                if index == max(step, int(_PLAN_AT * len(steps))):
                    # Planning millions of pairs takes seconds, for which training would otherwise wait.
                    coming = planned(epoch + 1)
                after = (epoch, index + 1) if index + 1 < len(steps) else (epoch + 1, 0)
                batches = [_batch(shards, np.concatenate(bands)) for bands in steps[index][share]]
                yield [fit(batch, shape) for batch in batches] if shape else batches, *after
            epoch, step = epoch + 1, 0
    finally:
        planner.shutdown(wait=False, cancel_futures=True)


def _batch(shards: ParallelShards, pairs_B: np.ndarray) -> Batch:
    return make_flat_batch(pairs_B, *shards.gather("source", pairs_B), *shards.gather("target", pairs_B))
