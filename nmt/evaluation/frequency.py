"""How often words occur in the training text of a run, if that text is on this machine."""

from collections import Counter
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmt.config import Config
from nmt.data.prepared import Prepared
from nmt.data.shards import MANIFEST, ParallelShards
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


def training_frequencies(run: RunDirectory, config: Config, subwords: Subwords) -> Frequencies | None:
    """Return the frequencies of source words in the training text of a run; None if the text is not here.

    It is the prepared corpus in `corpus.directory` that has the fingerprint which the run recorded. Its sentences are
    subwords, so that words are counted as the vocabulary normalises them.
    """
    fingerprint = run.corpus_info()["fingerprint"]
    for manifest in sorted(Path(config.corpus.directory).glob(f"{escape(config.corpus.name)}-*/{MANIFEST}")):
        try:
            prepared = Prepared.open(manifest.parent)
            if prepared.fingerprint == fingerprint:
                return _counted(prepared.train(), run, subwords)
        except (OSError, UserError, IndexError):  # IndexError: a subword that the vocabulary does not have
            continue
    return None


def _counted(pairs: ParallelShards, run: RunDirectory, subwords: Subwords) -> Frequencies:
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_PAIRS)).astype(int))
    counts = Counter(word for pair in chosen for word in words(subwords.decode(pairs.source(pair).tolist())))
    part = "" if len(chosen) == len(pairs) else f"{len(chosen):,} of the "
    return Frequencies(counts, f"the training text of {run.path.resolve().name} ({part}{len(pairs):,} sentences)")


def source_frequencies(sources: Sequence[str]) -> Frequencies:
    """Return the frequencies of words in the sources of a test set."""
    return Frequencies(Counter(word for source in sources for word in words(source)), "the sources of the test set")
