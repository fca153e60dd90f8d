"""Checkpoints: one folder per saved step, which is either complete and verified or does not exist.

    checkpoints/step-00001000/
        model/*.safetensors     parameters, one file per process that wrote
        training/*.safetensors  optimiser moments
        state.json              step, position in the data, counters, score
        manifest.json           sha256 and size of the other files, sha256 of each parameter and of the manifest itself,
                                fingerprint of the vocabulary; written last

A folder is written under another name, flushed to disk and renamed, so a crash leaves earlier ones untouched. The
newest and the best checkpoint are found from the folders, not stored. Nothing is ever unpickled.

An exported model (`nmt export`) is also a checkpoint, without training state: model.safetensors, the other files that a
reader needs, and a manifest of the same kind. The same functions verify and read it.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
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
"""Model card of an exported model. It is not in the manifest, so that users can add a licence or notes."""
EXPORT_FORMAT, BF16_FORMAT = 1, 2
"""Formats of exported models: parameters in float32, or those in bf16 that a translation in bf16 has in bf16."""
_HEADER = "__metadata__"  # a name that no tensor of a safetensors file can have
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
_STATE = {
    "progress": {"step": int, str: (float, None, {str: [float]})},
    "data": {"epoch": int, "step": int, str: (int, [int])},
}


class Checkpoint(NamedTuple):
    """A checkpoint folder whose manifest is present and readable."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def exported(self) -> bool:
        """True if this is an exported model, False if training wrote it."""
        return EXPORTED_PARAMETERS in self.manifest["files"]

    @property
    def parameters(self) -> Path:
        """The folder that has the safetensors files of the parameters."""
        return self.path if self.exported else self.path / "model"

    @property
    def steps(self) -> list[int]:
        """The training steps whose mean these parameters are: one step, except for an exported average."""
        return self.manifest["steps"] if self.exported else [self.step]

    @property
    def fingerprint(self) -> str:
        """A short name for the content of all files: equal ones have equal files."""
        return _manifest_sha256(self.manifest)[:12]

    @property
    def score(self) -> float | None:
        """Validation score of this step (lower is better); None if it was not validated."""
        return self.manifest["score"]

    def verify(self, part: str = "", tensors: Collection[str] | None = None) -> str | None:
        """Return what is wrong with the files, or None if they are as written. `part` is "model", "training" or all.

        `tensors` names parameters: in files whose manifest has a hash for each parameter, only these are read.
        """
        files = {name: written for name, written in self.manifest["files"].items() if name.startswith(part)}
        # Older versions exported the card in the manifest.
        files.pop(MODEL_CARD, None)
        for name, written in files.items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['size']}"
        hashes = {name: written["tensors"] for name, written in files.items() if "tensors" in written}
        whole = [_Span(name, 0, each["size"], each["sha256"]) for name, each in files.items() if name not in hashes]
        # Verify the headers before using them.
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
            # Readers read every such file of a folder.
            if str(path.relative_to(self.path)) not in self.manifest["files"]:
                return f"{path.relative_to(self.path)} does not belong to it"
        return None

    @property
    def verifies_experts(self) -> bool:
        """True if each expert has a hash of its own, so that experts can be verified one by one."""
        return self.exported and "experts" in self.manifest["files"][EXPORTED_PARAMETERS]

    def verify_experts(self, parameter: str, experts: Iterable[int]) -> str | None:
        """Return what is wrong with these experts in a parameter of an exported model, or None."""
        path = self.path / EXPORTED_PARAMETERS
        hashes = self.manifest["files"][EXPORTED_PARAMETERS]["experts"].get(parameter, [])
        spans = _equal_parts(_tensor_places(path).get(parameter, (0, 0)), len(hashes))
        wanted = sorted(experts)
        if wanted and wanted[-1] >= len(hashes):
            return f"{MANIFEST} has no hash of expert {wanted[-1]} of {parameter}"
        return self._first_difference([_Span(path.name, *spans[expert], hashes[expert]) for expert in wanted])

    def _first_difference(self, spans: list["_Span"]) -> str | None:
        """Return what is wrong with the first span whose hash differs, or None."""
        hashes = _sha256_of_all([(self.path / span.file, span.first, span.end) for span in spans])
        for span, sha256 in zip(spans, hashes, strict=True):
            if sha256 != span.sha256:
                return f"{span.file} is not what was written (sha256 differs)"
        return None

    def state(self) -> dict[str, Any]:
        """Return the contents of state.json. CheckpointError if it is damaged."""
        try:
            return read_json(self.path / "state.json", _STATE)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / 'state.json'} is not what this program writes ({error}): remove this "
                "checkpoint, or choose another"
            ) from error


class _Span(NamedTuple):
    """Bytes `first` to `end` - 1 of a file of a checkpoint, and the hash that they had when written."""

    file: str
    first: int
    end: int
    sha256: str | None


def _sha256_of_all(spans: list[tuple[Path, int, int]]) -> list[str]:
    """Return the hashes of bytes `first` to `end` - 1 of each file, in hexadecimal, computed in parallel."""

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
    """Return the span of the header of a safetensors file, including its length: first byte, one after the last."""
    with path.open("rb") as file:
        return 0, min(8 + int.from_bytes(file.read(8), "little"), path.stat().st_size)


def _tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Return the span of each tensor of a safetensors file by name; empty if its header is not valid."""
    _, end = _header(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(end)[8:])
        offsets = {name: each["data_offsets"] for name, each in header.items() if name != _HEADER}
        return {name: (end + first, end + after) for name, (first, after) in offsets.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _equal_parts(place: tuple[int, int], parts: int) -> list[tuple[int, int]]:
    """Return the spans of `parts` parts of equal size."""
    first, end = place
    size = (end - first) // max(parts, 1)
    return [(first + part * size, first + (part + 1) * size) for part in range(parts)]


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def seal(folder: Path, facts: dict[str, Any], experts: Mapping[str, int] | None = None) -> None:
    """Write a manifest with `facts` and the hashes of all files in a folder, except the model card; or OSError.

    `experts` has the number of experts in each parameter of an exported model that has any; each gets its own hash.
    """
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
            each = {tensor: _equal_parts(places[tensor], count) for tensor, count in (experts or {}).items()}
            if each:
                files[name]["experts"] = {
                    tensor: _sha256_of_all([(path, *span) for span in spans]) for tensor, spans in each.items()
                }
    manifest = facts | {"torch": torch.__version__, "files": files}
    content = json.dumps(manifest | {"sha256": _manifest_sha256(manifest)}, indent=2)
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _folders(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_manifest(path: Path, step: int | None) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it is missing, damaged or of another step (None: any step)."""
    try:
        manifest = read_json(path / MANIFEST, _MANIFEST)
    except (OSError, ValueError):
        return None
    written = manifest.pop("sha256")
    # A name such as ../secret would make readers read a file elsewhere.
    good = written == _manifest_sha256(manifest) and all(map(is_plain_name, manifest["files"]))
    for each in manifest["files"].values():
        good = good and not differs(each.get("tensors", {}), {str: str})
        good = good and not differs(each.get("experts", {}), {str: [str]})
    return manifest if good and step in (None, manifest["step"]) else None


def exported_checkpoint(folder: Path) -> Checkpoint:
    """Return the exported model in a folder. CheckpointError if its manifest is damaged or of another format."""
    manifest = _read_manifest(folder, None)
    if manifest is None:
        raise CheckpointError(f"{folder} is a damaged export ({MANIFEST} is missing or was changed): copy it again")
    if manifest.get("format") not in (EXPORT_FORMAT, BF16_FORMAT):
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')} of exported models, but this program reads formats "
            f"{EXPORT_FORMAT} and {BF16_FORMAT}: use the version of nmt that wrote it, or export the run again"
        )
    problem = differs(manifest, _EXPORT_MANIFEST)
    if problem or not manifest["steps"]:
        raise CheckpointError(
            f"{folder / MANIFEST} is not what nmt export writes ({problem or 'steps is empty'}): export the run again"
        )
    return Checkpoint(folder, manifest["step"], manifest)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints with an intact manifest, oldest first. Other files are not verified."""
    read = ((path, step, _read_manifest(path, step)) for step, path in _folders(folder))
    return [Checkpoint(path, step, manifest) for path, step, manifest in read if manifest is not None]


def damaged_manifests(folder: Path) -> list[str]:
    """Return a warning for each checkpoint that `list_checkpoints` leaves out, newest first."""
    return [f"{path} is damaged ({MANIFEST} is missing or was changed): skipped" for path in _damaged(folder)]


def _damaged(folder: Path) -> list[Path]:
    """Return the folders that `list_checkpoints` leaves out, newest first, except any that training removed by now."""
    damaged = [path for step, path in _folders(folder) if _read_manifest(path, step) is None]
    return [path for path in damaged[::-1] if path.exists()]


def newest_verified(checkpoints: Iterable[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files are intact (None if there is none), and a warning for each newer one."""
    warnings: list[str] = []
    for checkpoint in sorted(checkpoints, key=lambda each: -each.step):
        problem = checkpoint.verify()
        if problem is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint.path} is damaged ({problem}): skipped")
    return None, warnings


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation score, on a tie the earliest; None if none has a score."""
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
    return min(scored, key=lambda each: (each.score, each.step), default=None)


def prune_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Delete all checkpoints except the `keep` newest and the best, and delete what crashes left half-written.

    `newest` is the step that training has reached. Checkpoints of later steps were damaged, so that training resumed
    from an earlier one. They are deleted too, and do not count among the newest.
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
    """Rename a checkpoint, so that it is no longer listed; then it is removed with what crashes left."""
    with suppress(OSError):
        leftover = unfinished(checkpoint.path)
        remove(leftover)
        checkpoint.path.rename(leftover)


def choose(folder: Path, which: str, average: int) -> list[Checkpoint]:
    """Return the checkpoint that `which` (`decoding.checkpoint`) names; for "average", the `average` newest ones.

    CheckpointError if there is none, or if it is unknown because the manifest of a checkpoint is damaged.
    """
    checkpoints = list_checkpoints(folder)
    damaged = [] if which.isdigit() else _damaged(folder)
    if damaged:
        # An older one in its place would translate worse, and nobody would know why.
        raise CheckpointError(
            f"{damaged[0]} is damaged ({MANIFEST} is missing or was changed): restore or remove it, or choose a step "
            "with decoding.checkpoint=STEP"
        )
    if not checkpoints:
        raise CheckpointError(f"{folder} has no checkpoint: train the run first")
    if which == "average":
        return checkpoints[-average:]
    if which == "last":
        return checkpoints[-1:]
    if which == "best":
        # Without any validation, only the last one can be meant.
        return [best_of(checkpoints) or checkpoints[-1]]
    wanted = [checkpoint for checkpoint in checkpoints if checkpoint.step == int(which)]
    if not wanted:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise CheckpointError(f"{folder} has no checkpoint of step {which}: choose one of {steps}")
    return wanted
