"""The vocabulary of a run, an exported model, a prepared corpus or a file, for another corpus to use.

Text of another corpus suits a model only if it has the same vocabulary, and if symbols mean the same.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmt.config import SubwordConfig
from nmt.data.prepared import VOCABULARY
from nmt.data.shards import MANIFEST
from nmt.data.subwords import Subwords
from nmt.data.symbols import Symbols
from nmt.errors import DataError
from nmt.files import read_json, read_regular

_RUN_RECORD = "corpus.json"  # an exported model has it too
_KEY = "corpus.subwords.vocabulary"


@dataclass(frozen=True)
class Inherited:
    """A vocabulary that was learned elsewhere, and the meanings of its symbols."""

    reference: str
    """What the setting names."""
    model: bytes
    symbols: Symbols

    @classmethod
    def of(cls, reference: str) -> "Inherited":
        """Read the vocabulary of a run or exported model (folder, or name in runs/), a prepared corpus, or a file.

        DataError if there is none or if it is damaged.
        """
        path = _located(reference)
        if path is None:
            raise DataError(
                f"{_KEY}={reference} is neither a run, an exported model or a prepared corpus nor a .model file: give "
                "the folder of one, a name in runs/, or learn"
            )
        try:
            model = read_regular(path)
            symbols = _symbols_beside(path) if path.name == VOCABULARY else Symbols()
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise DataError(f"{_KEY}={reference}: {path} cannot be used ({problem})") from error
        try:
            Subwords(model, str(path))
        except DataError as error:
            raise DataError(f"{_KEY}={reference}: {path} is not a vocabulary of this program, or is damaged") from error
        return cls(reference, model, symbols)

    def record(self) -> dict[str, Any]:
        """Return what the manifest of a corpus records of the vocabulary that it took."""
        sha256 = hashlib.sha256(self.model).hexdigest()
        return {"from": self.reference, "sha256": sha256, **self.symbols.to_dict()}


def vocabulary_size(config: SubwordConfig) -> int:
    """Return the number of subwords of a corpus that may not be prepared yet. DataError as `Inherited.of`."""
    return Subwords(Inherited.of(config.vocabulary).model).size if config.inherits else config.num_pieces


def why_other(recorded: Mapping[str, Any]) -> str:
    """Return why the vocabulary that a corpus took, by its record, is another one now; "" if it is not, or is gone."""
    reference = recorded["from"]
    if _located(reference) is None:
        return ""
    now = Inherited.of(reference).record()
    return "" if now == recorded else f"the vocabulary of {reference} has changed"


def _located(reference: str) -> Path | None:
    """Return the file of a vocabulary; None if there is none."""
    for path in (Path(reference), Path("runs") / reference):
        if path.is_file():
            return path
        if (path / VOCABULARY).is_file():
            return path / VOCABULARY
    return None


def _symbols_beside(model: Path) -> Symbols:
    """Return the meanings of symbols in the record beside a vocabulary; none for a file by itself."""
    for name in (_RUN_RECORD, MANIFEST):
        record = model.with_name(name)
        if record.exists():
            return Symbols.of(read_json(record, {str: object}), str(record))
    return Symbols()
