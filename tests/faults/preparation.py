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
        if path.name in ("manifest.json", "prepare.json"):
            record = json.loads(content)
            del record["seconds"]
            record.pop("path", None)
            record.get("corpus", {}).pop("directory", None)
            content = json.dumps(record).encode()
        # Pages are drawn from the figures.
        if not name.endswith((".lock", ".verified", ".html", ".md")):
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def preparation(box: Box) -> None:
    """preparation in two processes killed at random times and run again; two at once"""
    text = box.folder / "text"
    write_text(text, pairs=1000)
    for path in text.glob("train.*"):  # several blocks, which processes share
        path.write_text(path.read_text() * 160)

    def prepare(folder: str) -> Process:
        settings = [*corpus_settings(text, box.folder / folder), "corpus.filters.max_words=12"]
        return box.command([*NMT, "prepare", "--processes", "2", *settings])

    clean = prepare("clean")
    clean.wait()
    took = time.monotonic() - clean.started
    expected = _contents(box.folder / "clean")
    if not box.promise(len(expected) > 4 and clean.popen.returncode == 0, "not prepared", clean):
        return
    for number in range(3 if box.quick else 20):
        for _ in range(2):
            process = prepare(f"killed{number}")
            time.sleep(box.random.uniform(0.1 * took, took))
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
