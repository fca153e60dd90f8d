"""Translate windows of lines one after the other, in bounded memory, and join the pieces of long lines."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from nmt.decoding.translation import Options, Translation
from nmt.decoding.translator import Translator
from nmt.streams.lines import Piece
from nmt.text.segment import seam


@dataclass
class JoinedLines:
    """Joins the translations of pieces into lines, and counts lines."""

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
            text.append(translation.text)
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
    source: Iterable[list[Piece]],
    lines: JoinedLines,
    options: Options | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[str]:
    """Yield the translated text of each window of `source`, and count its lines in `lines`.

    Arguments and errors are as for `Translator.translate`; MemoryLimitError too. `progress` is called with the fraction
    of a window that is done.
    """
    for window in source:
        texts = [piece.text for piece in window]
        long = {place for place, piece in enumerate(window) if not (piece.begins and piece.ends)}
        found = translator.translate(texts, options, long=long, progress=progress)
        yield lines.add(window, found)
