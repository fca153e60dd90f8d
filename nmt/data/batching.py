"""Divide the training pairs into steps of micro-batches, and stream these to training.

The pairs of an epoch are a pure function of its number (`TrainingText`). Their order is one of (lengths, settings,
seed, epoch). Neither depends on the number of GPUs, and two numbers, epoch and step, are enough to resume a run; where
batches are fitted, with the shape of the epoch.
"""

import heapq
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from types import TracebackType
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from nmt.batch import Batch, Shape, covering, fit, make_flat_batch, sentences_at_positions
from nmt.config import TrainingConfig

QUEUE_STEPS = 4  # steps prepared ahead of training
_ORDER = 3
"""Version of the order that `plan_epoch` defines. A checkpoint without this number has version 1."""
_POLL_SECONDS = 0.2
# Mean share of `batch_tokens` that the first plan fills, on the longer side.
_FILL = 0.985
# The next epoch is planned after this share of an epoch. Drawing its subwords anew may take most of the rest.
_PLAN_AT = 0.25

Step = list[np.ndarray]
"""One step: the pair numbers of each of its micro-batches."""


class Plan(Sequence[Step]):
    """The steps of an epoch, in two arrays: a plan of millions of pairs is made of few objects."""

    def __init__(self, pairs_N: np.ndarray, ends_C: np.ndarray, micro_batches: int) -> None:
        """Take the pairs (int32) of all micro-batches in order, where each ends, and the micro-batches per step."""
        self._pairs_N, self._ends_C, self._micro_batches = pairs_N, ends_C, micro_batches

    def __len__(self) -> int:
        return len(self._ends_C) // self._micro_batches

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        first = index % len(self) * self._micro_batches
        ends = self._ends_C[first : first + self._micro_batches].tolist()
        start = int(self._ends_C[first - 1]) if first else 0
        return [self._pairs_N[begin:end] for begin, end in pairwise((start, *ends))]


class EpochText(Protocol):
    """The pairs of one epoch, as arrays of subword ids without BOS and EOS. A pair may be there several times."""

    source_lengths: np.ndarray
    target_lengths: np.ndarray

    def gather(self, side: str, pairs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (concatenated subword ids of these pairs, their lengths), int64; `side` is "source" or "target"."""

    def teacher(self, pairs_B: np.ndarray) -> np.ndarray | None:
        """Return a teacher's rows (`nmt.data.shards.teacher_dtype`) of all target positions of these pairs, with EOS.

        None: no pair of any epoch has some. Otherwise pairs without have rows of zeros.
        """


class TrainingText(Protocol):
    """The training text: a pure function from the number of an epoch to its pairs."""

    def epoch(self, number: int) -> EpochText:
        """Return the pairs of an epoch, the same at every call."""


def plan_epoch(source_lengths: np.ndarray, target_lengths: np.ndarray, training: TrainingConfig, epoch: int) -> Plan:
    """Return the steps of one epoch, each of exactly `micro_batches` micro-batches; every pair occurs exactly once.

    Each micro-batch is a sample of the whole corpus, with the same mixture of lengths as any other. A step over
    sentences of one length would follow the gradient of that length alone, however many tokens it has. The pairs are
    sorted by shape and cut into strata of neighbours, one pair per micro-batch, and dealt out at random. So all
    micro-batches have nearly the same shape, which a recorded step needs, and keep all processes busy equally long.

    A micro-batch has at most `batch_tokens` tokens per side, EOS included; a longer pair is one by itself. Some have
    more if there are hardly more pairs than micro-batches. ValueError if there are too few pairs for one step.
    """
    num_pairs, micro_batches = len(source_lengths), training.micro_batches
    if num_pairs < micro_batches:
        raise ValueError(
            f"training.micro_batches={micro_batches} is more than the number of training pairs, {num_pairs}: lower it"
        )
    tokens_2N = np.stack([source_lengths, target_lengths]).astype(np.int32, copy=False) + np.int32(1)
    needed = int(tokens_2N.sum(1, dtype=np.int64).max() / (_FILL * training.batch_tokens)) + 1
    largest = num_pairs // micro_batches * micro_batches
    generator = np.random.default_rng((training.seed, epoch))
    shuffled = generator.permutation(np.arange(num_pairs, dtype=np.int32))
    while True:
        count = min(-(-needed // micro_batches) * micro_batches, largest)
        order = _by_shape(source_lengths, target_lengths, num_pairs / count, shuffled)
        batch_N = _dealt(num_pairs, count, generator)
        if _evened(batch_N, tokens_2N[:, order], count, training.batch_tokens) or count == largest:
            break
        needed = count + max(1, count // 64)
    del tokens_2N
    batch_of_pair_N = np.empty_like(batch_N)
    batch_of_pair_N[order] = batch_N
    ends_C = np.cumsum(np.bincount(batch_N, minlength=count))
    # Within a batch, ascending pair numbers make reads of the files sequential.
    return Plan(_sorted_by(batch_of_pair_N).astype(np.int32), ends_C, micro_batches)


def _dealt(num_pairs: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return the batch (0 to count - 1) of each pair in order of shape: each stratum of `count` pairs is dealt out.

    The first stratum, of the shortest pairs, may have fewer.
    """
    strata = -(-num_pairs // count)
    batch_SC = generator.permuted(np.tile(np.arange(count, dtype=np.int32), (strata, 1)), axis=1)
    return batch_SC.flatten()[strata * count - num_pairs :]


def _evened(batch_N: np.ndarray, tokens_2N: np.ndarray, count: int, most: int) -> bool:
    """Move the shortest pairs of batches with more than `most` tokens to the emptiest ones, in place.

    Return False if they do not fit there.
    """
    fill_2C = np.stack([np.bincount(batch_N, tokens_N, count) for tokens_N in tokens_2N])
    too_full_C = fill_2C.max(0) > most
    in_full = np.flatnonzero(too_full_C[batch_N])
    longest_N = tokens_2N.max(0)
    # Members of these batches, by falling length.
    by_batch = in_full[np.lexsort((-longest_N[in_full], batch_N[in_full]))]
    full = np.flatnonzero(too_full_C)
    ends = np.searchsorted(batch_N[by_batch], full, side="right")
    moved = []
    for place, batch in enumerate(full):
        members = by_batch[ends[place - 1] if place else 0 : ends[place]]
        fits = np.cumsum(tokens_2N[:, members], axis=1).max(0) <= most
        fits[0] = True  # a pair that is too long by itself
        moved.append(members[~fits])
        fill_2C[:, batch] = tokens_2N[:, members[fits]].sum(1)
    if not moved:
        return True
    emptiest: list[tuple[float, int]] = [(fill, batch) for batch, fill in enumerate(fill_2C.max(0).tolist())]
    heapq.heapify(emptiest)
    pairs = np.concatenate(moved)
    for pair in pairs[np.argsort(-longest_N[pairs], kind="stable")]:
        _, emptier = emptiest[0]
        fill_2C[:, emptier] += tokens_2N[:, pair]
        fill = float(fill_2C[:, emptier].max())
        if fill > most:
            return False
        batch_N[pair] = emptier
        heapq.heapreplace(emptiest, (fill, emptier))
    return True


def _by_shape(
    source_lengths: np.ndarray, target_lengths: np.ndarray, strata: float, shuffled: np.ndarray
) -> np.ndarray:
    """Return the pairs in an order in which neighbours have similar lengths on both sides.

    Pairs are sorted by target length and cut into rows of equal numbers of pairs. Each row is sorted by source length,
    alternately ascending and descending, so that the source length does not jump between rows. With sqrt(strata) rows,
    source and target lengths vary about equally within a stratum. Pairs of equal shape keep the order of `shuffled`.
    """
    order = shuffled[_sorted_by(target_lengths[shuffled])]
    for row, places in enumerate(np.array_split(np.arange(len(order)), max(1, round(strata**0.5)))):
        source = source_lengths[order[places]]
        upward = source if row % 2 == 0 else source.max(initial=0) - source
        order[places] = order[places][_sorted_by(upward)]
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


def common_shape(steps: Sequence[Step], source_lengths: np.ndarray, target_lengths: np.ndarray) -> Shape:
    """Return the smallest shape that holds every micro-batch of a plan."""
    most = 0
    sides: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * 2
    for pairs_B in chain.from_iterable(steps):
        most = max(most, len(pairs_B))
        for side, lengths in enumerate((source_lengths, target_lengths)):
            alive_L = sentences_at_positions(lengths[pairs_B] + 1)
            longer, shorter = sorted((sides[side], alive_L), key=len, reverse=True)
            longer[: len(shorter)] = np.maximum(longer[: len(shorter)], shorter)
            sides[side] = longer
    return Shape(most, *(tuple(alive_L.tolist()) for alive_L in sides))


def _with_room(shape: Shape, before: Shape | None) -> Shape:
    """Return a shape that holds `shape`, with room for one sentence more at each position; `before` if that holds it.

    Of eight epochs of Europarl, three then had a shape of their own. Padding was 3 to 4 rows in a hundred.
    """
    if before is None:
        return shape.with_room(1)
    return before if before.holds(shape) else covering(shape, before).with_room(1)


class _Position(NamedTuple):
    """A place in the data: what a run needs to resume there."""

    epoch: int = 0
    step: int = 0
    shape: Shape | None = None
    """Shape of the epoch's fitted batches; None: it is computed when the epoch is planned."""


class _Ready(NamedTuple):
    """Item of the background thread's queue: a step and the position after it, or an error."""

    micro_batches: list[Batch]
    position: _Position
    error: BaseException | None = None


class BatchStream:
    """Endless iterator over the steps of all epochs; a step is a list of micro-batches.

    With `fitted`, all batches of an epoch have one shape, which only an epoch with larger batches changes.

    A thread prepares steps ahead. With `num_ranks` processes, process `rank` gets every num_ranks-th micro-batch of a
    step. Close the stream, or use it as a context manager. Otherwise its thread ends when the stream is
    garbage-collected.
    """

    def __init__(
        self,
        text: TrainingText,
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
        self._text, self._config, self._pin_memory, self._fitted = text, config, pin_memory, fitted
        self._share = slice(rank, None, num_ranks)
        self._position = _Position()
        self._stop: weakref.finalize[[threading.Thread, threading.Event], BatchStream] | None = None
        self._queue: queue.Queue[_Ready] = queue.Queue()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the step that the next call of `next` returns; steps prepared ahead do not count."""
        epoch, step, shape = self._position
        return {"order": _ORDER, "epoch": epoch, "step": step} | (shape._asdict() if shape else {})

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue from the position `state`, and return True.

        If `state` is a position in the order of another version, continue with its next epoch, and return False.
        """
        self.close()
        if state.get("order", 1) != _ORDER:
            self._position = _Position(state["epoch"] + 1)
            return False
        shape = None
        if self._fitted and "sentences" in state:
            shape = Shape(state["sentences"], tuple(state["source"]), tuple(state["target"]))
        self._position = _Position(state["epoch"], state["step"], shape)
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
        self._position = ready.position
        return ready.micro_batches

    def _start(self) -> None:
        self._queue = queue.Queue(QUEUE_STEPS)
        stopped = threading.Event()
        # The thread must not reference the stream, or the stream would never be garbage-collected.
        arguments = (self._text, self._config, self._share, self._pin_memory, self._fitted, self._position)
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
    text: TrainingText,
    config: TrainingConfig,
    share: slice,
    pin_memory: bool,
    fitted: bool,
    position: _Position,
    out: "queue.Queue[_Ready]",
    stopped: threading.Event,
) -> None:
    """Prepare steps until `stopped` is set; runs in the background thread."""
    try:
        for micro_batches, after in _steps(text, config, share, fitted, position):
            if pin_memory:
                micro_batches = [batch.pin_memory() for batch in micro_batches]
            if not _put(out, _Ready(micro_batches, after), stopped):
                return
    except BaseException as error:
        _put(out, _Ready([], position, error), stopped)


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
    text: TrainingText, config: TrainingConfig, share: slice, fitted: bool, position: _Position
) -> Iterator[tuple[list[Batch], _Position]]:
    """Yield (step, position after it), starting at the given position."""
    planner = ThreadPoolExecutor(1, thread_name_prefix="BatchStream-planner")

    def plan(epoch: int) -> tuple[EpochText, Plan, Shape | None]:
        pairs = text.epoch(epoch)
        lengths = pairs.source_lengths, pairs.target_lengths
        steps = plan_epoch(*lengths, config, epoch)
        return pairs, steps, common_shape(steps, *lengths) if fitted else None

    epoch, step, shape = position
    try:
        coming = planner.submit(plan, epoch)
        while True:
            pairs, steps, needed = coming.result()
            if step >= len(steps):
                raise ValueError(f"no step {step} in epoch {epoch}, which has {len(steps)}: the data has changed")
            shape = _with_room(needed, shape) if needed else None
            for index in range(step, len(steps)):
                if index == max(step, int(_PLAN_AT * len(steps))):
                    # Planning millions of pairs takes seconds, for which training would otherwise wait.
                    coming = planner.submit(plan, epoch + 1)
                ended = index + 1 == len(steps)
                batches = [_batch(pairs, pairs_B) for pairs_B in steps[index][share]]
                after = _Position(epoch + ended, 0 if ended else index + 1, shape)
                yield [fit(batch, shape) for batch in batches] if shape else batches, after
            epoch, step = epoch + 1, 0
    finally:
        planner.shutdown(wait=False, cancel_futures=True)


def _batch(pairs: EpochText, pairs_B: np.ndarray) -> Batch:
    sides = (*pairs.gather("source", pairs_B), *pairs.gather("target", pairs_B))
    return make_flat_batch(pairs_B, *sides, pairs.teacher(pairs_B))
