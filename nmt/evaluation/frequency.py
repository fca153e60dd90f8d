"""How often words occur in the training text of a run, if that text is on this machine."""

from collections import Counter
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmt.config import Config, Direction
from nmt.data.prepared import Part, Prepared
from nmt.data.shards import MANIFEST
from nmt.data.subwords import Subwords
from nmt.errors import UserError
from nmt.run import RunDirectory
from nmt.text.words import words

MOST_PAIRS = 200_000
"""Training pairs that are read at most, evenly spread over the text."""


class Frequencies(NamedTuple):
    """Number of times that each word occurs in a text."""

    counts: Counter[str]
    where: str
    """The text, for the reader."""


def training_frequencies(
    run: RunDirectory, config: Config, subwords: Subwords, direction: Direction | None = None
) -> Frequencies | None:
    """Return the frequencies of source words in the training text of a run; None if the text is not here.

    `direction`: count in directions from its source only; None: in all.

    It is the prepared corpus in `corpus.directory` that has the fingerprint which the run recorded. Its sentences are
    subwords, so that words are counted as the vocabulary normalises them.
    """
    fingerprint = run.corpus_info()["fingerprint"]
    for manifest in sorted(Path(config.corpus.directory).glob(f"{escape(config.corpus.name)}-*/{MANIFEST}")):
        try:
            prepared = Prepared.open(manifest.parent)
            if prepared.fingerprint == fingerprint:
                source = direction and direction.source
                return _counted(
                    [part for part in prepared.parts() if source in (None, part.direction.source)], run, subwords
                )
        except (OSError, UserError, IndexError):  # IndexError: a subword that the vocabulary does not have
            continue
    return None


def _counted(parts: Sequence[Part], run: RunDirectory, subwords: Subwords) -> Frequencies:
    total = sum(len(part.shards) for part in parts)
    counts: Counter[str] = Counter()
    num_chosen = 0
    for part in parts:
        most = min(len(part.shards), max(1, MOST_PAIRS * len(part.shards) // max(total, 1)))
        chosen = np.unique(np.linspace(0, len(part.shards) - 1, most).astype(int))
        num_chosen += len(chosen)
        for pair in chosen:
            counts.update(words(subwords.decode(part.shards.source(pair).tolist())))
    share = "" if num_chosen == total else f"{num_chosen:,} of the "
    return Frequencies(counts, f"the training text of {run.path.resolve().name} ({share}{total:,} sentences)")


def source_frequencies(sources: Sequence[str]) -> Frequencies:
    """Return the frequencies of words in the sources of a test set."""
    return Frequencies(Counter(word for source in sources for word in words(source)), "the sources of the test set")
