"""Write the arrays of a preparation block by block, so that it resumes after the last one if it is killed.

The journal is a small file beside the arrays. It has their sizes after some block, and the counts up to it. What the
arrays have beyond these sizes is cut off on restart.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nmt.data.kinds import Kind
from nmt.data.shards import ShardWriter, can_resume
from nmt.files import read_json, write_atomically
from nmt.preparation.encoding import FINAL_PAIRS, Encoded
from nmt.preparation.tally import Tally

JOURNAL = "journal.json"
_SAVE_SECONDS = 10.0
_MOST_EXAMPLES = {"final": FINAL_PAIRS}
_SHAPE = {
    "key": str,
    "blocks": int,
    "sizes": {str: {"pairs": int, "pieces": {str: int}, "longest": {str: int}}},
    "tally": Tally.shape(),
}


class Journal:
    """The training arrays of a corpus, with the counts of the blocks that are in them."""

    def __init__(self, folder: Path, kinds: list[Kind], vocabulary_size: int, key: str) -> None:
        """Open the arrays after the last saved block; begin anew if the journal has another `key`."""
        self._path = folder / JOURNAL
        self._key = key
        record = _read(self._path, key)
        if record and not all(
            kind.shards in record["sizes"]
            and can_resume(folder, vocabulary_size, kind.shards, record["sizes"][kind.shards])
            for kind in kinds
        ):
            record = None
        self.num_blocks: int = record["blocks"] if record else 0
        """Blocks whose pairs are in the arrays."""
        self.tally = Tally.of(record["tally"]) if record else Tally()
        sizes: Mapping[str, Any] = record["sizes"] if record else {}
        self.writers = {
            kind: ShardWriter(folder, vocabulary_size, kind.shards, resume=sizes.get(kind.shards)) for kind in kinds
        }
        self._saved = time.monotonic()

    def append(self, encoded: Encoded) -> None:
        """Add the next block."""
        for writer, (source, target) in zip(self.writers.values(), encoded.sides, strict=True):
            writer.append_flat(source.ids, source.lengths, target.ids, target.lengths)
        self.tally.add(encoded.tally, _MOST_EXAMPLES)
        self.num_blocks += 1
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Make sure that a restart resumes here."""
        for writer in self.writers.values():
            writer.sync()
        record = {
            "key": self._key,
            "blocks": self.num_blocks,
            "sizes": {kind.shards: writer.sizes() for kind, writer in self.writers.items()},
            "tally": self.tally.to_dict(),
        }
        write_atomically(self._path, json.dumps(record).encode())
        self._saved = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """Return the journal of a preparation with this key; None if there is none."""
    try:
        record = read_json(path, _SHAPE)
    except (OSError, ValueError):
        return None
    return record if record["key"] == key else None
