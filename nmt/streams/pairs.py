"""Score files of sentence pairs in windows: one result per pair, in order, in bounded memory."""

from collections.abc import Callable, Iterator

from nmt.data.held_out import HeldOut, encode_pairs
from nmt.decoding.scoring import PairScore, pair_log_probs, pair_scores
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.streams.lines import unequal
from nmt.streams.overlap import Overlap
from nmt.textfile import TextReader

# Most pairs in a window, and most characters of both sides.
_MOST_PAIRS = 4096
_MOST_CHARACTERS = 1 << 20

Pairs = tuple[list[str], list[str]]
"""Sources and their targets."""


def pair_windows(source: TextReader, target: TextReader) -> Iterator[Pairs]:
    """Yield the pairs of lines of two files in windows. DataError if one has more lines, after the lines of both."""
    window: Pairs = ([], [])
    size = 0
    sides = iter(source), iter(target)
    while True:
        lines = [next(side, None) for side in sides]
        if None in lines or len(window[0]) == _MOST_PAIRS or size >= _MOST_CHARACTERS:
            if window[0]:
                yield window
            window, size = ([], []), 0
        if None in lines:
            break
        for side, line in zip(window, lines, strict=True):
            assert line is not None
            side.append(line)
            size += len(line)
    if lines != [None, None]:
        raise unequal(*((source, target) if lines[0] is None else (target, source)))


def score_stream(
    translator: Translator,
    source: Iterator[Pairs],
    write: Callable[[list[PairScore]], None],
    halt: Callable[[], None],
    options: Options | None = None,
) -> None:
    """Score each window of `source`, and call `write` with its scores, in order. `options`: None for the translator's.

    Reading, scoring and writing overlap; `halt` must end any waiting of `source` and `write` (`Overlap`). Errors are
    those of `pair_log_probs`, `source` and `write`.
    """

    def write_out(result: tuple[HeldOut, list[list[float]]]) -> None:
        write(list(pair_scores(translator.subwords, *result)))

    chosen = options or translator.options
    read = (translator.pairs(*window, chosen) for window in source)
    encoded = (
        encode_pairs(translator.subwords, pairs.sources, pairs.targets, prefixes=pairs.symbols) for pairs in read
    )
    with Overlap(encoded, write_out, halt) as stages:
        for held_out in stages:
            log_probs = pair_log_probs(translator.models, held_out, chosen.experts_per_token)
            stages.write((held_out, log_probs))
