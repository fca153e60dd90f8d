"""Write the alignments of lines in the Pharaoh format, one line for each line of the text."""

from dataclasses import dataclass, field

from nmt.decoding.alignment import pharaoh, words
from nmt.decoding.translation import Translation
from nmt.streams.lines import Piece
from nmt.text.segment import seam


@dataclass
class _Side:
    """The words of one side of a line whose pieces arrive one by one."""

    count: int = 0
    last: str = ""
    """Last piece of text; its end decides whether the next piece begins a word."""

    def first_word(self, text: str) -> int:
        """Return the number, in the line, of the first word of the next piece, which is added."""
        joined = bool(self.last and text) and not (self.last[-1].isspace() or text[0].isspace())
        first = self.count - joined
        self.count = first + len(words(text))
        self.last = text or self.last
        return first


@dataclass
class AlignmentLines:
    """Joins the alignments of pieces into lines."""

    _source: _Side = field(default_factory=_Side, init=False)
    _target: _Side = field(default_factory=_Side, init=False)
    _begun: bool = field(default=False, init=False)
    """True if the current line has a link already."""

    def add(self, pieces: list[Piece], found: list[Translation]) -> str:
        """Return the alignments of pieces, with a newline after each line that ends in them."""
        text: list[str] = []
        for piece, translation in zip(pieces, found, strict=True):
            gap = seam(self._source.last, piece.text, self._target.last, translation.text)
            first = self._source.first_word(piece.text), self._target.first_word(gap + translation.text)
            shown = pharaoh([(source + first[0], target + first[1]) for source, target in translation.alignment])
            text.append(f" {shown}" if shown and self._begun else shown)
            self._begun |= bool(shown)
            if piece.ends:
                text.append("\n")
                self._source, self._target, self._begun = _Side(), _Side(), False
        return "".join(text)
