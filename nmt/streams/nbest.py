"""Several translations per line as plain text, in the format of Moses: "number ||| translation ||| score"."""

from nmt.decoding.translation import Translation
from nmt.streams.lines import Piece

_BETWEEN = " ||| "


class NumberedLines:
    """Makes the output lines of each input line: its hypotheses, best first, with the number of the line, from 0."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, _piece: Piece, found: Translation) -> str:
        """Return the lines of the next translation; one, with a score of 0, if there was nothing to translate."""
        number, self._next = self._next, self._next + 1
        ranked = [(each.text, each.score) for each in found.hypotheses] or [(found.text, 0.0)]
        return "\n".join(_BETWEEN.join((str(number), text, f"{score:.6f}")) for text, score in ranked)
