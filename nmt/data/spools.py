"""Filtered training text as plain files on disk, between reading it and encoding it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from nmt.corpus.filters import HoldOut
from nmt.corpus.pairs import SentencePair
from nmt.data.kinds import Kind
from nmt.data.shards import SIDES


class Spools:
    """The filtered training pairs, by kind. Pairs that are held out stay in the files, but are not yielded."""

    def __init__(self, folder: Path, kinds: Sequence[Kind], hold_out: HoldOut) -> None:
        self.num_pairs = dict.fromkeys(kinds, 0)
        """Pairs of each kind, without those held out after `hold_back`."""
        self._hold_out = hold_out
        self._paths = {kind: [folder / f"{kind.shards}.{side}.spool" for side in SIDES] for kind in kinds}
        self._streams: dict[Kind, list[BinaryIO]] = {}

    def append(self, pair: SentencePair) -> None:
        """Write a pair, within the context. One without a tag may be held out."""
        kind = Kind(pair.direction, pair.tag)
        for stream, text in zip(self._streams[kind], pair[:2], strict=True):
            stream.write(f"{text}\n".encode())
        self.num_pairs[kind] += 1
        if self._hold_out.wanted and not pair.tag:
            self._hold_out.offer(pair)

    @property
    def total(self) -> int:
        """Pairs of all kinds, without those held out after `hold_back`."""
        return sum(self.num_pairs.values())

    def hold_back(self) -> int:
        """Take the pairs that are held out, and all their copies, out of the counts. Return how many they are."""
        before = self.total
        if len(self.num_pairs) == 1:
            (kind,) = self.num_pairs
            self.num_pairs[kind] -= self._hold_out.num_copies
        else:
            # Which kind a copy has is not known, and copies in text with a tag were not offered.
            self.num_pairs = {kind: sum(1 for _ in self.pairs(kind)) for kind in self.num_pairs}
        return before - self.total

    def pairs(self, kind: Kind) -> Iterator[tuple[str, str]]:
        """Yield (source, target) of a kind, without the pairs held out. Call it after the context."""
        with ExitStack() as files:
            sides = [files.enter_context(path.open("rb")) for path in self._paths[kind]]
            for source, target in zip(*sides, strict=True):
                pair = source[:-1].decode(), target[:-1].decode()
                if not (self._hold_out.wanted and self._hold_out.holds(*pair)):
                    yield pair

    def sample(self, count: int) -> Iterator[tuple[str, str]]:
        """Yield `count` of the pairs, spread evenly over all of them."""
        taken = number = 0
        for kind in self.num_pairs:
            for pair in self.pairs(kind):
                number += 1
                # After n pairs, the sample has n * count / total of them, rounded down.
                if number * count // self.total > taken:
                    taken += 1
                    yield pair

    def remove(self) -> None:
        """Remove the files."""
        for paths in self._paths.values():
            for path in paths:
                path.unlink()

    def __enter__(self) -> "Spools":
        self._streams = {kind: [path.open("wb") for path in paths] for kind, paths in self._paths.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.close()
