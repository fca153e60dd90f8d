"""The folder of a run, which has everything that commands need:

config.yaml       all settings it was started with
subwords.model    its vocabulary
corpus.json       fingerprint and counts of the text it was trained on
text/             dev and test text, so that the run can be scored anywhere
checkpoints/      see nmt/checkpoint.py
RUN_STATUS.json   state (running, finished, stopped or failed), exit status, step, newest checkpoint, and the process
                  that wrote it; a "running" run without that process has died. "Stopped" is by a signal, after saving
metrics.jsonl     one line per logged step; tensorboard/ has the same as curves
report/           output of nmt evaluate and nmt experts; tune.json: settings before nmt evaluate --tune changed them
.lock             the process that is training the run (nmt/lock.py)

A folder that `nmt export` wrote has the first three files. Instead of text and checkpoints, it has one set of
parameters, model.safetensors, with manifest.json and the model card README.md. Commands that only read accept it as a
run.

Neither kind of folder is trusted. All files must be inside it, so that no command writes elsewhere. Small files are
read up to a maximum size and checked for their expected structure. Nothing in them is executed.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from nmt.checkpoint import EXPORTED_PARAMETERS, MANIFEST, Checkpoint, choose, exported_checkpoint, list_checkpoints
from nmt.config import Config, DecodingConfig, Direction
from nmt.config.reading import UnknownSettingError, parse_yaml, put_setting, read_value
from nmt.data.prepared import FACTS, have_texts
from nmt.errors import CheckpointError, DataError, StorageError, UserError
from nmt.files import differs, foreign_entry, read_json, read_regular, remove, write_atomically
from nmt.lock import Held, locked
from nmt.process import host_name, pid_to_signal

# Settings that may be changed when a run is resumed. None changes what a step computes, except that schedules linear
# and wsd end at max_steps or max_minutes, and that freeze decides what a step changes. evaluation.* changes no step
# either, but BLEU scores with different tokenisers cannot be compared across checkpoints.
_SAFE_TO_CHANGE = (
    "run.name",
    "run.directory",
    "parallel.",
    "decoding.",
    "corpus.directory",
    "corpus.root",
    "training.device",
)
_SAFE_TRAINING = (
    "max_steps",
    "max_minutes",
    "log_every",
    "validate_every",
    "validation_sentences",
    "watch",
    "checkpoint_every",
    "keep_checkpoints",
    "patience",
    "freeze",
)
_ALWAYS_WRITTEN = ("run", "corpus", "model", "training", "decoding")
"""The sections that every version of the program has written to config.yaml, in this order."""
# Settings of older versions that have no effect any more: every micro-batch mixes all lengths, and search
# batches are bounded by their tokens.
_RETIRED = ("training.bands", "training.alike", "decoding.batch_sentences")
_RESTORE_TEXT = "restore it, for example with the command that trained the run"

_MOST_CONFIG_BYTES = 1 << 20
_LOCK = ".lock"
SHARED_MARK = ".shared"
"""Written by the main process when several train, so that each can check that it sees the same file system."""
_PLACES = (
    *("config.yaml", "subwords.model", "corpus.json", "text", "checkpoints", "RUN_STATUS.json", "metrics.jsonl"),
    *("tensorboard", "report", _LOCK, SHARED_MARK, MANIFEST, EXPORTED_PARAMETERS),
)
"""All files and folders that commands read or write in a run or an exported model."""
_CORPUS = {"name": str, "fingerprint": str, **FACTS}
STARTED_FROM = "started_from"
"""Key in corpus.json of the run or exported model that a run started from (`run.start_from`); others lack it."""
_STARTED_FROM = {"name": str, "steps": [int], "fingerprint": str}
_STATUS = {"state": str, "code": (int, None), "message": str, "step": int, "checkpoint": (str, None)}
_TUNED = {"started": {str: float}, "chosen": {str: float}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
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
        self.tuned_path = self.report / "tune.json"

    @classmethod
    def existing(cls, name: str) -> "RunDirectory":
        """Return the run or exported model at path `name`, or else at runs/`name`.

        CheckpointError if there is none, if part of it is outside its folder, or if a file of an exported model has
        changed. Parameters are only verified when they are read.
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
        """True if this folder is an exported model rather than a run, even if damaged."""
        sealed = self.config_path.exists() and (self.path / MANIFEST).exists()
        return sealed or (self.path / EXPORTED_PARAMETERS).exists()

    def check_places(self) -> None:
        """Check that everything that commands read or write is inside this folder; else CheckpointError.

        Otherwise, a command that writes to a folder from somebody else could change files outside it.
        """
        problem = foreign_entry(self.path, _PLACES)
        if problem:
            raise CheckpointError(
                f"{problem}: all files of a run must be inside its folder; remove it, or put the file there"
            )

    @contextmanager
    def training(self) -> Iterator[None]:
        """Lock the run for training within this context.

        CheckpointError, which names the other process, if one is training it. StorageError if it cannot be written.
        """
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
                raise CheckpointError(f"{self.path} is damaged ({problem}): copy it again from its source")

    def config(self, changes: Sequence[str] = ()) -> Config:
        """Return the run's configuration with changes such as "decoding.beam_size=8".

        CheckpointError if config.yaml cannot be read; UserError or ValueError for a change that is not allowed.
        """
        for change in changes:
            if not change.startswith("decoding."):
                hint = " (nmt evaluate has --tokenize)" if change.startswith("evaluation.") else ""
                raise UserError(f"{change}: only decoding.* may be changed for a trained run{hint}")
        return self._changed(changes)

    def training_config(self, changes: Sequence[str] = ()) -> Config:
        """Return the configuration for resuming: the run's own, with changes such as "training.max_steps=2000".

        `run.name` and `run.directory` are those of this folder, which may have been moved. CheckpointError if
        config.yaml cannot be read or this is an exported model. UserError or ValueError for a change that cannot be
        read. `start_or_continue` rejects changes that affect what a step computes.
        """
        if self.exported:
            raise CheckpointError(f"{self.path} is an exported model, which cannot be trained: give the run itself")
        for change in changes:
            key = change.partition("=")[0]
            if change.startswith(("+", "~")) or "." not in key or "=" not in change:
                raise UserError(f"{change}: a run has its own settings; change one with KEY=VALUE (see nmt settings)")
            if key.startswith("run."):
                raise UserError(f"{change}: the run is {self.path}; leave {key} out")
        config = self._changed(changes)
        if (Path(config.run.directory) / config.run.name).resolve() != self.path.resolve():
            path = self.path if self.path.name else self.path.resolve()
            config = replace(config, run=replace(config.run, name=path.name, directory=str(path.parent)))
        return config

    def _changed(self, changes: Sequence[str]) -> Config:
        settings = self._stored().to_dict()
        for key, _, text in (change.partition("=") for change in changes):
            put_setting(Config, settings, key, read_value(Config, key, text))
        return Config.from_dict(settings)

    def _stored(self) -> Config:
        """Return the configuration in config.yaml, with defaults for settings that are newer than the run."""
        try:
            stored = parse_yaml(read_regular(self.config_path, _MOST_CONFIG_BYTES).decode())
            if not stored:
                raise ValueError("it is empty")
            for key in _RETIRED:
                section, _, name = key.partition(".")
                if isinstance(stored, dict) and isinstance(stored.get(section), dict):
                    stored[section].pop(name, None)
            config = Config.from_dict(stored)
            # Half of a file can be valid YAML, and the defaults of the other half are not the run's settings.
            missing = [section for section in _ALWAYS_WRITTEN if section not in stored]
            if missing:
                raise ValueError(f"{missing[0]}.* is missing")
            return config
        except UnknownSettingError as error:
            raise CheckpointError(
                f"{self.config_path} has {error.key}, a setting that this version of nmt does not have: use the newer "
                "version that wrote it (nmt --version)"
            ) from error
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.config_path} is damaged ({problem}): restore it, or choose another run"
            ) from error

    def write_tuned(self, chosen: Mapping[str, float], report: Mapping[str, Any]) -> None:
        """Write settings `decoding.*` that were chosen by tuning to config.yaml, and `report` to report/tune.json.

        Besides, the report records these settings as they were before any tuning ("started"), so that resuming the run
        with its first settings keeps the chosen ones. StorageError if it cannot be written.
        """
        before = asdict(self._stored().decoding)
        started = {name: before[name] for name in chosen} | self._tuned().get("started", {})
        content = {**report, "started": started, "chosen": dict(chosen)}
        try:
            self.report.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.report}: {error.strerror or error}") from error
        write_atomically(self.tuned_path, json.dumps(content, indent=2).encode())
        self._write_config(self._changed([f"decoding.{name}={value}" for name, value in chosen.items()]))

    def _tuned(self) -> dict[str, dict[str, float]]:
        """Return what `write_tuned` recorded; empty if nothing was tuned or if other settings were chosen since."""
        try:
            tuned = read_json(self.tuned_path, _TUNED)
        except (OSError, ValueError):
            return {}
        now = asdict(self._stored().decoding)
        return tuned if all(now.get(name) == value for name, value in tuned["chosen"].items()) else {}

    def _keep_tuned(self, config: Config) -> Config:
        """Return `config` with the tuned settings in place of those that the run was started with."""
        tuned, settings = self._tuned(), config.to_dict()
        for name, value in tuned.get("chosen", {}).items():
            if settings["decoding"][name] == tuned["started"].get(name):
                settings["decoding"][name] = value
        return Config.from_dict(settings)

    def _write_config(self, config: Config) -> None:
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())

    def chosen(self, decoding: DecodingConfig) -> list[Checkpoint]:
        """Return the checkpoints that `decoding.checkpoint` names; several if it names their mean.

        An exported model has a single one, and accepts only the default name. CheckpointError if there is none.
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
        """Create the run, or check that an existing one is resumed with the same settings, vocabulary and text.

        Return a line for each changed setting that may differ. Tuned settings of decoding remain, unless `config` has
        others than those the run was started with. CheckpointError (settings, vocabulary) or DataError (text), which
        name the difference.
        """
        continued = self.config_path.exists()
        config = self._keep_tuned(config) if continued else config
        changed = self.check_settings(config) if continued else []
        if continued:
            self._check_text(config, corpus)
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
            # Without config.yaml, an existing file is from a failed start.
            write_atomically(self.subwords_path, subwords_model.read_bytes())
        write_atomically(self.corpus_path, json.dumps(corpus, indent=2).encode())
        # Last, because a folder with this file is a run.
        self._write_config(config)
        return changed

    def check_settings(self, config: Config) -> list[str]:
        """Return a line for each setting that differs from the run's own. CheckpointError if one may not differ."""
        stored = self._stored()
        old, new = flatten(stored.to_dict()), flatten(config.to_dict())
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        safe = (*_SAFE_TO_CHANGE, *(f"training.{name}" for name in _SAFE_TRAINING))
        if config.training.best_by != "bleu":
            safe += ("evaluation.",)
        before, mixture = stored.corpus.mixture, config.corpus.mixture
        same_weights = list(before.values()) == list(mixture.values())
        if mixture != before and same_weights and have_texts(mixture, self.corpus_info().get("mixture", [])):
            # The same texts by other names: the run that named one may have been renamed, moved or deleted.
            safe += ("corpus.mixture.",)
        unsafe = [key for key in differing if not key.startswith(safe)]
        if unsafe:
            shown = "; ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in unsafe)
            # A start that failed has left settings, but nothing that was trained with them.
            remedy = "" if list_checkpoints(self.checkpoints) else ", or delete this folder, which has no checkpoint"
            raise CheckpointError(
                f"{self.path} was started with other settings ({shown}): choose another run.name, or give the old ones"
                f"{remedy}"
            )
        return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in differing]

    def _check_text(self, config: Config, corpus: dict[str, Any]) -> None:
        before = self.corpus_info()
        if before["fingerprint"] != corpus["fingerprint"]:
            raise DataError(
                f"{self.path} was trained on other text or another vocabulary than {config.corpus.name} now has "
                f"({before['fingerprint'][:12]} then, {corpus['fingerprint'][:12]} now): choose another run.name"
            )
        if before.get("mixture", []) != corpus.get("mixture", []):
            raise DataError(
                f"{self.path} was trained on other text than the corpora of corpus.mixture now have: choose another "
                "run.name"
            )

    def corpus_info(self) -> dict[str, Any]:
        """Return the contents of corpus.json. CheckpointError if it is missing or damaged."""
        try:
            info: dict[str, Any] = read_json(self.corpus_path, _CORPUS)
            if STARTED_FROM in info and (wrong := differs(info[STARTED_FROM], _STARTED_FROM, STARTED_FROM)):
                raise ValueError(wrong)
            return info
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.corpus_path} is missing or damaged ({problem}): the run is not usable"
            ) from error

    def write_status(self, state: str, code: int | None, message: str, step: int, checkpoint: str | None) -> None:
        """Write RUN_STATUS.json; `state` is running, finished, stopped or failed, `code` the exit status."""
        content = {"state": state, "code": code, "message": message, "step": step, "checkpoint": checkpoint}
        content |= {"pid": pid_to_signal(), "host": host_name()}
        write_atomically(self.status_path, json.dumps(content, indent=2).encode())

    def status(self) -> dict[str, Any]:
        """Return what `write_status` wrote last; empty if the file is missing or damaged."""
        try:
            return read_json(self.status_path, _STATUS)
        except (OSError, ValueError):
            return {}

    def write_text(
        self,
        split: str,
        sources: list[str],
        targets: list[str],
        domains: list[str],
        directions: Sequence[Direction] = (),
    ) -> None:
        """Write a held-out split to the run, one sentence per line; `directions` if there are several."""
        folder = self.path / "text"
        folder.mkdir(exist_ok=True)
        columns = {"source": sources, "target": targets, "domain": domains, "direction": list(map(str, directions))}
        for side, lines in columns.items():
            if side == "direction" and not lines:
                remove(folder / f"{split}.{side}")
                continue
            write_atomically(folder / f"{split}.{side}", "".join(f"{line}\n" for line in lines).encode())

    def text(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """Return (sources, targets, domains) of a split that `write_text` wrote; three empty lists if there is none.

        There are as many domains as pairs, or none. CheckpointError, which names the file, if one is damaged.
        """
        sources = self._column(split, "source")
        targets, domains = (self._beside(sources, split, side) for side in ("target", "domain"))
        return sources, targets, domains

    def directions(self, split: str) -> list[Direction]:
        """Return the direction of each pair of a split; empty if the run has a single one. Errors as for `text`."""
        lines = self._beside(self._column(split, "source"), split, "direction")
        try:
            return [Direction.of(line) for line in lines]
        except ValueError as error:
            path = self.path / "text" / f"{split}.direction"
            raise CheckpointError(f"{path} is damaged ({error}): {_RESTORE_TEXT}") from error

    def _beside(self, sources: list[str], split: str, side: str) -> list[str]:
        lines = self._column(split, side)
        if len(lines) != len(sources) and (lines or side == "target"):
            raise CheckpointError(
                f"{self.path / 'text' / split}.{side} is damaged (it has {len(lines):,} lines, but {split}.source "
                f"{len(sources):,}): {_RESTORE_TEXT}"
            )
        return lines

    def _column(self, split: str, side: str) -> list[str]:
        path = self.path / "text" / f"{split}.{side}"
        try:
            text = read_regular(path).decode()
        except FileNotFoundError:
            text = ""
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({_reason(error)}): {_RESTORE_TEXT}") from error
        if text and not text.endswith("\n"):
            raise CheckpointError(f"{path} is damaged (its last line has no end): {_RESTORE_TEXT}")
        return text.split("\n")[:-1]


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    return getattr(error, "strerror", None) or str(error)
