"""Write the text of dev and test into a prepared folder, as it is: it is never filtered or normalised."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from nmt.config import CorpusConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.rules import HeldOutTexts
from nmt.corpus.sources import read_pairs, without_text
from nmt.data.shards import SIDES
from nmt.data.subwords import Subwords
from nmt.errors import DataError
from nmt.wording import counted

HELD_OUT = ("dev", "test")
_MOST_PAIRS = 1_000_000
_MOST_BYTES = 1 << 28


class Seen(NamedTuple):
    """Texts of one split that are looked for in the training text, without blanks at their ends."""

    sources: frozenset[str]
    targets: frozenset[str]


class Splits:
    """The text of dev and test of a corpus, in the folder of a preparation. Other processes read it from there."""

    def __init__(self, corpus: CorpusConfig, folder: Path, log: Callable[[str], None] = lambda _line: None) -> None:
        self.names: list[str] = []
        """Names of the files written so far."""
        self._corpus, self._folder, self._log = corpus, folder, log

    def write_files(self, reports: Mapping[str, ReadReport]) -> None:
        """Write the splits that the settings name files for. DataError if there is no dev text at all."""
        for split in HELD_OUT:
            written = self._write(split, read_pairs(self._corpus, split, reports[split]))
            if not written and (empty := without_text(self._corpus, split)):
                raise DataError(f"corpus.{split}: {empty}")
            if not written and split == "dev" and not self._corpus.dev.from_train:
                raise DataError(
                    f"corpus.dev: corpus.source={self._corpus.source} has no validation text, which is needed to score "
                    "a model: name its files, or set corpus.dev.from_train to hold out a few thousand pairs"
                )

    def write_held_out(self, held_out: Mapping[str, list[SentencePair]]) -> None:
        """Write the pairs that are held out of the training text."""
        for split, pairs in held_out.items():
            if pairs:
                self._write(split, self.in_all_directions({split: pairs}))
                self._log(
                    f"{self._corpus.name}: {counted(len(pairs), 'pair')} held out of the training text for {split}"
                )

    def _write(self, split: str, pairs: Iterable[SentencePair]) -> bool:
        """Write a split, and return whether it has any pair.

        There is one file per side, one of domains if there are any, and one of directions in a corpus with directions.
        """
        paths = [self._folder / f"{split}.{side}.txt" for side in (*SIDES, "domain", "direction")]
        num_pairs = num_bytes = num_blank = 0
        used = {paths[0], paths[1], *(paths[3:] if self._corpus.directions else ())}
        with ExitStack() as files:
            streams = [files.enter_context(path.open("wb")) for path in paths]
            for pair in pairs:
                lines = [f"{text}\n".encode() for text in (*pair[:3], pair.direction or "")]
                for stream, line in zip(streams, lines, strict=True):
                    stream.write(line)
                num_pairs += 1
                num_bytes += sum(map(len, lines))
                num_blank += not (pair.source.strip() and pair.target.strip())
                if pair.domain:
                    used.add(paths[2])
                # A run loads this text into memory.
                if num_pairs > _MOST_PAIRS or num_bytes > _MOST_BYTES:
                    raise DataError(
                        f"corpus.{split} has more than {_MOST_PAIRS:,} pairs or {_MOST_BYTES:,} bytes: a few thousand "
                        "pairs are enough to score a model; name smaller files"
                    )
        if num_pairs and num_blank == num_pairs:
            raise DataError(f"corpus.{split}: all of its {num_pairs:,} pairs have a blank side: name other files")
        if num_blank:
            self._log(f"{self._corpus.name}: {num_blank:,} of {num_pairs:,} pairs of {split} have a blank side")
        kept = [path for path in paths if path in used and num_pairs]
        for path in paths:
            if path not in kept:
                path.unlink()
        self.names += [path.name for path in kept]
        return bool(kept)

    def in_all_directions(self, held_out: Mapping[str, list[SentencePair]]) -> Iterator[SentencePair]:
        """Yield the held-out pairs of all splits in each direction of the corpus between their languages."""
        return chain.from_iterable(map(self._in_all_directions, chain.from_iterable(held_out.values())))

    def _in_all_directions(self, pair: SentencePair) -> list[SentencePair]:
        """Return a pair of the training text in each direction of the corpus between its languages."""
        if pair.direction is None:
            return [pair]
        back = pair._replace(source=pair.target, target=pair.source, direction=pair.direction.reverse)
        both = {pair.direction: pair, pair.direction.reverse: back}
        return [both[direction] for direction in self._corpus.all_directions() if direction in both]

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """Return the sources and targets of a split, as they were written; empty if it has no text."""
        paths = [self._folder / f"{split}.{side}.txt" for side in SIDES]
        if not paths[0].exists():
            return [], []
        source, target = (path.read_bytes().decode().split("\n")[:-1] for path in paths)
        return source, target

    def directions(self, split: str) -> list[str]:
        """Return the direction of each pair of a split, such as "en-de"."""
        path = self._folder / f"{split}.direction.txt"
        if path.exists():
            return path.read_bytes().decode().split("\n")[:-1]
        return [str(self._corpus.sides)] * len(self.texts(split)[0])

    def seen(self) -> dict[str, Seen]:
        """Return the texts of each split, to be looked for in the training text."""
        return {
            split: Seen(*(frozenset(text.strip() for text in side) for side in self.texts(split))) for split in HELD_OUT
        }

    def held_out_texts(self) -> HeldOutTexts:
        """Return the texts of both splits by language; none if no rule of the corpus needs them."""
        if not self._corpus.filters.test_overlap:
            return HeldOutTexts()
        return HeldOutTexts.of(
            (direction, source, target)
            for split in HELD_OUT
            for direction, source, target in zip(self.directions(split), *self.texts(split), strict=True)
        )

    def warn_of_long_lines(self, subwords: Subwords) -> None:
        """Log which pairs are too long to be scored whole."""
        from nmt.data.held_out import describe_cut, encode_pairs  # loads PyTorch, which nothing else here needs

        for split in HELD_OUT:
            if told := describe_cut(encode_pairs(subwords, *self.texts(split)).cut):
                self._log(f"{self._corpus.name}: {split}: {told}")


def texts_of_files(corpus: CorpusConfig) -> HeldOutTexts:
    """Return the texts of the splits that the settings name files for."""
    return HeldOutTexts.of(
        (str(pair.direction or corpus.sides), pair.source, pair.target)
        for split in HELD_OUT
        for pair in read_pairs(corpus, split, ReadReport())
    )
