"""A disk that fills up, or fails, at any write: earlier checkpoints stay, status 6, one line, and it goes on later."""

import os
import resource
import subprocess
from pathlib import Path

from tests.faults.box import Box, Process, lines, newest_step, status

# Writing calls of half of a run, at least: the last ones that may fail.
_CALLS = 40


def _refused(box: Box, run: str, process: Process, before: int, *parts: str) -> bool:
    """Whether a run ended with status 6 and one line, and lost no checkpoint."""
    told = status(box.run(run))
    code = process.popen.returncode
    # On a full disk RUN_STATUS.json may not be writable any more either: then it says what it said before.
    told_alike = told.get("code") == 6 or told.get("state") in ("running", "finished")
    spoke = "Traceback" not in process.errors() and all(part in process.errors() for part in parts)
    kept = code == 6 and told_alike and spoke and newest_step(box.run(run)) >= before
    return box.fault(kept, f"{run}: status {code}, step {newest_step(box.run(run))} after {before}", process)


def _calls_that_fail(box: Box, processes: int, numbers: list[int]) -> None:
    half = box.shared.half(processes)
    before = newest_step(half)
    for number in numbers:
        code = box.random.choice(["ENOSPC", "EIO"])
        run = box.copy(half, f"call{number}").name
        faults = [{"kind": "full_disk", "number": number, "errno": code, "rank": box.random.randrange(processes)}]
        process = box.train(run, processes=processes, faults=faults)
        if not process.happened("full_disk"):
            box.promise(process.popen.returncode == 0, f"{run}: failed without a fault", process)
            continue
        said = os.strerror(28 if code == "ENOSPC" else 5)
        if _refused(box, run, process, before, said) and (number % 4 == 1 or number == numbers[-1]):
            box.finish(run, processes=processes)


def disk_one(box: Box) -> None:
    """writing calls of a single process fail, one after the other (ENOSPC, EIO)"""
    _calls_that_fail(box, 1, [1, 9] if box.quick else list(range(1, _CALLS)))


def disk_two(box: Box) -> None:
    """writing calls of one of two processes fail"""
    _calls_that_fail(box, 2, box.random.sample(range(1, 12), 6))


def disk_limits(box: Box) -> None:
    """a limit on the size of files, and a small file system that fills up"""
    half = box.shared.half(1)
    before = newest_step(half)
    largest = max(path.stat().st_size for path in half.rglob("*.safetensors"))
    for run, limit in (("small-limit", largest - 1000), ("tiny-limit", 20_000)):
        box.copy(half, run)
        process = box.train(
            run, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        if _refused(box, run, process, before, "File too large"):
            box.finish(run)
    mount = box.folder / "mount"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]).returncode:
        box.tally.notes.append("no file system of its own: not root")
        return
    try:
        _small_file_system(box, mount)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def _small_file_system(box: Box, mount: Path) -> None:
    subprocess.run(["cp", "-a", str(box.shared.half(1)), str(mount / "full")], check=True)
    run = box.run("full")
    run.symlink_to(mount / "full")
    before = newest_step(run)
    settings = [f'run.directory="{mount}"']
    process = box.start("full", *settings, faults=[{"kind": "slow_steps", "seconds": 0.05}])
    process.wait_until(lambda: len(lines(run)) > before + 1)
    ballast = mount / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, bytes(512))
    except OSError:
        os.close(descriptor)
    process.wait()
    full = _refused(box, "full", process, before, "No space left on device")
    process = box.train("full", *settings)
    box.fault(
        process.popen.returncode == 6 and "Traceback" not in process.errors(),
        "a disk that is full at the start",
        process,
    )
    os.remove(ballast)
    if full:
        box.finish("full", *settings)


CASES = (disk_one, disk_two, disk_limits)
LONG = (disk_two, disk_limits)
