"""metrics.jsonl: what a line contains, for the code that writes it and the code that reads it.

A line is a flat JSON object. Its `kind` is "train" (means since the previous line) or "dev" (a validation). Figures of
MoE layers have keys such as "encoder.1.cv_load".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from nmt.errors import CheckpointError
from nmt.files import read_regular

# What a line may lack: older runs have lines without it, or there is nothing to measure.
_WITHOUT: Mapping[str, Any] = {"processes": 1, "word_perplexity": math.nan, "gpu_memory_gb": None, "bleu": None}


@dataclass(frozen=True)
class Line:
    """What both kinds share."""

    kind: ClassVar[str]

    step: int

    def to_dict(self) -> dict[str, Any]:
        """The line as it is written."""
        line: dict[str, Any] = {"step": self.step, "kind": self.kind}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "gates":
                line |= {f"{layer}.{name}": figure for layer, own in value.items() for name, figure in own.items()}
            elif value is not None:
                line[each.name] = value
        return line

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Self:
        """The record of a line. ValueError if it lacks something; what a newer program adds is left out."""
        known: dict[str, Any] = {}
        for each in fields(cls):
            if each.name == "gates":
                known[each.name] = _gates_of(line)
                continue
            if each.name not in line and each.name not in _WITHOUT:
                raise ValueError(f"it has no {each.name}")
            known[each.name] = value = line.get(each.name, _WITHOUT.get(each.name))
            if each.name in line and not _is_number(value):
                raise ValueError(f"{each.name} is {value!r}")
        return cls(**known)


@dataclass(frozen=True)
class TrainLine(Line):
    """The updates since the line before, those of all processes together."""

    kind = "train"

    loss: float
    """Mean over target tokens, in nats, with label smoothing."""
    nll: float
    """The same without label smoothing."""
    perplexity: float
    """exp of `nll`."""
    gradient_norm: float
    """Mean over updates, before clipping."""
    skipped_updates: float
    """Updates that changed nothing because their gradient was not finite."""
    learning_rate: float
    """Of the newest update."""
    tokens_per_second: float
    """Source and target tokens, without padding; the time of validations does not count."""
    tflops: float
    """10^12 operations a second, likewise."""
    processes: int
    """How many trained together: the line is of all of them."""
    gpu_memory_gb: float | None = None
    """The most that the main process's GPU held so far, in 10^9 bytes; None on a CPU."""
    gates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Figures of each MoE layer (`GateFigures.to_dict`)."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}")

    @property
    def tflops_per_process(self) -> float:
        """10^12 operations a second of one process: of one GPU, where there are GPUs."""
        return self.tflops / self.processes


@dataclass(frozen=True)
class DevLine(Line):
    """A validation."""

    kind = "dev"

    perplexity: float
    """Of a subword piece."""
    word_perplexity: float
    """Of a word."""
    bleu: float | None = None
    """Greedy BLEU; None where training.validation_sentences=0."""


L = TypeVar("L", bound=Line)


def read_lines(path: Path, record: type[L]) -> list[L]:
    """The lines of a kind in a metrics.jsonl; none if there is no file. CheckpointError names a line that is damaged.

    A last line that a crash cut short is left out.
    """
    if not path.is_file():
        return []
    found = []
    try:
        texts = read_regular(path).decode(errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for number, text in enumerate(texts[:-1], start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("it is no object")
            if line.get("kind") == record.kind:
                found.append(record.of(line))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}, line {number}, is not what training writes: {error}") from error
    return found


def step_of(text: str) -> float:
    """Return the step of a line of the file; infinite if it has none, such as a line that a crash cut short."""
    try:
        step = json.loads(text)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if _is_number(step) else math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _gates_of(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    gates: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        layer, dot, figure = name.rpartition(".")
        if dot and _is_number(value):
            gates.setdefault(layer, {})[figure] = value
    return gates
