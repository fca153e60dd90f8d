"""Translate windows of lines in bounded memory, with reading, searching and writing at the same time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from nmt.decoding.parts import Rank, Reading
from nmt.decoding.translation import Options, Translation
from nmt.decoding.translator import Found, Translator
from nmt.streams.lines import Piece, Window
from nmt.streams.overlap import Overlap
from nmt.text.segment import seam
from nmt.text.terms import Terms


@dataclass
class JoinedLines:
    """Joins the translations of pieces into lines, and counts lines."""

    form: Callable[[Piece, Translation], str] | None = None
    """Makes the output line of a whole input line; None for plain text, in which pieces of lines are joined."""
    num_lines: int = 0
    num_long: int = 0
    """Number of lines translated in parts."""
    num_cut_off: int = 0
    """Number of lines with a part that was cut off at its maximum length."""
    num_unlearned: int = 0
    """Number of lines with characters that are not in the vocabulary."""
    unlearned: Counter[str] = field(default_factory=Counter)
    """Counts of those characters."""
    _before: str = field(default="", init=False)
    """Previous piece of the current line."""
    _left: str = field(default="", init=False)
    """Last character of the current line's translation so far."""
    _long: bool = field(default=False, init=False)
    _cut_off: bool = field(default=False, init=False)
    _unlearned: bool = field(default=False, init=False)

    def add(self, window: list[Piece], found: list[Translation]) -> str:
        """Return the translated text of a window, with a newline after each line that ends in it."""
        text: list[str] = []
        for piece, translation in zip(window, found, strict=True):
            if not piece.begins:
                text.append(seam(self._before, piece.text, self._left, translation.text))
            text.append(self.form(piece, translation) if self.form else translation.text)
            self._long |= translation.num_parts > 1 or not piece.ends
            self._cut_off |= not translation.finished
            self._unlearned |= bool(translation.unlearned)
            self.unlearned.update(translation.unlearned)
            self._before = piece.text
            self._left = (self._left + translation.text)[-1:]
            if piece.ends:
                text.append("\n")
                self.num_lines += 1
                self.num_long += self._long
                self.num_cut_off += self._cut_off
                self.num_unlearned += self._unlearned
                self._before = self._left = ""
                self._long = self._cut_off = self._unlearned = False
        return "".join(text)


def translate_stream(
    translator: Translator,
    source: Iterable[Window],
    write: Callable[[list[Piece], list[Translation]], None],
    halt: Callable[[], None],
    options: Options | None = None,
    progress: Callable[[Window, float], None] | None = None,
    terms: Terms | None = None,
    rank: Rank | None = None,
) -> None:
    """Translate each window of `source`, and call `write` with its pieces and their translations, in order.

    Three stages overlap: a thread reads and encodes windows ahead, this thread searches, and another thread makes the
    text and writes it. `halt` must end any waiting of `source` and `write` (`Overlap`). `progress` is called with a
    window and the fraction of it that is done. `terms` is for all lines; a record of JSON Lines may have its own, which
    take precedence. `rank` and errors are as for `Translator.translate`; errors of `source` and `write` too.
    """

    def read() -> Iterator[tuple[Window, Reading]]:
        for window in source:
            texts = [piece.text for piece in window.pieces]
            cut = {place for place, piece in enumerate(window.pieces) if not (piece.begins and piece.ends)}
            prefixes = {place: piece.prefix for place, piece in enumerate(window.pieces) if piece.prefix}
            yield window, translator.read(texts, options, cut, prefixes, _tables(window, terms))

    def write_out(result: tuple[Window, Reading, Found]) -> None:
        window, reading, found = result
        write(window.pieces, translator.write(reading, found, rank))

    with Overlap(read(), write_out, halt) as stages:

        def tell(window: Window, done: float) -> None:
            stages.check()
            if progress:
                progress(window, done)

        for window, reading in stages:
            stages.write((window, reading, translator.find(reading, partial(tell, window))))


def _tables(window: Window, terms: Terms | None) -> list[list[Terms]]:
    """Return the tables of terms of each piece: that of its record, then `terms`. Empty if no piece has any."""
    tables = [[piece.record.terms if piece.record else None, terms] for piece in window.pieces]
    kept = [[table for table in each if table is not None] for each in tables]
    return kept if any(kept) else []
