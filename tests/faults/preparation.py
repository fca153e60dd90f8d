"""Preparation that is killed: nothing half-made is ever taken as done."""

import hashlib
import json
import time
from pathlib import Path

from tests.faults.box import NMT, Box, Process, corpus_settings, write_text


def _contents(data: Path) -> dict[str, str]:
    """Hashes of what was prepared, without what the clock says; and whatever else lies there."""
    found = {}
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        name = str(path.relative_to(data))
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["seconds"], manifest["corpus"]["directory"]
            content = json.dumps(manifest).encode()
        if not name.endswith((".lock", ".verified")):
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def preparation(box: Box) -> None:
    """preparation killed at random times and run again; two at once"""
    text = box.folder / "text"
    write_text(text, pairs=6000)

    def prepare(folder: str) -> Process:
        return box.command([*NMT, "prepare", *corpus_settings(text, box.folder / folder)])

    clean = prepare("clean")
    clean.wait()
    took = time.monotonic() - clean.started
    expected = _contents(box.folder / "clean")
    if not box.promise(len(expected) > 4 and clean.popen.returncode == 0, "not prepared", clean):
        return
    for number in range(2 if box.quick else 10):
        process = prepare(f"killed{number}")
        time.sleep(box.random.uniform(0.3 * took, took))
        alive = process.popen.poll() is None
        process.kill()
        process.wait()
        process = prepare(f"killed{number}")
        process.wait()
        same = _contents(box.folder / f"killed{number}") == expected
        box.tally.injected += 1
        box.tally.survived += process.popen.returncode == 0 and same
        box.tally.compared += 1
        box.tally.equal += same
        box.promise(same, f"killed{number} (alive: {alive}) is not what is prepared without a kill", process)
    both = [prepare("both"), prepare("both")]
    codes = [process.wait() for process in both]
    same = _contents(box.folder / "both") == expected
    box.tally.compared += 1
    box.tally.equal += same
    box.fault(codes == [0, 0] and same, f"two at once: {codes}", both[1])


CASES = (preparation,)
LONG: tuple = ()
