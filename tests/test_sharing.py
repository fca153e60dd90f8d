"""Blocks and processes: the same results however the text comes and however many processes work."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmt.preparation.blocks
from nmt.corpus.pairs import Rows
from nmt.errors import DataError, ProcessError
from nmt.preparation.blocks import blocks, num_rows_of
from nmt.preparation.workers import shared_out

ROOT = Path(__file__).parents[1]


def squares(offset: int) -> Callable[[int], tuple[int, int]]:
    return lambda number: (number * number + offset, os.getpid())


def large() -> Callable[[int], bytes]:
    return lambda number: bytes([number]) * 5_000_000


def sleeping() -> Callable[[int], None]:
    return lambda _: time.sleep(60)


def refusing(_: int) -> Callable[[int], int]:
    def refuse(number: int) -> int:
        if number == 3:
            raise DataError(f"item {number} is wrong")
        return number

    return refuse


def never_made() -> Callable[[int], int]:
    raise DataError("no vocabulary")


def dying() -> Callable[[int], int]:
    def die(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return die


@pytest.mark.slow
def test_results_come_in_order_from_other_processes() -> None:
    drawn = []

    def items() -> Any:
        for number in range(40):
            drawn.append(number)
            yield number

    found = []
    for result, _process in shared_out(squares, (7,), items(), 2):
        found.append(result)
        assert len(drawn) <= len(found) + 4  # not all items are in memory
    assert found == [number * number + 7 for number in range(40)]
    assert {process for _, process in shared_out(squares, (7,), range(9), 2)} - {os.getpid()}
    # A single item, or a single process, is work for this process.
    assert list(shared_out(squares, (1,), [5], 4)) == [(26, os.getpid())]
    assert {process for _, process in shared_out(squares, (1,), range(9), 1)} == {os.getpid()}
    assert list(shared_out(squares, (1,), [], 4)) == []


@pytest.mark.slow
def test_errors_of_processes_are_raised_here() -> None:
    found = []
    with pytest.raises(DataError, match=r"^item 3 is wrong$"):
        found.extend(shared_out(refusing, (0,), range(9), 2))
    with pytest.raises(DataError, match=r"^no vocabulary$"):
        list(shared_out(never_made, (), range(9), 2))
    with pytest.raises(ProcessError, match="resume it by the same command"):
        list(shared_out(dying, (), range(9), 2))


TEXTS = st.lists(st.tuples(st.text("ab ", max_size=40), st.sampled_from(["", "bt"])), max_size=40)


@settings(max_examples=150)
@given(TEXTS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 30), st.booleans())
def test_blocks_depend_on_the_text_alone(
    texts: list[tuple[str, str]], first: int, second: int, limit: int, scored: bool
) -> None:
    def chunks(size: int) -> list[Rows]:
        found: list[Rows] = []
        for number, (text, tag) in enumerate(texts):
            if not found or found[-1].tag != tag or num_rows_of(found[-1]) == size:
                found.append(Rows({"en": [], "de": []}, [], tag, list[float]()))
            found[-1].texts["en"].append(text)
            found[-1].texts["de"].append(text[::-1])
            found[-1].domains.append(str(number % 2))
            if scored:
                found[-1] = found[-1]._replace(scores=[*found[-1].scores, float(number)])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nmt.preparation.blocks, "BLOCK_ROWS", 7)
        patch.setattr(nmt.preparation.blocks, "_BLOCK_CHARACTERS", 100)
        one, other = list(blocks(chunks(first), limit)), list(blocks(chunks(second), limit))
    assert one == other
    kept = texts[:limit] if limit else texts
    assert [(text, block.tag) for block in one for text in block.texts["en"]] == kept
    assert [text for block in one for text in block.texts["de"]] == [text[::-1] for text, _ in kept]
    assert [float(score) for block in one for score in block.scores] == [float(n) for n in range(len(kept)) if scored]
    for block in one:
        size = sum(map(len, (*block.texts["en"], *block.texts["de"])))
        assert num_rows_of(block) <= 7
        assert size <= 100 or num_rows_of(block) == 1
        assert len(block.domains) in (0, num_rows_of(block))


@pytest.mark.slow
def test_a_script_is_not_run_again_by_its_processes(tmp_path: Path) -> None:
    """It needs no `if __name__ == "__main__":`."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun')\n"
        "from nmt.preparation.workers import shared_out\n"
        "from tests.test_sharing import squares\n"
        "print([number for number, _ in shared_out(squares, (0,), range(5), 2)])\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (0, "begun\n[0, 1, 4, 9, 16]\n"), done.stderr


@pytest.mark.slow
def test_processes_end_with_the_one_that_waits_for_them() -> None:
    began = time.monotonic()
    results = shared_out(sleeping, (), range(9), 2)
    threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_results_that_nobody_takes_hold_up_nothing() -> None:
    """Processes are stopped while they send results that no buffer holds, and none is left half sent."""
    for taken in range(6):
        results: Any = shared_out(large, (), range(40), 2)
        for number in range(taken):
            assert len(next(results)) == 5_000_000, number
        began = time.monotonic()
        results.close()
        assert time.monotonic() - began < 10
