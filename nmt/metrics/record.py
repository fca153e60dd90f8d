"""Lines of metrics.jsonl, for the code that writes them and the code that reads them.

A line is a flat JSON object. Its `kind` is "train" (means since the previous line) or "dev" (a validation). Figures of
MoE layers have keys such as "encoder.1.cv_load". Those of a validation's directions and watched texts have keys such as
"en-de/bleu".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from nmt.errors import CheckpointError
from nmt.files import read_regular

# Figures that a line may lack, with their defaults: older runs lack them, or there was nothing to measure.
_WITHOUT: Mapping[str, Any] = {"processes": 1, "word_perplexity": math.nan, "gpu_memory_gb": None, "bleu": None}


@dataclass(frozen=True)
class Line:
    """Base of both kinds of lines."""

    kind: ClassVar[str]

    step: int

    def to_dict(self) -> dict[str, Any]:
        """Return the line as it is written."""
        line: dict[str, Any] = {"step": self.step, "kind": self.kind}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "gates":
                line |= {f"{layer}.{name}": figure for layer, own in value.items() for name, figure in own.items()}
            elif each.name == "texts":
                line |= {f"{text}/{name}": figure for text, own in value.items() for name, figure in own.items()}
            elif value is not None:
                line[each.name] = value
        return line

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Self:
        """Return the record of a line, without unknown figures. ValueError if a figure is missing or not a number."""
        known: dict[str, Any] = {}
        for each in fields(cls):
            if each.name == "gates":
                known[each.name] = _nested(line, ".")
                continue
            if each.name == "texts":
                known[each.name] = _nested(line, "/")
                continue
            if each.name not in line and each.name not in _WITHOUT:
                raise ValueError(f"it has no {each.name}")
            known[each.name] = value = line.get(each.name, _WITHOUT.get(each.name))
            if each.name in line and not _is_number(value):
                raise ValueError(f"{each.name} is {value!r}")
        return cls(**known)


@dataclass(frozen=True)
class TrainLine(Line):
    """Figures of the steps since the previous line, of all processes together."""

    kind = "train"

    loss: float
    """Mean over target tokens, in nats, with label smoothing."""
    nll: float
    """The same without label smoothing."""
    perplexity: float
    """exp of `nll`."""
    gradient_norm: float
    """Mean over steps, before clipping."""
    skipped_updates: float
    """Number of steps that changed nothing because their gradient was not finite."""
    learning_rate: float
    """Learning rate of the newest step."""
    tokens_per_second: float
    """Source and target tokens, without padding, per second; the time of validations does not count."""
    tflops: float
    """10^12 operations per second, likewise."""
    processes: int
    """Number of processes that trained together."""
    gpu_memory_gb: float | None = None
    """Peak memory of the main process's GPU so far, in 10^9 bytes; None on a CPU."""
    gates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Figures of each MoE layer (`GateFigures.to_dict`)."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}")

    @property
    def tflops_per_process(self) -> float:
        """10^12 operations per second and process; on GPUs, this is per GPU."""
        return self.tflops / self.processes


@dataclass(frozen=True)
class DevLine(Line):
    """Figures of a validation."""

    kind = "dev"

    perplexity: float
    """Perplexity per subword."""
    word_perplexity: float
    """Perplexity per word."""
    bleu: float | None = None
    """Greedy BLEU; None with training.validation_sentences=0. Of several directions, it is the mean."""
    texts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Perplexity and BLEU of each direction, if there are several, and of each text of training.watch, by its name."""


L = TypeVar("L", bound=Line)


def read_lines(path: Path, record: type[L]) -> list[L]:
    """Return the lines of one kind in a metrics.jsonl; none if there is no file.

    A last line without its end, as after a crash, is ignored. CheckpointError, which names the line, if one is damaged.
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


def _nested(line: Mapping[str, Any], separator: str) -> dict[str, dict[str, float]]:
    """Return the figures whose keys have a separator, by what is before it: the name of a layer or text."""
    nested: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        owner, found, name = key.rpartition(separator)
        if found and _is_number(value):
            nested.setdefault(owner, {})[name] = value
    return nested
