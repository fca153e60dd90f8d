"""Which pairs make up which batch, and the stream of batches that training reads.

The order of the data is a pure function of (lengths, seed, epoch): it does not depend on how many GPUs train,
and a run is resumed by two numbers, epoch and step.
"""

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import count
from types import TracebackType
from typing import NamedTuple

import numpy as np

from nmt.batch import Batch, make_batch, make_flat_batch
from nmt.config import TrainingConfig
from nmt.data.shards import ParallelShards

QUEUE_STEPS = 4  # steps made ahead
_POLL_SECONDS = 0.2
_EVAL_LENGTH = 256

# One update: its micro-batches, each an array of pair numbers.
Step = list[np.ndarray]


def plan_epoch(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    batch_tokens: int,
    micro_batches: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """Divide one epoch into steps of exactly `micro_batches` micro-batches; every pair comes exactly once.

    A micro-batch has at most `batch_tokens` positions on either side, padding and EOS included; a longer pair
    is a micro-batch of its own. The micro-batches of a step have similar shapes; the steps are shuffled.
    """
    num_pairs = len(source_lengths)
    if num_pairs < micro_batches:
        raise ValueError(
            f"training.micro_batches={micro_batches} is more than the {num_pairs} training pairs there are"
        )
    generator = np.random.default_rng((seed, epoch))
    order = _by_shape(
        np.asarray(source_lengths), np.asarray(target_lengths), batch_tokens, generator.permutation(num_pairs)
    )
    longest = np.maximum(source_lengths, target_lengths).astype(np.int64) + 1
    batches = _even_out(_cut(order, longest, batch_tokens), micro_batches)
    if len(batches) % micro_batches:
        raise ValueError(
            f"{num_pairs} training pairs do not divide into steps of training.micro_batches={micro_batches} "
            f"with training.batch_tokens={batch_tokens}: lower the first or raise the second"
        )
    # Ascending numbers read the files in their order.
    batches = [np.sort(batch) for batch in batches]
    steps = [batches[first : first + micro_batches] for first in range(0, len(batches), micro_batches)]
    return [steps[index] for index in generator.permutation(len(steps))]


def _by_shape(
    source_lengths: np.ndarray, target_lengths: np.ndarray, batch_tokens: int, shuffled: np.ndarray
) -> np.ndarray:
    """The pairs in an order in which neighbours have similar lengths on both sides.

    Sorted by target length and cut into rows of equal size, each row sorted by source length, up and down in
    turn so that no jump lies between two rows. With about 1.4 sqrt(batches) rows, a batch is about as narrow
    in one length as in the other. Pairs of equal shape stay in the order of `shuffled`.
    """
    order = shuffled[np.argsort(target_lengths[shuffled], kind="stable")]
    tokens = np.cumsum(np.maximum(source_lengths, target_lengths)[order].astype(np.int64) + 1)
    num_rows = max(1, round(1.4 * (tokens[-1] / batch_tokens) ** 0.5))
    row = (tokens - 1) * num_rows // tokens[-1]
    source = source_lengths[order].astype(np.int64)
    return order[np.lexsort((np.where(row % 2 == 0, source, -source), row))]


def _cut(order: np.ndarray, longest: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut `order` into the largest batches the budget allows; `longest`: a pair's longer side with EOS."""
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
    """Halve the batches of most sentences until their number divides, if there are sentences enough."""
    batches = list(batches)
    while len(batches) % micro_batches:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        batch = batches[largest]
        if len(batch) < 2:
            break
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


class _Ready(NamedTuple):
    """What the background thread hands over: a step and the position after it, or why there is none."""

    batches: list[Batch]
    epoch: int
    step: int
    error: BaseException | None = None


class BatchStream:
    """The steps of all epochs, without end; a step is a list of micro-batches made ahead by one thread.

    With `num_ranks` processes, the one with number `rank` gets every num_ranks-th micro-batch of a step.
    Close the stream, or use it as a context manager; a forgotten one ends its thread when it is collected.
    """

    def __init__(
        self,
        shards: ParallelShards,
        config: TrainingConfig,
        rank: int = 0,
        num_ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if config.micro_batches % num_ranks:
            raise ValueError(
                f"training.micro_batches={config.micro_batches} must be a multiple of {num_ranks}, "
                "the number of processes"
            )
        self._shards, self._config, self._pin_memory = shards, config, pin_memory
        self._share = slice(rank, None, num_ranks)
        self._epoch = self._step = 0
        self._stop: weakref.finalize | None = None
        self._queue: queue.Queue[_Ready] = queue.Queue()

    def state_dict(self) -> dict[str, int]:
        """The position of the next step, whatever was made ahead."""
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self.close()
        self._epoch, self._step = state["epoch"], state["step"]

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
        return ready.batches

    def _start(self) -> None:
        self._queue = queue.Queue(QUEUE_STEPS)
        stopped = threading.Event()
        # The thread must not know the stream, or the stream would never be collected.
        arguments = (self._shards, self._config, self._share, self._pin_memory, self._epoch, self._step)
        thread = threading.Thread(
            target=_work, args=(*arguments, self._queue, stopped), name="BatchStream", daemon=True
        )
        self._stop = weakref.finalize(self, _end, thread, stopped)
        thread.start()

    def close(self) -> None:
        """End the thread; the position stays, and the next step starts another thread."""
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
    # Collection can happen in any thread, this one included.
    if thread is not threading.current_thread():
        thread.join()


def _work(
    shards: ParallelShards,
    config: TrainingConfig,
    share: slice,
    pin_memory: bool,
    epoch: int,
    step: int,
    out: "queue.Queue[_Ready]",
    stopped: threading.Event,
) -> None:
    """The background thread: make steps until `stopped`."""
    try:
        for batches, next_epoch, next_step in _steps(shards, config, share, epoch, step):
            if pin_memory:
                batches = [batch.pin_memory() for batch in batches]
            if not _put(out, _Ready(batches, next_epoch, next_step), stopped):
                return
    except BaseException as error:
        _put(out, _Ready([], epoch, step, error), stopped)


def _put(out: "queue.Queue[_Ready]", ready: _Ready, stopped: threading.Event) -> bool:
    """Whether the queue took it before the stream was closed."""
    while not stopped.is_set():
        try:
            out.put(ready, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            pass
    return False


def _steps(
    shards: ParallelShards, config: TrainingConfig, share: slice, epoch: int, step: int
) -> Iterator[tuple[list[Batch], int, int]]:
    """Steps from a position on, each with the position after it."""
    for current in count(epoch):
        plan = plan_epoch(
            shards.source_lengths,
            shards.target_lengths,
            config.batch_tokens,
            config.micro_batches,
            config.seed,
            current,
        )
        if step >= len(plan):
            raise ValueError(f"step {step} of epoch {current} is past its end, {len(plan)}: the data has changed")
        for index in range(step, len(plan)):
            after = (current, index + 1) if index + 1 < len(plan) else (current + 1, 0)
            yield [_batch(shards, pairs) for pairs in plan[index][share]], *after
        step = 0


def _batch(shards: ParallelShards, pairs_B: np.ndarray) -> Batch:
    return make_flat_batch(pairs_B, *shards.gather("source", pairs_B), *shards.gather("target", pairs_B))


def eval_batches(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], batch_tokens: int) -> Iterator[Batch]:
    """Every pair once, in batches of similar lengths; `pairs_B` are positions in the lists.

    A batch has at most `batch_tokens` positions on either side, as in training. It also has at most 256 times as many
    pairs of a source and a target position, for attention looks at each of these: long sentences come fewer at a time.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} source sentences but {len(targets)} target sentences")
    source_lengths = np.array([len(source) for source in sources], dtype=np.int64)
    target_lengths = np.array([len(target) for target in targets], dtype=np.int64)
    order = np.lexsort((source_lengths, target_lengths))
    longest = np.maximum(source_lengths, target_lengths) + 1
    for similar_B in _cut(order, longest, batch_tokens):
        area = int((source_lengths[similar_B].max() + 1) * (target_lengths[similar_B].max() + 1))
        most = max(1, batch_tokens * _EVAL_LENGTH // area)
        for start in range(0, len(similar_B), most):
            pairs_B = similar_B[start : start + most]
            yield make_batch(pairs_B, [sources[pair] for pair in pairs_B], [targets[pair] for pair in pairs_B])
