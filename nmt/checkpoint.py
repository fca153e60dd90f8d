"""Checkpoints: one folder per saved step, complete and verified or not there at all.

    checkpoints/step-00001000/
        model/*.safetensors     parameters, a file for each process that wrote
        training/*.safetensors  optimiser moments
        state.json              step, position in the data, counters, score
        manifest.json           sha256 and size of the others, sha256 of each parameter and of the manifest itself,
                                fingerprint of the vocabulary; written last

A folder is written under another name, flushed to disk and renamed, so a crash leaves earlier ones untouched. Which
one is the newest or the best is worked out from the folders, never stored. Nothing is ever unpickled.

What `nmt export` writes is a checkpoint too, without training state: model.safetensors, all that a reader needs beside
it, and such a manifest over them. It is verified and read by the same functions.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nmt.errors import CheckpointError
from nmt.files import differs, is_plain_name, read_json, remove, unfinished

MANIFEST = "manifest.json"
EXPORTED_PARAMETERS = "model.safetensors"
MODEL_CARD = "README.md"
"""Of an exported model. Whoever hands it on adds a licence or notes to it: no manifest vouches for it."""
EXPORT_FORMAT = 1
_HEADER = "__metadata__"  # no tensor of a safetensors file has this name
_HASH_BLOCK = 1 << 20
_FOLDER = re.compile(r"step-([0-9]{8,18})")
_MANIFEST = {
    "step": int,
    "score": (float, None),
    "vocabulary": str,
    "sha256": str,
    "files": {str: {"size": int, "sha256": str}},
}
_EXPORT_MANIFEST = {"steps": [int]}
_STATE = {"progress": {"step": int, str: (float, None)}, "data": {"epoch": int, "step": int, str: int}}


class Checkpoint(NamedTuple):
    """A checkpoint folder whose manifest is present and readable."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def exported(self) -> bool:
        """Whether `nmt export` wrote it, not training."""
        return EXPORTED_PARAMETERS in self.manifest["files"]

    @property
    def parameters(self) -> Path:
        """The folder whose safetensors files are the parameters."""
        return self.path if self.exported else self.path / "model"

    @property
    def steps(self) -> list[int]:
        """The steps whose parameters these are the mean of: its own, but for an exported average."""
        return self.manifest["steps"] if self.exported else [self.step]

    @property
    def score(self) -> float | None:
        """Validation score of this step, lower is better; None if it was not validated."""
        return self.manifest["score"]

    def verify(self, part: str = "", tensors: Collection[str] | None = None) -> str | None:
        """What is wrong with the files (of one part: "model", "training"), or None if they are as they were written.

        `tensors` names parameters: of files whose manifest has a hash for each of theirs, only these are read.
        """
        files = {name: written for name, written in self.manifest["files"].items() if name.startswith(part)}
        # Exports of older versions have it in their manifest.
        files.pop(MODEL_CARD, None)
        for name, written in files.items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['size']}"
        hashes = {name: written["tensors"] for name, written in files.items() if "tensors" in written}
        whole = [_Span(name, 0, each["size"], each["sha256"]) for name, each in files.items() if name not in hashes]
        # A header is verified before it is believed.
        headers = [_Span(name, *_header(self.path / name), own.get(_HEADER)) for name, own in hashes.items()]
        if problem := self._first_difference([*whole, *headers]):
            return problem
        spans = []
        for name, own in hashes.items():
            places = _tensor_places(self.path / name)
            if places.keys() | {_HEADER} != own.keys():
                return f"{name} is not what was written (it has other tensors)"
            wanted = places.keys() if tensors is None else places.keys() & set(tensors)
            spans += [_Span(name, *places[tensor], own[tensor]) for tensor in sorted(wanted)]
        if problem := self._first_difference(spans):
            return problem
        for path in self.path.rglob("*.safetensors"):
            # Every such file in a folder is read.
            if str(path.relative_to(self.path)) not in self.manifest["files"]:
                return f"{path.relative_to(self.path)} does not belong to it"
        return None

    def _first_difference(self, spans: list["_Span"]) -> str | None:
        """The first file of which some bytes have another hash."""
        hashes = _sha256_of_all([(self.path / span.file, span.first, span.end) for span in spans])
        for span, sha256 in zip(spans, hashes, strict=True):
            if sha256 != span.sha256:
                return f"{span.file} is not what was written (sha256 differs)"
        return None

    def state(self) -> dict[str, Any]:
        """The JSON part of the training state. CheckpointError if it is not one."""
        try:
            return read_json(self.path / "state.json", _STATE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'state.json'} is not what this program writes ({error})") from error


class _Span(NamedTuple):
    """Some bytes of a file of a checkpoint, and the hash that they had when they were written."""

    file: str
    first: int
    end: int
    sha256: str | None


def _sha256_of_all(spans: list[tuple[Path, int, int]]) -> list[str]:
    """The hashes of bytes `first` to `end` - 1 of files, in hexadecimal digits; side by side, for they may be many."""

    def sha256_of(span: tuple[Path, int, int]) -> str:
        path, first, end = span
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            while first < end and (block := file.read(min(_HASH_BLOCK, end - first))):
                digest.update(block)
                first += len(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(sha256_of, spans))


def _header(path: Path) -> tuple[int, int]:
    """Where the header of a safetensors file is, its own length included: first byte and the one after the last."""
    with path.open("rb") as file:
        return 0, min(8 + int.from_bytes(file.read(8), "little"), path.stat().st_size)


def _tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file is, likewise; empty if the header is not that of such a file."""
    _, end = _header(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(end)[8:])
        offsets = {name: each["data_offsets"] for name, each in header.items() if name != _HEADER}
        return {name: (end + first, end + after) for name, (first, after) in offsets.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of all files in a folder but the model card, `facts` in it. OSError if it cannot be."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MODEL_CARD]
    hashes = _sha256_of_all([(path, 0, path.stat().st_size) for path in found])
    files: dict[str, dict[str, Any]] = {}
    for path, sha256 in zip(found, hashes, strict=True):
        name = str(path.relative_to(folder))
        files[name] = {"size": path.stat().st_size, "sha256": sha256}
        if name == EXPORTED_PARAMETERS or (name.startswith("model/") and path.suffix == ".safetensors"):
            places = _tensor_places(path)
            places |= {_HEADER: _header(path)} if places else {}
            own = _sha256_of_all([(path, *place) for place in places.values()])
            files[name] |= {"tensors": dict(zip(places, own, strict=True))} if places else {}
    manifest = facts | {"torch": torch.__version__, "files": files}
    content = json.dumps(manifest | {"sha256": _manifest_sha256(manifest)}, indent=2)
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _folders(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_manifest(path: Path, step: int | None) -> dict[str, Any] | None:
    """The manifest of a folder, of any step for None; None if it is missing or not as it was written."""
    try:
        manifest = read_json(path / MANIFEST, _MANIFEST)
    except (OSError, ValueError):
        return None
    written = manifest.pop("sha256")
    # A name such as ../secret would have a file elsewhere read.
    good = written == _manifest_sha256(manifest) and all(map(is_plain_name, manifest["files"]))
    good = good and not any(differs(each.get("tensors", {}), {str: str}) for each in manifest["files"].values())
    return manifest if good and step in (None, manifest["step"]) else None


def exported_checkpoint(folder: Path) -> Checkpoint:
    """What `nmt export` wrote to a folder. CheckpointError if its manifest is not intact, or of another format."""
    manifest = _read_manifest(folder, None)
    if manifest is None:
        raise CheckpointError(
            f"{folder} is a damaged export ({MANIFEST} is missing or not what was written): copy it again"
        )
    if manifest.get("format") != EXPORT_FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')} of exported models, this program reads {EXPORT_FORMAT}: "
            "use the version of nmt that wrote it, or export the run again"
        )
    problem = differs(manifest, _EXPORT_MANIFEST)
    if problem or not manifest["steps"]:
        raise CheckpointError(f"{folder / MANIFEST} is not what nmt export writes ({problem or 'steps is empty'})")
    return Checkpoint(folder, manifest["step"], manifest)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Checkpoints with an intact manifest, oldest first. Their files are not verified."""
    read = ((path, step, _read_manifest(path, step)) for step, path in _folders(folder))
    return [Checkpoint(path, step, manifest) for path, step, manifest in read if manifest is not None]


def damaged_manifests(folder: Path) -> list[str]:
    """A warning for each checkpoint that `list_checkpoints` leaves out, newest first."""
    damaged = [path for step, path in _folders(folder) if _read_manifest(path, step) is None]
    return [f"{path} is damaged (manifest.json is missing or not what was written): skipped" for path in damaged[::-1]]


def newest_verified(checkpoints: Iterable[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are intact, and a warning for each newer one that is not."""
    warnings: list[str] = []
    for checkpoint in sorted(checkpoints, key=lambda each: -each.step):
        problem = checkpoint.verify()
        if problem is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint.path} is damaged ({problem}): skipped")
    return None, warnings


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation score, the earlier one of equals."""
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
    return min(scored, key=lambda each: (each.score, each.step), default=None)


def prune_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Delete all but the `keep` newest and the best, and what a crash left half-written.

    `newest` is the step that training has reached: those of later steps were found damaged when it went on from an
    earlier one, and must not crowd out the good ones.
    """
    checkpoints = []
    for checkpoint in list_checkpoints(folder):
        if checkpoint.step > newest:
            _discard(checkpoint)
        else:
            checkpoints.append(checkpoint)
    kept = {checkpoint.path for checkpoint in checkpoints[-keep:]}
    best = best_of(checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept and (best is None or checkpoint.path != best.path):
            _discard(checkpoint)
    for leftover in folder.glob(".step-*.tmp"):
        with suppress(OSError):
            remove(leftover)


def _discard(checkpoint: Checkpoint) -> None:
    """Take a checkpoint away at once, for those who list them now, and have it removed with what crashes left."""
    with suppress(OSError):
        leftover = unfinished(checkpoint.path)
        remove(leftover)
        checkpoint.path.rename(leftover)


def choose(folder: Path, which: str, average: int) -> list[Checkpoint]:
    """The checkpoints that `decoding.checkpoint` names: one, or for `average` the `average` newest."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} holds no checkpoint: train the run first")
    if which == "average":
        return checkpoints[-average:]
    if which == "last":
        return checkpoints[-1:]
    if which == "best":
        # Without any validation the last one is all that can be meant.
        return [best_of(checkpoints) or checkpoints[-1]]
    wanted = [checkpoint for checkpoint in checkpoints if checkpoint.step == int(which)]
    if not wanted:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise CheckpointError(f"{folder} holds no checkpoint of step {which}; it has {steps}")
    return wanted
