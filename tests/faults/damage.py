"""Checkpoints of two processes that were damaged on disk: never chosen, never executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from nmt.checkpoint import list_checkpoints, newest_verified, seal
from tests.faults.box import Box, newest_step, one_line

Damage = Callable[[Path], str]
"""Damages a checkpoint folder, and returns the name of the file that a warning must have."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _change(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _truncate(box: Box) -> Damage:
    def damage(folder: Path) -> str:
        path = box.random.choice(_files(folder))
        os.truncate(path, box.random.choice([0, 1, box.random.randrange(path.stat().st_size)]))
        return path.name

    return damage


def _flip(box: Box) -> Damage:
    def damage(folder: Path) -> str:
        files = _files(folder)
        # As likely as the disk would: by size, but small files too.
        path = (
            box.random.choice(files) if box.random.random() < 0.4 else max(files, key=lambda each: each.stat().st_size)
        )

        def change(content: bytearray) -> None:
            content[box.random.randrange(len(content))] ^= 1 << box.random.randrange(8)

        _change(path, change)
        return path.name

    return damage


def _zero_page(box: Box) -> Damage:
    def damage(folder: Path) -> str:
        path = box.random.choice(sorted(folder.rglob("*.safetensors")))
        page = box.random.randrange(path.stat().st_size // 4096)
        _change(path, lambda content: content.__setitem__(slice(page * 4096, page * 4096 + 4096), bytes(4096)))
        return path.name

    return damage


def _remove(box: Box) -> Damage:
    def damage(folder: Path) -> str:
        path = box.random.choice(_files(folder))
        path.unlink()
        return path.name

    return damage


def damage_found(box: Box) -> None:
    """truncated, bit-flipped, zeroed and missing files: found by the choice of a checkpoint"""
    half = box.shared.half(2)
    checkpoints = list_checkpoints(half / "checkpoints")
    kinds = [(_truncate(box), 20), (_flip(box), 100), (_zero_page(box), 20), (_remove(box), 9)]
    for damage, count in kinds:
        for _ in range(count):
            copy = box.folder / "copy"
            shutil.copytree(half / "checkpoints", copy)
            newest = copy / checkpoints[-1].path.name
            before = {path: path.read_bytes() for path in _files(newest)}
            name = damage(newest)
            same = {path: path.read_bytes() for path in _files(newest)} == before  # zeros over zeros
            chosen, warnings = newest_verified(list_checkpoints(copy))
            previous = chosen is not None and chosen.step == checkpoints[-2].step
            named = name in "".join(warnings) or name == "manifest.json"
            box.fault(same or (previous and named), f"{name}: {chosen and chosen.step} was chosen, {warnings}")
            shutil.rmtree(copy)


def damage_restart(box: Box) -> None:
    """the same for the whole command: a warning names the file, the step before is used"""
    half = box.shared.half(2)
    first, last = (each.step for each in list_checkpoints(half / "checkpoints")[-2:])
    kinds = (("cut", _truncate), ("flipped", _flip), ("zeroed", _zero_page), ("missing", _remove))
    for run, kind in kinds[1:2] if box.quick else kinds:
        path = box.copy(half, run)
        name = kind(box)(path / "checkpoints" / f"step-{last:08d}")
        (path / "checkpoints" / "step-00000999").mkdir()
        stale = path / "checkpoints" / ".step-00000777.tmp"
        stale.mkdir()
        (stale / "state.json").write_text("{")
        process = box.train(run, processes=2)
        told = process.errors()
        kept = f"step-{last:08d} is damaged ({name}" in told or (name in told and f"step-{last:08d} is damaged" in told)
        kept = kept and f"resuming from {path / 'checkpoints' / f'step-{first:08d}'}" in told and not stale.exists()
        kept = kept and "step-00000999 is damaged" in told and process.popen.returncode == 0
        if box.fault(kept, f"{run} {name}", process):
            box.compare(path, box.shared.whole(2))
    if box.quick:
        return
    path = box.copy(half, "all")
    for checkpoint in list_checkpoints(path / "checkpoints"):
        _flip(box)(checkpoint.path)
    process = box.train("all", processes=2)
    box.fault(process.popen.returncode == 4 and one_line(process, "is damaged"), "nothing but damage", process)


class _Evil:
    """What unpickling runs."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def evil_files(box: Box) -> None:
    """a pickled program in place of a checkpoint's file, its manifest in order: refused, never run"""
    half = box.shared.half(1)
    canary = box.folder / "canary"
    evil = pickle.dumps(_Evil(canary))
    names = ("model/*.safetensors", "training/*.safetensors", "state.json")
    for number, pattern in enumerate(names[:2] if box.quick else names):
        for sealed in (True,) if box.quick else (True, False):
            path = box.copy(half, f"evil{number}{sealed}")
            folders = list_checkpoints(path / "checkpoints")
            for checkpoint in folders:
                for file in checkpoint.path.glob(pattern):
                    file.write_bytes(evil)
                (checkpoint.path / ".metadata").write_bytes(evil)
                (checkpoint.path / "model.pt").write_bytes(evil)
                if sealed:
                    facts = {name: checkpoint.manifest[name] for name in ("step", "score", "vocabulary")}
                    (checkpoint.path / "manifest.json").unlink()
                    seal(checkpoint.path, facts)
            process = box.train(path.name)
            code = process.popen.returncode
            kept = code == 4 and one_line(process, "checkpoint") and not canary.exists()
            box.fault(kept, f"{pattern} sealed={sealed}: status {code}, canary {canary.exists()}", process)
    # The other thing that is read: the description of the run.
    path = box.copy(half, "yaml")
    (path / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']\n")
    process = box.train("yaml")
    code = process.popen.returncode
    box.fault(code == 4 and one_line(process) and not canary.exists(), f"config.yaml: status {code}", process)
    (path / "config.yaml").write_text(json.dumps({}))
    box.promise(newest_step(path) > 0, "checkpoints were touched")


CASES = (damage_restart, damage_found, evil_files)
LONG: tuple = ()
