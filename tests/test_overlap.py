"""Three stages at the same time: order, overlap, bounds, and one error that ends everything."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from nmt.streams.overlap import Overlap


def run(
    source: Iterator[int], work: Callable[[int], int], write: Callable[[int], None], halt: Callable[[], None] = int
) -> None:
    with Overlap(source, write, halt) as stages:
        for item in stages:
            stages.write(work(item))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = threading.active_count(), sys.getswitchinterval()
    yield
    assert (threading.active_count(), sys.getswitchinterval()) == before


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_every_item_is_written_once_and_in_order(count: int) -> None:
    written: list[int] = []
    run(iter(range(count)), lambda item: 10 * item, written.append)
    assert written == [10 * item for item in range(count)]


def test_the_three_stages_run_at_the_same_time() -> None:
    """Each stage waits until all three are at work on different items. In turn they would wait for ever."""
    together = threading.Barrier(3, timeout=20)

    def source() -> Iterator[int]:
        for item in range(5):
            if item == 2:
                together.wait()
            yield item

    def work(item: int) -> int:
        if item == 1:
            together.wait()
        return item

    def write(item: int) -> None:
        if item == 0:
            together.wait()
        written.append(item)

    written: list[int] = []
    run(source(), work, write)
    assert written == list(range(5))


def test_few_items_exist_at_any_time() -> None:
    made = written = most = 0
    lock = threading.Lock()

    def source() -> Iterator[int]:
        nonlocal made, most
        for item in range(300):
            with lock:
                made += 1
                most = max(most, made - written)
            yield item

    def write(_item: int) -> None:
        nonlocal written
        with lock:
            written += 1

    run(source(), lambda item: item, write)
    assert written == 300
    assert most <= 8


def test_an_error_of_the_source_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield from range(7)
        raise LookupError("line 8")

    written: list[int] = []
    with pytest.raises(LookupError, match="line 8"):
        run(source(), lambda item: item, written.append)
    assert written == list(range(7))


def test_an_error_of_the_work_ends_both_threads() -> None:
    halted = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        assert halted.wait(20)  # like a pipe without more lines

    def work(_item: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source(), work, lambda _item: None, halted.set)
    assert halted.is_set()


def test_an_error_of_writing_is_raised_once_and_during_long_work() -> None:
    failed = threading.Event()

    def write(_item: int) -> None:
        failed.set()
        raise BrokenPipeError

    def work_without_end() -> None:
        with Overlap(iter(range(99)), write, int) as stages:
            for item in stages:
                stages.write(item)
                assert failed.wait(20)
                while True:
                    stages.check()

    with pytest.raises(BrokenPipeError):
        work_without_end()


def test_an_error_of_writing_the_last_item_is_not_lost() -> None:
    def write(item: int) -> None:
        if item == 4:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run(iter(range(5)), lambda item: item, write)
