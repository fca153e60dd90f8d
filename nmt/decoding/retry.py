"""Translate a sentence again, with other settings, if its translation repeats itself or is empty.

It repeats itself if the same subwords, and so the same words, are there three times in a row, but not in its source.
The second translation is used if it does neither. The kind of flag is "retried" either way (nmt/text/checks.py).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.errors import MemoryLimitError
from nmt.text.checks import LEAST_REPEATS, loop

_NO_REPEAT = 3
_LONGEST_PHRASE = 32  # subwords of a phrase that a translation may repeat

Hypotheses = dict[int, list[Hypothesis]]
"""Hypotheses for parts of text, by the number of the part, best first."""


def search_again(
    found: Hypotheses,
    options: Options,
    texts: Sequence[str],
    decode: Callable[[Sequence[list[int]]], list[str]],
    search: Callable[[Collection[int], Options], Hypotheses],
) -> dict[int, str]:
    """Replace what was found for those of `texts` that need it, and return the detail of the flag of each.

    `decode` returns the texts of subwords. `search` returns hypotheses for the texts of these numbers, found with these
    options.
    """
    if not options.retry or options.temperature > 0.0:
        return {}
    bad = troubles(texts, found, decode)
    if not bad:
        return {}
    other = replace(
        options, beam_size=2 * options.beam_size, no_repeat_ngram=options.no_repeat_ngram or _NO_REPEAT, retry=False
    )
    try:
        again = search(bad, other)
    except MemoryLimitError:
        # A wider beam takes more memory. The first translations remain.
        again = {}
    remaining = troubles(texts, again, decode)
    settings = f"beam_size={other.beam_size} and no_repeat_ngram={other.no_repeat_ngram}"
    details = {}
    for place, trouble in bad.items():
        if place in again and place not in remaining:
            found[place] = again[place]
            details[place] = f"{trouble}; this one is from {settings}"
        else:
            details[place] = f"{trouble}; {settings} did not help"
    return details


def troubles(
    texts: Sequence[str], found: Hypotheses, decode: Callable[[Sequence[list[int]]], list[str]]
) -> dict[int, str]:
    """Return what is wrong with the best translations that need another one, by the number of the text."""
    best = {place: ranked[0].tokens for place, ranked in found.items()}
    # Few texts need to be decoded, so that this takes little time.
    suspects = [place for place, suspect in zip(best, loops(list(best.values())), strict=True) if suspect]
    suspects += [place for place, tokens in best.items() if not tokens]
    decoded = decode([best[place] for place in suspects])
    described = {place: _trouble(texts[place], each) for place, each in zip(suspects, decoded, strict=True)}
    return {place: trouble for place, trouble in described.items() if trouble}


def loops(sequences: Sequence[Sequence[int]]) -> list[bool]:
    """Return which sequences of subwords have a phrase that is there three times in a row.

    All sequences are searched at once, for one length of phrases after another.
    """
    # A number that is there once follows each sequence, so that no run crosses its end.
    flat_N = np.fromiter(chain.from_iterable((*each, -1 - n) for n, each in enumerate(sequences)), dtype=np.int64)
    begin_B = np.cumsum([0, *(len(each) + 1 for each in sequences)])
    found_B = np.zeros(len(sequences), dtype=bool)
    longest = max(map(len, sequences), default=0)
    for phrase in range(1, min(longest // LEAST_REPEATS, _LONGEST_PHRASE) + 1):
        # whether a subword, and those after it, are equal to those one phrase later
        same_N, run = flat_N[phrase:] == flat_N[:-phrase], 1
        while run < (LEAST_REPEATS - 1) * phrase:
            step = min(run, (LEAST_REPEATS - 1) * phrase - run)
            same_N, run = same_N[step:] & same_N[:-step], run + step
        found_B[np.searchsorted(begin_B, np.flatnonzero(same_N), side="right") - 1] = True
    return list(map(bool, found_B))


def _trouble(source: str, translation: str) -> str:
    """Return what is wrong with a translation; empty if nothing is."""
    if not translation.strip():
        return "the translation was empty"
    repeated = loop(source, translation)
    return f"the translation had {repeated}" if repeated else ""
