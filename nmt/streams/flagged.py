"""Write the lines with flags, as JSON Lines: what a reader should check in a translated file."""

import json
from collections import Counter
from dataclasses import dataclass, field

from nmt.decoding.translation import Translation
from nmt.streams.lines import Piece
from nmt.text.checks import KINDS
from nmt.wording import counted


@dataclass
class FlaggedLines:
    """Collects the lines with flags, and counts them by kind."""

    num_lines: int = 0
    """Lines that have ended."""
    num_flagged: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of lines with a flag of each kind."""
    _kinds: set[str] = field(default_factory=set, init=False)
    """Kinds of flags of the current line."""

    def add(self, pieces: list[Piece], found: list[Translation]) -> str:
        """Return a line with an object for each piece that has flags: `line`, `source`, `translation`, `flags`.

        A line has one piece, and so at most one object, unless it is too long to be read at once.
        """
        text: list[str] = []
        for piece, translation in zip(pieces, found, strict=True):
            if translation.flags:
                shown = {
                    "line": self.num_lines + 1,
                    "source": piece.text,
                    "translation": translation.text,
                    "flags": [flag._asdict() for flag in translation.flags],
                }
                text.append(f"{json.dumps(shown, ensure_ascii=False)}\n")
                self._kinds |= {flag.kind for flag in translation.flags}
            if piece.ends:
                self.num_lines += 1
                self.num_flagged += bool(self._kinds)
                self.kinds.update(self._kinds)
                self._kinds = set()
        return "".join(text)

    def summary(self) -> str:
        """Return one line with the counts."""
        if not self.num_flagged:
            return "no line has a flag"
        kinds = ", ".join(f"{kind} {self.kinds[kind]:,}" for kind in KINDS if self.kinds[kind])
        return f"{counted(self.num_flagged, 'line')} with flags: {kinds}"
