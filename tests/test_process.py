"""A signal to end is an exception, so that whoever made something temporary cleans up."""

import os
import signal
import threading

import pytest

from nmt.errors import Ended, exit_status
from nmt.process import ended_by_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_is_an_exception_with_its_status(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def wait() -> None:
        with ended_by_signals():
            os.kill(os.getpid(), number)
            signal.pause()

    with pytest.raises(Ended, match=f"ended by {number.name}") as caught:
        wait()
    assert exit_status(caught.value) == 128 + number
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone() -> None:
    found: list[object] = []

    def enter() -> None:
        with ended_by_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
