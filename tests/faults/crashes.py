"""kill -9 at any moment: the same command goes on, and ends with the same bits."""

import time
from functools import partial

from nmt.checkpoint import best_of, list_checkpoints
from tests.faults.box import Box, Process, lines, newest, newest_step

# Calls that one save makes, about: which of them a kill is aimed at.
_CALLS_OF_A_SAVE = 14


def _aimed_at_a_save(box: Box, number: int) -> tuple[list[dict[str, object]], str]:
    """A fault that lets a kill land in the saving thread: held still before one call, or anywhere in slow ones."""
    if number % 2:
        call = box.random.randint(1, 2 * _CALLS_OF_A_SAVE)
        return [{"kind": "in_save", "do": "sleep", "number": call}], "in_save"
    return [{"kind": "slow_save", "seconds": 0.02}, {"kind": "slow_steps", "seconds": 0.01}], "slow_save"


def _wait_for_moment(box: Box, process: Process, run: str, aim: str) -> bool:
    """Wait until it is time to kill; False if the process ended before."""
    if aim == "start":
        time.sleep(box.random.uniform(0.0, 3.0))
        return process.popen.poll() is None
    if aim == "slow_save":
        calls = box.random.randint(1, _CALLS_OF_A_SAVE)
        reached = process.wait_until(lambda: len(process.happened("slow_save")) >= calls)
        time.sleep(box.random.uniform(0.0, 0.02))
        return reached and process.popen.poll() is None
    if aim == "in_save":
        return process.wait_until(lambda: bool(process.happened("in_save"))) and process.popen.poll() is None
    # In an update: so many after the first, and a part of one.
    first = process.wait_until(lambda: bool(process.happened("in_step")))
    seen, wanted = len(lines(box.run(run))), box.random.randint(0, 12)
    reached = first and process.wait_until(lambda: len(lines(box.run(run))) >= seen + wanted)
    time.sleep(box.random.uniform(0.0, 0.05))
    return reached and process.popen.poll() is None


def _killed_runs(box: Box, processes: int, kills: int, in_saves: int) -> None:
    """Kill runs so many times, of these so many in a save; finish each run and compare."""
    aims = ["save"] * in_saves + ["start"] * (kills // 8)
    aims += ["update"] * (kills - len(aims))
    box.random.shuffle(aims)
    number = open_faults = in_save_now = 0
    run = "run0"
    while aims:
        faults: list[dict[str, object]] = [{"kind": "slow_steps", "seconds": 0.02}]
        aim = aims[-1]
        if aim == "save":
            faults, aim = _aimed_at_a_save(box, number)
        elif aim == "update":
            # Marks the first update of this life.
            step = newest_step(box.run(run)) + 1
            faults += [{"kind": "in_step", "step": step, "do": "nothing"}]
        victim = box.random.choice([None, 0, 1]) if processes > 1 else None
        before = newest_step(box.run(run))
        process = box.start(run, processes=processes, faults=faults)
        if _wait_for_moment(box, process, run, aim):
            process.kill(victim)
            process.wait(60)
            in_save_now += aims[-1] == "save"
            aims.pop()
            after = newest_step(box.run(run))
            kept = box.promise(after >= before, f"kill {number} ({aim}): checkpoint {before} was lost, {after} is left")
            box.tally.injected += 1
            open_faults += kept
            number += 1
        else:
            process.wait(60)
            if not box.promise(process.popen.returncode == 0, f"{run} ended by itself", process):
                return
            box.tally.survived += open_faults * box.compare(box.run(run), box.shared.whole(processes))
            open_faults, run = 0, f"run{number}"
    box.tally.survived += open_faults * box.finish(run, processes=processes)
    box.tally.notes.append(f"{in_save_now} in a save")


def kill_one(box: Box) -> None:
    """kill -9 of a single process, at random moments and in saves"""
    _killed_runs(box, 1, *((5, 3) if box.quick else (50, 20)))


def kill_two(box: Box) -> None:
    """kill -9 of one of two processes, or of both and torchrun"""
    _killed_runs(box, 2, *((1, 1) if box.quick else (14, 7)))


def keep_last(box: Box) -> None:
    """kill -9 between a save and the removal of old checkpoints, keeping 1, 2 or 3"""
    for keep in (2,) if box.quick else (1, 2, 3):
        run = f"keep{keep}"
        settings = (f"training.keep_checkpoints={keep}", "training.validate_every=2", "training.checkpoint_every=3")
        # Just before the folder gets its name; when it has it, and the old ones are to go.
        for call, after in (("rename", "write_text"), ("rmtree", "rename")):
            faults = [{"kind": "in_save", "do": "sleep", "call": call, "after": after, "saves": keep + 2}]
            process = box.start(run, *settings, faults=faults)
            if not process.wait_until(partial(process.happened, "in_save")):
                box.promise(False, f"keep {keep}: nothing was removed", process)
                return
            process.kill()
            process.wait(60)
            found = list_checkpoints(box.run(run) / "checkpoints")
            best = best_of(found)
            kept = newest(box.run(run)) is not None and (best is None or best.verify() is None)
            box.fault(kept, f"keep {keep}: no verified checkpoint after the kill", process)
        process = box.train(run, *settings)
        box.promise(process.popen.returncode == 0, "did not go on", process)
        found = list_checkpoints(box.run(run) / "checkpoints")
        scores = [each["perplexity"] for each in lines(box.run(run), "dev")]
        best = best_of(found)
        box.promise(best is not None and best.score == min(scores), f"keep {keep}: the best is not kept")
        box.promise(len(found) in (keep, keep + 1), f"keep {keep}: {len(found)} checkpoints are left")


CASES = (kill_one, kill_two, keep_last)
LONG = (keep_last,)
