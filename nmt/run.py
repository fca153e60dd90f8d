"""The folder of a run, which holds all that its commands need:

config.yaml       the whole configuration it was started with
subwords.model    its vocabulary
corpus.json       fingerprint and counts of the text it was trained on
text/             dev and test text, so that it can be scored anywhere
checkpoints/      see nmt/checkpoint.py
RUN_STATUS.json   running, finished, stopped (by a signal, saved) or failed; exit status, step, newest checkpoint, and
                  the process that wrote it: a run that says "running" without that process has died
metrics.jsonl     one line per logged step; tensorboard/ has the same as curves
report/           what nmt evaluate and nmt experts wrote
.lock             who trains it now (nmt/lock.py)

A folder that `nmt export` wrote has the first three and, instead of text and checkpoints, one set of parameters under a
manifest: model.safetensors, manifest.json, and README.md, the model card. Commands that only read take it like a run.

Either may come from anybody. All of it must lie in the folder, so that no command writes elsewhere; small files are
read up to a bound and have the stated shape; nothing in them is run.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nmt.checkpoint import EXPORTED_PARAMETERS, MANIFEST, Checkpoint, choose, exported_checkpoint
from nmt.config import Config, DecodingConfig, RunConfig
from nmt.config.reading import UnknownSettingError, parse_yaml, put_setting, read_value
from nmt.data.prepared import FACTS
from nmt.errors import CheckpointError, DataError, StorageError, UserError
from nmt.files import foreign_entry, read_json, read_regular, write_atomically
from nmt.lock import Held, locked
from nmt.process import host_name, pid_to_signal

# The sections of which settings may differ from those of the run whenever it is used.
_CHANGEABLE = ("decoding", "evaluation")
# What may differ when a run goes on: none of it changes what an update computes, but max_steps and max_minutes, which
# are where schedule=linear ends.
# Nor does evaluation.*, but BLEU by another tokeniser cannot be compared with that of earlier checkpoints.
_SAFE_TO_CHANGE = ("run.", "parallel.", "decoding.", "corpus.directory", "corpus.root", "training.device")
_SAFE_TRAINING = (
    "max_steps",
    "max_minutes",
    "log_every",
    "validate_every",
    "validation_sentences",
    "checkpoint_every",
    "keep_checkpoints",
    "patience",
)
_RESTORE_TEXT = "restore it, for instance with the command that trained the run"

_MOST_CONFIG_BYTES = 1 << 20
_LOCK = ".lock"
SHARED_MARK = ".shared"
"""Written by the main process of several, so that each can see whether it has the same file system."""
_PLACES = (
    *("config.yaml", "subwords.model", "corpus.json", "text", "checkpoints", "RUN_STATUS.json", "metrics.jsonl"),
    *("tensorboard", "report", _LOCK, SHARED_MARK, MANIFEST, EXPORTED_PARAMETERS),
)
"""All that commands read and write in a run or an exported model."""
_CORPUS = {"name": str, "fingerprint": str, **FACTS}
_STATUS = {"state": str, "code": (int, None), "message": str, "step": int, "checkpoint": (str, None)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class RunDirectory:
    """Paths and contents of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.subwords_path = path / "subwords.model"
        self.corpus_path = path / "corpus.json"
        self.checkpoints = path / "checkpoints"
        self.status_path = path / "RUN_STATUS.json"
        self.metrics_path = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.report = path / "report"

    @classmethod
    def existing(cls, name: str) -> "RunDirectory":
        """The run or exported model at path `name`, or runs/`name`.

        CheckpointError if there is none, if something of it lies elsewhere, or if a file of an exported model is not
        what was written. Its parameters are verified when they are read.
        """
        for run in (cls(Path(name)), cls(Path("runs") / name)):
            if run.exported or run.config_path.exists():
                run.check_places()
                if run.exported:
                    run._verify_exported()
                return run
        known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
        there = f"runs/ has {', '.join(known)}" if known else "there are no runs yet: start one with nmt train"
        close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise CheckpointError(f"{name} is not a run (no {Path(name) / 'config.yaml'}); {there}{hint}")

    @property
    def exported(self) -> bool:
        """Whether this is no run, but what `nmt export` made of one, whatever became of it since."""
        sealed = self.config_path.exists() and (self.path / MANIFEST).exists()
        return sealed or (self.path / EXPORTED_PARAMETERS).exists()

    def check_places(self) -> None:
        """CheckpointError if something that commands read or write here is elsewhere, or no file.

        A command that writes to a folder which somebody sent would else change files outside of it.
        """
        problem = foreign_entry(self.path, _PLACES)
        if problem:
            raise CheckpointError(f"{problem}: nothing of a run may lie elsewhere; remove it, or put the file there")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within, no other process trains this run. CheckpointError names the one that does; StorageError."""
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path / _LOCK))
            except Held as other:
                raise CheckpointError(
                    f"{self.path} is being trained by {other}: wait for it or stop it, or choose another run.name"
                ) from other
            except OSError as error:
                raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error
            yield

    def _verify_exported(self) -> None:
        checkpoint = exported_checkpoint(self.path)
        for name in checkpoint.manifest["files"]:
            problem = checkpoint.verify(name) if name != EXPORTED_PARAMETERS else None
            if problem:
                raise CheckpointError(f"{self.path} is damaged ({problem}): copy it again from where it came from")

    def config(self, changes: Sequence[str] = ()) -> Config:
        """The configuration that the run was started with, with changes such as "decoding.beam_size=8".

        CheckpointError if config.yaml cannot be read; UserError or ValueError for a change that is not allowed.
        """
        allowed = " and ".join(f"{section}.*" for section in _CHANGEABLE)
        for change in changes:
            if change.partition(".")[0] not in _CHANGEABLE:
                raise UserError(f"{change}: only {allowed} may be changed for a trained run")
        return self._changed(changes)

    def training_config(self, changes: Sequence[str] = ()) -> Config:
        """The configuration to resume training with: the run's own, with changes such as "training.max_steps=2000".

        `run.name` and `run.directory` are those of this folder, which may have been moved. CheckpointError if
        config.yaml cannot be read or this is an exported model; UserError or ValueError for a change that cannot be
        read. `start_or_continue` refuses those that would change what a step computes.
        """
        if self.exported:
            raise CheckpointError(f"{self.path} is an exported model, which cannot be trained: give the run itself")
        for change in changes:
            key = change.partition("=")[0]
            if change.startswith(("+", "~")) or "." not in key or "=" not in change:
                raise UserError(f"{change}: a run has its settings; change one of them by KEY=VALUE (nmt settings)")
            if key.startswith("run."):
                raise UserError(f"{change}: the run is {self.path}; leave {key} out")
        config = self._changed(changes)
        if (Path(config.run.directory) / config.run.name).resolve() != self.path.resolve():
            path = self.path if self.path.name else self.path.resolve()
            config = replace(config, run=RunConfig(path.name, str(path.parent)))
        return config

    def _changed(self, changes: Sequence[str]) -> Config:
        settings = self._stored().to_dict()
        for key, _, text in (change.partition("=") for change in changes):
            put_setting(Config, settings, key, read_value(Config, key, text))
        return Config.from_dict(settings)

    def _stored(self) -> Config:
        """What config.yaml says; settings that the run's version did not know have their defaults."""
        try:
            stored = parse_yaml(read_regular(self.config_path, _MOST_CONFIG_BYTES).decode())
            if not stored:
                raise ValueError("it is empty")
            return Config.from_dict(stored)
        except UnknownSettingError as error:
            raise CheckpointError(
                f"{self.config_path} has {error.key}, a setting that this version of nmt does not know: use the newer "
                "one that wrote it (nmt --version)"
            ) from error
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.config_path} is damaged ({problem}): restore it, or choose another run"
            ) from error

    def chosen(self, decoding: DecodingConfig) -> list[Checkpoint]:
        """The checkpoints whose parameters, or the mean of them, `decoding.checkpoint` names.

        An exported model has one, and takes no other name for it than the default. CheckpointError if there is none.
        """
        if not self.exported:
            return choose(self.checkpoints, decoding.checkpoint, decoding.average_checkpoints)
        if decoding.checkpoint != DecodingConfig.checkpoint:
            raise UserError(
                f"decoding.checkpoint={decoding.checkpoint}: {self.path} is an exported model, which has one set of "
                "parameters; leave it out"
            )
        return [exported_checkpoint(self.path)]

    def start_or_continue(self, config: Config, subwords_model: Path, corpus: dict[str, Any]) -> list[str]:
        """Create the run, or check that the one that stands here is being continued with the same settings and text.

        Returns one line for each harmless setting that changed. CheckpointError (settings, vocabulary) or DataError
        (text) names what differs.
        """
        continued = self.config_path.exists()
        changed = self._check_same(config, corpus) if continued else []
        keeps_vocabulary = continued and self.subwords_path.exists()
        if keeps_vocabulary and read_regular(self.subwords_path) != subwords_model.read_bytes():
            raise CheckpointError(
                f"{self.subwords_path} is not the vocabulary that the run was started with: restore it from "
                f"{subwords_model}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error
        if not keeps_vocabulary:
            # Without config.yaml, a file that stands here was left by a start that failed.
            write_atomically(self.subwords_path, subwords_model.read_bytes())
        write_atomically(self.corpus_path, json.dumps(corpus, indent=2).encode())
        # Last, since its presence is what makes the folder a run.
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())
        return changed

    def _check_same(self, config: Config, corpus: dict[str, Any]) -> list[str]:
        old = flatten(self._stored().to_dict())
        new = flatten(config.to_dict())
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        safe = (*_SAFE_TO_CHANGE, *(f"training.{name}" for name in _SAFE_TRAINING))
        if config.training.best_by != "bleu":
            safe += ("evaluation.",)
        unsafe = [key for key in differing if not key.startswith(safe)]
        if unsafe:
            shown = "; ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in unsafe)
            raise CheckpointError(
                f"{self.path} was started with other settings ({shown}): choose another run.name, or give the old ones"
            )
        before = self.corpus_info()
        if before["fingerprint"] != corpus["fingerprint"]:
            raise DataError(
                f"{self.path} was trained on other text or another vocabulary than {config.corpus.name} now has "
                f"({before['fingerprint'][:12]} then, {corpus['fingerprint'][:12]} now): choose another run.name"
            )
        return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in differing]

    def corpus_info(self) -> dict[str, Any]:
        """What the run recorded of its text."""
        try:
            return read_json(self.corpus_path, _CORPUS)
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.corpus_path} is missing or damaged ({problem}): the run is not usable"
            ) from error

    def write_status(self, state: str, code: int | None, message: str, step: int, checkpoint: str | None) -> None:
        """Leave word of how the run stands: running, finished, stopped (by a signal, saved) or failed."""
        content = {"state": state, "code": code, "message": message, "step": step, "checkpoint": checkpoint}
        content |= {"pid": pid_to_signal(), "host": host_name()}
        write_atomically(self.status_path, json.dumps(content, indent=2).encode())

    def status(self) -> dict[str, Any]:
        """What `write_status` left; empty if there is nothing to read."""
        try:
            return read_json(self.status_path, _STATUS)
        except (OSError, ValueError):
            return {}

    def write_text(self, split: str, sources: list[str], targets: list[str], domains: list[str]) -> None:
        """Keep a held-out split in the run, one sentence a line."""
        folder = self.path / "text"
        folder.mkdir(exist_ok=True)
        for side, lines in (("source", sources), ("target", targets), ("domain", domains)):
            write_atomically(folder / f"{split}.{side}", "".join(f"{line}\n" for line in lines).encode())

    def text(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """(sources, targets, domains) of a split that `write_text` kept; three empty lists if it is not there.

        There are as many domains as pairs, or none. CheckpointError that names the file if one is damaged.
        """
        folder = self.path / "text"
        columns = []
        for side in ("source", "target", "domain"):
            path = folder / f"{split}.{side}"
            try:
                text = read_regular(path).decode()
            except FileNotFoundError:
                text = ""
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged ({_reason(error)}): {_RESTORE_TEXT}") from error
            if text and not text.endswith("\n"):
                raise CheckpointError(f"{path} is damaged (its last line has no end): {_RESTORE_TEXT}")
            columns.append(text.split("\n")[:-1])
        sources, targets, domains = columns
        for side, lines in (("target", targets), ("domain", domains)):
            if len(lines) != len(sources) and (lines or side == "target"):
                raise CheckpointError(
                    f"{folder / split}.{side} is damaged (it has {len(lines):,} lines, but {split}.source "
                    f"{len(sources):,}): {_RESTORE_TEXT}"
                )
        return sources, targets, domains


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    return getattr(error, "strerror", None) or str(error)
