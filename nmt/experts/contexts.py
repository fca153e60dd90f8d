"""The text that the gates of one side read, token by token, and the context of each token.

Letters: N tokens of one side of the text, P sentence pairs, n subwords around a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nmt.data.subwords import BLANK_SIGN, END_SIGN, START_SIGN, UNKNOWN_SURFACE, Subwords
from nmt.tokens import BOS, EOS, UNK

_CONTEXT_WORDS, _CONTEXT_PIECES = 6, 24
_SPECIAL = {BOS: f"▁{START_SIGN}", EOS: f"▁{END_SIGN}", UNK: UNKNOWN_SURFACE}


@dataclass(frozen=True)
class Context:
    """One position at which an expert was chosen: the token with its left and right context, including blanks."""

    before: str
    token: str
    after: str
    gate: float
    predicts: str | None
    """The subword that has to follow; decoder only."""


class SideTokens:
    """All tokens of one side of the text in a row, as the gates of that side read them.

    A sentence is symbols, subwords and EOS in the encoder. It is BOS and subwords in the decoder, which predicts the
    next token. `symbols` has what a reader sees for a symbol, by its id (`Symbols.shown`).
    """

    def __init__(
        self,
        sentences: Sequence[np.ndarray],
        decoder: bool,
        num_shuffles: int,
        generator: np.random.Generator,
        symbols: Mapping[int, str],
    ) -> None:
        self.decoder = decoder
        self.symbols = symbols
        parts = [[[BOS], pieces] if decoder else [pieces, [EOS]] for pieces in sentences]
        piece_N = np.concatenate([part for pair in parts for part in pair]).astype(np.int32)
        self.pieces = [piece_N, *(generator.permutation(piece_N) for _ in range(num_shuffles))]  # each N
        self.length_P = np.array([len(pieces) + 1 for pieces in sentences])
        self.end_P = self.length_P.cumsum()

    def piece(self, number: int, subwords: Subwords) -> str:
        """Return a subword as SentencePiece writes it, or what a reader sees for a symbol."""
        return self.symbols.get(number) or subwords.pieces([number])[0]

    def context(self, gate: float, place: int, subwords: Subwords) -> Context:
        """Return the context of the token at `place` (0 to N - 1): a few words on either side."""
        sentence = int(np.searchsorted(self.end_P, place, side="right"))
        end = int(self.end_P[sentence])
        first = max(place - _CONTEXT_PIECES, end - int(self.length_P[sentence]))
        ids_n = [*self.pieces[0][first : min(place + _CONTEXT_PIECES, end)].tolist(), EOS]
        pieces = [
            _SPECIAL.get(piece, self.symbols.get(piece, text)).replace("▁", " ")
            for piece, text in zip(ids_n, subwords.pieces(ids_n), strict=True)
        ]
        here = place - first
        token, following = pieces[here], pieces[here + 1]
        before = "".join(pieces[:here]) + token[: len(token) - len(token.lstrip())]
        after = "".join(pieces[here + 1 : -1])
        return Context(
            " ".join(before.split(" ")[-_CONTEXT_WORDS - 1 :]).lstrip(),
            token.strip() or BLANK_SIGN,
            " ".join(after.split(" ")[: _CONTEXT_WORDS + 1]),
            gate,
            (following.strip() or BLANK_SIGN) if self.decoder else None,
        )
