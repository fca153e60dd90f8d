"""Make the corpus europarl_en_fr from the public files of Europarl v7: 1,000,000 training, 3,000 dev, 3,000 test pairs.

    wget https://www.statmt.org/europarl/v7/fr-en.tgz && tar xzf fr-en.tgz
    python scripts/make_europarl.py europarl-v7.fr-en.en europarl-v7.fr-en.fr data/europarl
    nmt prepare corpus=europarl_en_fr

The script drops pairs with an empty side, with more than 100 words on a side, with at least three times as many words
on one side as on the other, and exact repetitions. A hash of its text alone decides where a pair goes, so the same text
gives identical files. The script also drops training pairs whose English or French sentence is in dev or test. Each of
train-0 to train-3 is an even sample of the whole text, in the order of the sessions.
"""

import argparse
import gzip
import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.sources import read_pairs

_MOST_WORDS = 100
_MOST_RATIO = 3.0
_TRAIN_FILES = 4
LANGUAGES = ("en", "fr")

Hashes = NDArray[np.uint64]


class Kept(NamedTuple):
    """Hashes of each kept pair and of its two sentences, in the order of the text."""

    pair_N: Hashes
    english_N: Hashes
    french_N: Hashes


def pairs_of(english: Path, french: Path) -> Iterator[tuple[str, str]]:
    """Yield the kept pairs, with repetitions."""
    corpus = CorpusConfig(source="files", source_language="en", target_language="fr")
    corpus.train = FilesConfig(source=[str(english)], target=[str(french)])
    for pair in read_pairs(corpus, "train"):
        words = len(pair.source.split()), len(pair.target.split())
        if min(words) > 0 and max(words) <= _MOST_WORDS and max(words) < _MOST_RATIO * min(words):
            yield pair.source, pair.target


def hash_of(*texts: str) -> int:
    """Return a hash of 64 bits that depends on the text only."""
    return int.from_bytes(hashlib.blake2b("\n".join(texts).encode(), digest_size=8).digest(), "big")


def read(english: Path, french: Path) -> Kept:
    """Return the hashes of all kept pairs."""
    rows = [(hash_of(*pair), hash_of(pair[0]), hash_of(pair[1])) for pair in pairs_of(english, french)]
    return Kept(*np.array(rows, dtype=np.uint64).reshape(-1, 3).T)


def places_of(kept: Kept, train: int, held_out: int) -> NDArray[np.int8]:
    """Return where each pair goes: 0 to 3 for the training files, 4 for dev, 5 for test, -1 for nowhere."""
    place_N = np.full(len(kept.pair_N), -1, np.int8)
    _, first = np.unique(kept.pair_N, return_index=True)  # the first of repetitions, in ascending order of hashes
    for number, place in enumerate((_TRAIN_FILES, _TRAIN_FILES + 1)):
        place_N[first[number * held_out : (number + 1) * held_out]] = place
    out_N = place_N >= _TRAIN_FILES
    seen_N = np.isin(kept.english_N, kept.english_N[out_N]) | np.isin(kept.french_N, kept.french_N[out_N])
    free = first[2 * held_out :]
    free = free[~seen_N[free]][:train]
    # Equal numbers per file: each takes a quarter of the range of hashes.
    place_N[free] = np.arange(len(free)) * _TRAIN_FILES // max(len(free), 1)
    return place_N


def write(english: Path, french: Path, place_N: NDArray[np.int8], folder: Path) -> None:
    """Write the twelve files. Each gets its final name when it is complete."""
    names = [*(f"train-{number}" for number in range(_TRAIN_FILES)), "dev", "test"]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [[folder / f"{name}.{language}.gz" for language in LANGUAGES] for name in names]
    parts = [[path.with_name(f"{path.name}.part") for path in sides] for sides in paths]
    with ExitStack() as stack:
        streams = [[stack.enter_context(_opened(part)) for part in sides] for sides in parts]
        for place, pair in zip(place_N.tolist(), pairs_of(english, french), strict=True):
            if place >= 0:
                for stream, text in zip(streams[place], pair, strict=True):
                    stream.write(f"{text}\n".encode())
    for sides in zip(parts, paths, strict=True):
        for part, path in zip(*sides, strict=True):
            part.replace(path)


def _opened(path: Path) -> IO[bytes]:
    # No name and no time in the header, so that the same text gives the same file.
    return gzip.GzipFile("", "wb", fileobj=path.open("wb"), mtime=0)


def main(arguments: list[str] | None = None) -> int:
    """Make the corpus and print the number of its pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("english", type=Path, help="europarl-v7.fr-en.en")
    parser.add_argument("french", type=Path, help="europarl-v7.fr-en.fr")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="such as data/europarl")
    parser.add_argument("--train", type=int, default=1_000_000, metavar="N", help="training pairs (default: 1,000,000)")
    parser.add_argument(
        "--held-out", type=int, default=3000, metavar="N", help="pairs in dev and in test (default: 3000 each)"
    )
    options = parser.parse_args(arguments)
    try:
        kept = read(options.english, options.french)
        place_N = places_of(kept, options.train, options.held_out)
        write(options.english, options.french, place_N, options.out)
    except (ValueError, OSError) as error:
        print(f"make_europarl: {error}", file=sys.stderr)
        return 3
    counts = np.bincount(place_N[place_N >= 0], minlength=_TRAIN_FILES + 2)
    print(f"{counts[:_TRAIN_FILES].sum():,} training pairs, {counts[-2]:,} of dev, {counts[-1]:,} of test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
