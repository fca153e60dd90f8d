"""One of two processes fails: none is left over, the status tells it, and the same command goes on."""

import re
import time

from tests.faults.box import Box, status


def _fails(box: Box, run: str, fault: dict[str, object], waited_for: bool = False) -> None:
    """`waited_for`: the other one learns of it by waiting in vain. On GPUs it has no other way."""
    longest = box.shared.timeout_seconds + box.shared.patience_seconds
    seconds = longest if waited_for or box.shared.gpus else box.shared.patience_seconds
    step = box.random.randint(3, box.shared.steps - 2)
    rank = fault.pop("rank", 1)
    process = box.start(run, processes=2, faults=[{"kind": "in_step", "step": step, "rank": rank, **fault}])
    if not process.wait_until(lambda: bool(process.happened("in_step"))):
        box.fault(False, f"{run}: the fault did not happen", process)
        return
    happened = time.monotonic()
    code = process.wait(longest)
    took = time.monotonic() - happened
    told = status(box.run(run))
    kept = code not in (0, 143) and told.get("state") == "failed" and told.get("code") == code
    # Only what a process raised itself, which is a bug and not a mistake, may show where. Else the other one says that
    # it was lost, at this step or in the save of an earlier one.
    kept = kept and ("Traceback" not in process.errors() or fault["do"] == "raise") and took <= seconds
    message = process.errors() + str(told.get("message"))
    if fault["do"] == "raise":
        kept = kept and f"rank {rank} of 2, at step {step}" in message
    else:
        last = re.search(rf"rank {1 - int(str(rank))} of 2 lost another (?:at|while saving) step (\d+)", message)
        kept = kept and last is not None and step - 5 <= int(last[1]) <= step
    what = f"{run} at step {step}: status {code}, RUN_STATUS {told.get('state')} {told.get('code')}, {took:.0f} s"
    if box.fault(kept, what, process):
        box.finish(run, processes=2)
    box.tally.notes.append(f"{fault['do']} {took:.1f} s")


def rank_hangs(box: Box) -> None:
    """one of two processes sleeps for ever: all gone within the timeout and 15 s"""
    _fails(box, "asleep", {"do": "sleep"}, waited_for=True)


def rank_killed(box: Box) -> None:
    """one of two processes is killed"""
    _fails(box, "killed", {"do": "signal", "signals": ["SIGKILL"]})
    _fails(box, "main-killed", {"do": "signal", "signals": ["SIGKILL"], "rank": 0})


def rank_raises(box: Box) -> None:
    """one of two processes raises"""
    _fails(box, "raises", {"do": "raise"})
    _fails(box, "main-raises", {"do": "raise", "rank": 0})


def rank_exits(box: Box) -> None:
    """one of two processes exits with 0"""
    _fails(box, "exits", {"do": "exit"})


def several_runs(box: Box) -> None:
    """the same command twice gives the same bits, in one process and in two"""
    for processes in (1,) if box.quick else (1, 2):
        # The clock's zone, the order of sets and the language of messages change nothing.
        extra = {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "LC_ALL": "C", "LANG": "C"}
        box.tally.injected += 1
        box.tally.survived += box.finish(f"again{processes}", processes=processes, **extra)


CASES = (rank_hangs, rank_killed, rank_raises, rank_exits, several_runs)
LONG = (rank_killed, rank_raises, rank_exits)
