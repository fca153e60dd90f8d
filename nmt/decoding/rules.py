"""Rules of a search: which subwords may come next, and which hypotheses are dropped.

Every rule is an operation on tensors whose shapes are the same at each position, and none waits for the host. So a
whole position of a search can be recorded and replayed. `length` is the number of the next subword, from 1, as a scalar
on the device.

Letters: B sentences, K hypotheses (the beam), C candidates, V vocabulary, F subwords that are never output, P longest
prefix, G most slots of a sentence, L longest translation, W places where a repetition could begin.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, arange

from nmt.tokens import EOS, PAD

NEVER = float("-inf")


class Rules(NamedTuple):
    """What a translation may be. Lengths are int64 and count EOS."""

    min_length_B: Tensor  # at least 1; EOS is not allowed at a smaller length
    max_length_B: Tensor  # at least 1
    forbidden_F: Tensor  # int64, subwords that are never output; PAD is one of them
    prefix_BP: Tensor | None = None  # int64, the subwords that each translation begins with, then PAD; None: no prefix
    no_repeat: int = 0  # n: no run of n subwords occurs twice in a translation; 0: any may
    stream_B: Tensor | None = None  # int64, the random stream of each sentence; only for sampling
    slots_BG: Tensor | None = None  # int64, forbidden subwords that are allowed in each sentence, then PAD; None: none

    @property
    def same_for_all(self) -> bool:
        """True if the same subwords are forbidden everywhere, but for the end."""
        return self.fits_all and not self.no_repeat

    @property
    def fits_all(self) -> bool:
        """True if the shapes of all tensors are the same for other sentences."""
        return self.prefix_BP is None and self.slots_BG is None

    def forbid_(self, logits_KBV: Tensor, length: Tensor, history_KBL: Tensor) -> None:
        """Set to minus infinity, in place, the logits of subwords that may not be next.

        `history_KBL` has the subwords of each hypothesis so far, then PAD; its L is 0 if no rule reads it. A prefix is
        kept even if it breaks the other rules.
        """
        prefix = None if self.prefix_BP is None else _Prefix.of(self.prefix_BP, logits_KBV, length)
        slots = None if self.slots_BG is None else self._slot_logits(self.slots_BG, logits_KBV)
        logits_KBV.index_fill_(2, self.forbidden_F, NEVER)
        if slots is not None:
            logits_KBV.scatter_(2, *slots)
        logits_KBV[:, :, EOS].masked_fill_(length < self.min_length_B, NEVER)
        if self.no_repeat:
            logits_KBV.scatter_(2, repeats(history_KBL, length, self.no_repeat), NEVER)
        if prefix is not None:
            prefix.force_(logits_KBV)

    def _slot_logits(self, slots_BG: Tensor, logits_KBV: Tensor) -> tuple[Tensor, Tensor]:
        """Return slots_KBG and their logits, which are minus infinity for PAD."""
        slots_KBG = slots_BG.expand(len(logits_KBV), -1, -1)
        return slots_KBG, logits_KBV.gather(2, slots_KBG).masked_fill(slots_KBG == PAD, NEVER)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rules":
        """Return these rules with every tensor changed."""
        return Rules(*(change(each) if isinstance(each, Tensor) else each for each in self))  # type: ignore[arg-type]

    def select(self, sentences_B: Tensor) -> "Rules":
        """Return the rules of these sentences."""
        return self._replace(
            min_length_B=self.min_length_B[sentences_B],
            max_length_B=self.max_length_B[sentences_B],
            prefix_BP=None if self.prefix_BP is None else self.prefix_BP[sentences_B],
            stream_B=None if self.stream_B is None else self.stream_B[sentences_B],
            slots_BG=None if self.slots_BG is None else self.slots_BG[sentences_B],
        )


class _Prefix(NamedTuple):
    """The subword that the prefix of each sentence has at one position."""

    token_KB1: Tensor  # int64
    logit_KB1: Tensor  # its logit, before any rule
    forced_B1: Tensor  # bool, False for a sentence whose prefix has ended

    @classmethod
    def of(cls, prefix_BP: Tensor, logits_KBV: Tensor, length: Tensor) -> "_Prefix":
        longest = prefix_BP.shape[1]
        token_B1 = prefix_BP.index_select(1, (length - 1).clamp(max=longest - 1).view(1))
        token_KB1 = token_B1.expand(len(logits_KBV), -1, 1)
        return cls(token_KB1, logits_KBV.gather(2, token_KB1), (token_B1 != PAD) & (length <= longest))

    def force_(self, logits_KBV: Tensor) -> None:
        """Leave nothing but the prefix in the logits of the sentences whose prefix has not ended."""
        kept_KB1 = logits_KBV.gather(2, self.token_KB1).where(~self.forced_B1, self.logit_KB1)
        logits_KBV.masked_fill_(self.forced_B1, NEVER)
        logits_KBV.scatter_(2, self.token_KB1, kept_KB1)


def repeats(history_KBL: Tensor, length: Tensor, n: int) -> Tensor:
    """Return token_KBW, the subwords that would repeat a run of n subwords; PAD where there is none.

    The last n - 1 subwords, and the next one, are a run. It is a repetition if the same run is in the history.
    """
    starts = max(history_KBL.shape[2] - n + 1, 0)
    # A run ends at most at the last subword, number length - 1. Places count from 0.
    repeated_KBW = (arange(starts, device=length.device) <= length - 1 - n).expand(*history_KBL.shape[:2], starts)
    for place in range(n - 1 if starts else 0):
        last_KB1 = history_KBL.index_select(2, (length - n + place).clamp(min=0).view(1))
        repeated_KBW = repeated_KBW & (history_KBL[:, :, place : place + starts] == last_KB1)
    return history_KBL[:, :, n - 1 :].masked_fill(~repeated_KBW, PAD)


def drop_distant(values_CB: Tensor, best_B: Tensor, margin: float) -> Tensor:
    """Return the values, with minus infinity for those more than `margin` below the best."""
    return values_CB.masked_fill(values_CB < best_B - margin, NEVER)
