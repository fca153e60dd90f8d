"""Checkpoints: one folder per saved step, complete and verified or not there at all.

    checkpoints/step-00001000/
        model.safetensors       parameters
        training.safetensors    optimiser moments
        state.json              step, position in the data, counters, score
        manifest.json           sha256 and size of the others, fingerprint of the vocabulary, its own; written last

A folder is written under another name, flushed to disk and renamed, so a crash leaves earlier ones untouched. Which
one is the newest or the best is worked out from the folders, never stored. Nothing is ever unpickled.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nmt.errors import CheckpointError, StorageError
from nmt.files import sync

_FOLDER = re.compile(r"step-(\d{8,})")
_FILES = ("model.safetensors", "training.safetensors", "state.json")


class Checkpoint(NamedTuple):
    """A checkpoint folder whose manifest is present and readable."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def score(self) -> float | None:
        """Validation score of this step, lower is better; None if it was not validated."""
        return self.manifest["score"]

    def verify(self) -> str | None:
        """What is wrong with the files, or None if they are as they were written."""
        for name, written in self.manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['size']}"
            if _sha256(path) != written["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
        return None

    def state(self) -> dict[str, Any]:
        """The JSON part of the training state."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def training_tensors(self) -> dict[str, Tensor]:
        """The tensors of the training state."""
        return safetensors.torch.load_file(self.path / "training.safetensors")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once (tied ones under one name), on the CPU."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    training: dict[str, Tensor],
    state: dict[str, Any],
    score: float | None,
    vocabulary: str,
) -> Path:
    """Write checkpoints/step-N below `folder`; StorageError if it cannot be written (earlier ones stay)."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(parameters_of(model), temporary / "model.safetensors")
        safetensors.torch.save_file(training, temporary / "training.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        files = {
            name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in _FILES
        }
        manifest = {
            "step": step,
            "score": score,
            "vocabulary": vocabulary,
            "torch": torch.__version__,
            "files": files,
        }
        content = json.dumps(manifest | {"sha256": _manifest_sha256(manifest)}, indent=2)
        (temporary / "manifest.json").write_text(content, encoding="utf-8")
        for name in (*_FILES, "manifest.json"):
            sync(temporary / name)
        sync(temporary)
        if final.exists():
            # Only a damaged or repeated save of the same step stands here: it gives way to the new one.
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"cannot write checkpoint {final}: {error}; earlier checkpoints are untouched") from error
    return final


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _folders(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_manifest(path: Path, step: int) -> dict[str, Any] | None:
    """The manifest of a checkpoint folder; None if it is missing or not as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        written = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return manifest if written == _manifest_sha256(manifest) and manifest["step"] == step else None


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
            shutil.rmtree(checkpoint.path, ignore_errors=True)
        else:
            checkpoints.append(checkpoint)
    kept = {checkpoint.path for checkpoint in checkpoints[-keep:]}
    best = best_of(checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept and (best is None or checkpoint.path != best.path):
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def load_parameters(model: nn.Module, checkpoints: list[Checkpoint], vocabulary: str) -> None:
    """Set `model` to the (mean of the) parameters of verified checkpoints made with this vocabulary."""
    own = dict(model.named_parameters())
    mean: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        if checkpoint.manifest["vocabulary"] != vocabulary:
            raise CheckpointError(
                f"{checkpoint.path} was trained with another vocabulary than the run's subwords.model "
                f"({checkpoint.manifest['vocabulary'][:12]} there, {vocabulary[:12]} here): restore the right file"
            )
        problem = checkpoint.verify()
        if problem:
            raise CheckpointError(
                f"{checkpoint.path} is damaged ({problem}): choose another with decoding.checkpoint=STEP"
            )
        read = safetensors.torch.load_file(checkpoint.path / "model.safetensors")
        odd = sorted(own.keys() ^ read.keys()) or [name for name in own if own[name].shape != read[name].shape]
        if odd:
            raise CheckpointError(
                f"{checkpoint.path} does not fit the run's config.yaml (parameter {odd[0]}): one of them was changed"
            )
        for name, tensor in read.items():
            share = tensor if len(checkpoints) == 1 else tensor / len(checkpoints)
            mean[name] = mean[name] + share if name in mean else share
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(mean[name])
