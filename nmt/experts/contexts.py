"""The text that the gates of one side see, token by token, and what stands around a token.

Letters: N tokens of one side of the text, P sentence pairs, n pieces around a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nmt.batch import BOS, EOS, UNK
from nmt.data.subwords import UNKNOWN_SURFACE, Subwords

_CONTEXT_WORDS, _CONTEXT_PIECES = 6, 24
_SPECIAL = {BOS: "▁⟨start⟩", EOS: "▁⟨end⟩", UNK: UNKNOWN_SURFACE}


@dataclass(frozen=True)
class Context:
    """One place where an expert was chosen: the token with what stands left and right of it, blanks included."""

    before: str
    token: str
    after: str
    gate: float
    predicts: str | None
    """The piece that has to follow; decoder only."""


class SideTokens:
    """The tokens of one side of the text in a row, as the gates of that side see them: pieces and EOS in the
    encoder, BOS and pieces in the decoder, which predicts the next one."""

    def __init__(
        self, sentences: Sequence[np.ndarray], decoder: bool, num_shuffles: int, generator: np.random.Generator
    ) -> None:
        self.decoder = decoder
        parts = [[[BOS], pieces] if decoder else [pieces, [EOS]] for pieces in sentences]
        piece_N = np.concatenate([part for pair in parts for part in pair]).astype(np.int32)
        self.pieces = [piece_N, *(generator.permutation(piece_N) for _ in range(num_shuffles))]  # each N
        self.length_P = np.array([len(pieces) + 1 for pieces in sentences])
        self.end_P = self.length_P.cumsum()

    def context(self, gate: float, place: int, subwords: Subwords) -> Context:
        """What stands around a token, some words to either side."""
        sentence = int(np.searchsorted(self.end_P, place, side="right"))
        end = int(self.end_P[sentence])
        first = max(place - _CONTEXT_PIECES, end - int(self.length_P[sentence]))
        ids_n = [*self.pieces[0][first : min(place + _CONTEXT_PIECES, end)].tolist(), EOS]
        pieces = [
            _SPECIAL.get(piece, text).replace("▁", " ")
            for piece, text in zip(ids_n, subwords.pieces(ids_n), strict=True)
        ]
        here = place - first
        token, following = pieces[here], pieces[here + 1]
        before = "".join(pieces[:here]) + token[: len(token) - len(token.lstrip())]
        after = "".join(pieces[here + 1 : -1])
        return Context(
            " ".join(before.split(" ")[-_CONTEXT_WORDS - 1 :]).lstrip(),
            token.strip() or "␣",
            " ".join(after.split(" ")[: _CONTEXT_WORDS + 1]),
            gate,
            (following.strip() or "␣") if self.decoder else None,
        )
