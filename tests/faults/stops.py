"""SIGTERM, SIGINT and SIGHUP: the update is finished and saved, all processes stop after the same one."""

import signal

from nmt.checkpoint import list_checkpoints
from tests.faults.box import NMT, TORCHRUN, Box, Process, lines, newest_step, status


def _stopped(box: Box, run: str, process: Process, expected: tuple[int, ...], signal_name: str) -> bool:
    """Whether a run stopped as it should: status, last line logged = saved, RUN_STATUS.json, one line."""
    path = box.run(run)
    step, told = newest_step(path), status(path)
    logged = lines(path)[-1]["step"] if lines(path) else 0
    code = 128 + getattr(signal, signal_name)
    return (
        process.popen.returncode in expected
        and step == logged > 0
        and (told.get("state"), told.get("code"), told.get("step")) == ("stopped", code, step)
        and f"stopped by {signal_name} at step {step}" in process.errors()
        # PyTorch's own program ends with one, whatever it was told.
        and ("Traceback" not in process.errors() or "SignalException" in process.tail())
    )


def _one(box: Box, run: str, fault: dict[str, object], signal_name: str = "SIGTERM") -> None:
    process = box.train(run, faults=[fault | {"do": "signal", "signals": [signal_name]}])
    code = 128 + getattr(signal, signal_name)
    stopped = _stopped(box, run, process, (code,), signal_name) and bool(process.happened(str(fault["kind"])))
    if box.fault(stopped, f"{run}: did not stop and save", process):
        box.finish(run)


def signals_one(box: Box) -> None:
    """SIGTERM, SIGINT or SIGHUP to a single process: in an update, a save, a validation"""
    step = box.random.randint(2, box.shared.steps - 2)
    _one(box, "in-update", {"kind": "in_step", "step": step})
    if box.quick:
        return
    _one(box, "in-save", {"kind": "in_save", "number": 9})
    _one(box, "in-validation", {"kind": "in_validation"})
    _one(box, "interrupted", {"kind": "in_step", "step": 7}, "SIGINT")
    _one(box, "hung-up", {"kind": "in_step", "step": 7}, "SIGHUP")


def signals_early_and_twice(box: Box) -> None:
    """SIGTERM before the first update, and twice at once"""
    process = box.train("early", faults=[{"kind": "before_first_step", "do": "signal", "signals": ["SIGTERM"]}])
    stopped = _stopped(box, "early", process, (143,), "SIGTERM") and newest_step(box.run("early")) == 1
    if box.fault(stopped, "did not stop after the first update", process):
        box.finish("early")
    for run, fault in (
        ("twice", {"kind": "in_step", "step": 13}),
        ("twice-in-save", {"kind": "in_save", "number": 9}),
    ):
        process = box.train(run, faults=[fault | {"do": "signal", "signals": ["SIGTERM", "SIGTERM"], "pause": 0.02}])
        found = list_checkpoints(box.run(run) / "checkpoints")
        whole = process.popen.returncode in (-15, 143) and all(each.verify() is None for each in found)
        if box.fault(whole, f"{run}: status {process.popen.returncode}, or half a checkpoint", process):
            box.finish(run)


def signals_two(box: Box) -> None:
    """SIGTERM to nmt train --processes 2, to torchrun, to one of two processes"""
    ways = [("worker", NMT, {}), ("launcher", NMT, {"to": "parent"}), ("by-torchrun", TORCHRUN, {"to": "parent"})]
    for run, program, target in ways[:1] if box.quick else ways:
        several = ["--processes", "2"] if program is NMT else []
        step = box.random.randint(2, box.shared.steps - 2)
        faults = [{"kind": "in_step", "step": step, "rank": 1, "do": "signal", "signals": ["SIGTERM"], **target}]
        process = box.command([*program, "train", *several, *box.settings(run)], faults)
        process.wait()
        # torchrun itself knows no status but 1.
        expected = (143,) if program is NMT else (1,)
        if box.fault(_stopped(box, run, process, expected, "SIGTERM"), f"{run}: not stopped together", process):
            box.finish(run, processes=2)


CASES = (signals_two, signals_one, signals_early_and_twice)
LONG = (signals_early_and_twice,)
