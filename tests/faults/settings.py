"""A run goes on only with the text, the vocabulary and the settings it was started with."""

import os
import shutil
import subprocess
from pathlib import Path

from nmt.config import SubwordConfig
from nmt.data.subwords import train_subwords
from tests.faults.box import NMT, Box, Process, corpus_settings, lines, newest_step, one_line, write_text


def _refuses(box: Box, what: str, process: Process, code: int | tuple[int, ...], *parts: str) -> None:
    status = process.popen.returncode
    codes = code if isinstance(code, tuple) else (code,)
    box.fault(status in codes and one_line(process, *parts), f"{what}: status {status}", process)


def other_settings(box: Box) -> None:
    """settings that change what is learnt are refused with both values, the others are told"""
    half = box.shared.half(1)
    box.copy(half, "run")
    before = newest_step(half)
    unsafe = {
        "training.learning_rate=0.5": ("training.learning_rate was ", "now 0.5"),
        "model.moe.k=1": ("model.moe.k was 2", "now 1"),
        "corpus.subwords.vocab_size=200": ("corpus.subwords.vocab_size was 256", "now 200"),
        "corpus.source_language=fr": ("corpus.source_language was en", "now fr"),
    }
    for change, parts in list(unsafe.items())[:2] if box.quick else unsafe.items():
        _refuses(box, change, box.train("run", change), 4, *parts)
    swapped = ["corpus.train.source=[train.de]", "corpus.train.target=[train.en]"]
    _refuses(box, "swapped", box.train("run", *swapped), 4, "corpus.train.source was", "now ['train.de']")
    box.promise(newest_step(box.run("run")) == before, "a refused command changed the run")
    process = box.train("run", "training.keep_checkpoints=4", "parallel.timeout_seconds=9")
    told = "changed since the run was started: training.keep_checkpoints: 2 -> 4" in process.errors()
    if box.fault(process.popen.returncode == 0 and told, "a safe change is not told", process):
        box.compare(box.run("run"), box.shared.whole(1))


def other_text(box: Box) -> None:
    """other training text, sides exchanged, another vocabulary of the same size"""
    text, data = box.folder / "text", box.folder / "data"
    given = corpus_settings(text, data)
    write_text(text)
    process = box.train("run", *given, "training.max_steps=6")
    if not box.promise(process.popen.returncode == 0, "the first run failed", process):
        return
    write_text(text, skip=500)
    _refuses(box, "other text", box.train("run", *given), 3, "was trained on other text or another vocabulary")
    write_text(text)
    for split in ("train", "dev", "test"):
        english, german = text / f"{split}.en", text / f"{split}.de"
        english.rename(text / "aside")
        german.rename(english)
        (text / "aside").rename(german)
    _refuses(box, "sides exchanged", box.train("run", *given), 3, "was trained on other text or another vocabulary")
    write_text(text)

    def vocabulary(path: Path) -> None:
        lines = (text / "train.de").read_text().splitlines()
        train_subwords(lines, SubwordConfig(kind="bpe", vocab_size=256), path)

    [prepared] = data.glob("tiny-*/subwords.model")
    process = box.train("run", *given, "training.max_steps=7")
    box.promise(process.popen.returncode == 0, "the first text again: did not go on", process)
    content = prepared.read_bytes()
    vocabulary(prepared)
    process = box.train("run", *given, "training.max_steps=8")
    repaired = process.popen.returncode == 0 and prepared.read_bytes() == content
    box.fault(repaired, "another vocabulary in the prepared corpus was not found and made again", process)
    vocabulary(box.run("run") / "subwords.model")
    _refuses(box, "training", box.train("run", *given, "training.max_steps=9"), 4, "subwords.model")
    process = box.command([*NMT, "translate", str(box.run("run")), str(text / "test.en")])
    process.wait()
    _refuses(box, "translating", process, 4, "subwords.model")


def odd_places(box: Box) -> None:
    """runs at paths with blanks and umlauts, without a parent, and where nothing can be written"""
    odd = box.folder / "mit Leerzeichen" / "Übung, 1"
    process = box.train("odd", f'run.directory="{odd}"', f'corpus.directory="{odd}/data"', processes=2)
    went = process.popen.returncode == 0
    if box.fault(went, "blanks, umlauts, a missing parent", process):
        box.compare(odd / "odd", box.shared.whole(2))
    file = box.folder / "file"
    file.write_text("x")
    _refuses(box, "runs in a file", box.train("a", f'run.directory="{file}"'), 6, str(file))
    _refuses(box, "corpus in a file", box.train("a", f'corpus.directory="{file}"'), (2, 6), str(file))
    (box.folder / "taken").write_text("x")
    _refuses(box, "the run is a file", box.train("taken"), 6, "taken")
    mount = box.folder / "mount"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount)]).returncode:
        mount.chmod(0o500)
        if not os.geteuid():
            box.tally.notes.append("no read-only folder: root, and nothing can be mounted")
            return
        _refuses(box, "read-only", box.train("a", f'run.directory="{mount}"'), 6, str(mount))
        return
    try:
        shutil.copytree(box.shared.half(1), mount / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        for run in ("run", "new"):
            _refuses(box, f"read-only {run}", box.train(run, f'run.directory="{mount}"'), 6, str(mount))
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def second_start(box: Box) -> None:
    """the same run started again while it trains; standard error that is closed"""
    first = box.start("run", faults=[{"kind": "slow_steps", "seconds": 0.6}])
    if box.promise(first.wait_until(lambda: len(lines(box.run("run"))) >= 2), "it did not start", first):
        _refuses(box, "a second start", box.train("run"), 4, "is being trained by")
    first.wait()
    box.promise(first.popen.returncode == 0, "the first start was disturbed", first)
    box.compare(box.run("run"), box.shared.whole(1))
    if box.quick:
        return
    process = box.train("closed", preexec_fn=lambda: os.close(2))
    if box.fault(process.popen.returncode == 0, f"closed standard error: status {process.popen.returncode}", process):
        box.compare(box.run("closed"), box.shared.whole(1))


CASES = (other_settings, other_text, odd_places, second_start)
LONG = (other_text, odd_places)
