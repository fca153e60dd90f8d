"""Which training pairs are stored together, and which directions and tags they serve."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nmt.config import CorpusConfig, Direction
from nmt.data.shards import ShardWriter


class Kind(NamedTuple):
    """Pairs that are stored together: those of two languages with one tag."""

    direction: Direction | None
    """None in a corpus without `corpus.directions`."""
    tag: str

    @classmethod
    def of(cls, corpus: CorpusConfig) -> "list[Kind]":
        """Return the kinds of training text that the settings name; text without a tag comes first."""
        directions = corpus.language_pairs() if corpus.directions else [None]
        tags = sorted(dict.fromkeys(corpus.train.tags or [""]), key=bool)
        return [cls(direction, tag) for direction in directions for tag in tags]

    @property
    def shards(self) -> str:
        """Name of their arrays: "train", or such as "train.en-de.bt"."""
        languages = str(self.direction or "")
        return ".".join(part for part in ("train", languages, self.tag) if part)

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.direction or ""), self.tag)))


def part_records(corpus: CorpusConfig, kinds: Iterable[Kind]) -> list[dict[str, Any]]:
    """Return the record of each direction and tag for the manifest: the name of its arrays, and if they are swapped."""
    kinds = list(kinds)
    return [
        {
            "name": " ".join(filter(None, (str(direction), kind.tag))),
            "source": direction.source,
            "target": direction.target,
            "tag": kind.tag,
            "shards": kind.shards,
            "swapped": kind.direction == direction.reverse,
        }
        for direction in corpus.all_directions()
        for kind in kinds
        if kind.direction in (None, direction, direction.reverse)
    ]


def longest_source(corpus: CorpusConfig, writers: Mapping[Kind, ShardWriter]) -> int:
    """Return the subwords of the longest source in any direction."""
    by_shards = {kind.shards: writer.longest for kind, writer in writers.items()}
    return max(
        by_shards[part["shards"]]["target" if part["swapped"] else "source"] for part in part_records(corpus, writers)
    )
