"""Translate a sentence again, with other settings, if its translation repeats itself or is empty.

The second translation is used if it does neither. The kind of flag is "retried" either way (nmt/text/checks.py).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.errors import MemoryLimitError
from nmt.text.checks import loop

_NO_REPEAT = 3

Hypotheses = dict[int, list[Hypothesis]]
"""Hypotheses for parts of text, by the number of the part, best first."""


def search_again(
    found: Hypotheses,
    options: Options,
    texts: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    search: Callable[[Collection[int], Options], Hypotheses],
) -> dict[int, str]:
    """Replace what was found for those of `texts` that need it, and return the detail of the flag of each.

    `search` returns hypotheses for the texts of these numbers, found with these options.
    """
    if not options.retry or options.temperature > 0.0:
        return {}
    troubles = {place: _trouble(texts[place], best, decode) for place, (best, *_) in found.items()}
    troubles = {place: trouble for place, trouble in troubles.items() if trouble}
    if not troubles:
        return {}
    other = replace(
        options, beam_size=2 * options.beam_size, no_repeat_ngram=options.no_repeat_ngram or _NO_REPEAT, retry=False
    )
    try:
        again = search(troubles, other)
    except MemoryLimitError:
        # A wider beam takes more memory. The first translations remain.
        again = {}
    settings = f"beam_size={other.beam_size} and no_repeat_ngram={other.no_repeat_ngram}"
    details = {}
    for place, trouble in troubles.items():
        if place in again and not _trouble(texts[place], again[place][0], decode):
            found[place] = again[place]
            details[place] = f"{trouble}; this one is from {settings}"
        else:
            details[place] = f"{trouble}; {settings} did not help"
    return details


def _trouble(source: str, best: Hypothesis, decode: Callable[[Sequence[int]], str]) -> str:
    """Return what is wrong with a translation, so that its source is translated again; empty if nothing is."""
    # Text that repeats nothing needs no decoding.
    if best.tokens and len(set(best.tokens)) > len(best.tokens) - 2:
        return ""
    translation = decode(best.tokens)
    if not translation.strip():
        return "the translation was empty"
    repeated = loop(source, translation)
    return f"the translation had {repeated}" if repeated else ""
