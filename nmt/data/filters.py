"""What a training pair must satisfy, and which pairs are held out of the training text."""

import hashlib

from nmt.config import FilterConfig
from nmt.data.pairs import SentencePair


class Filters:
    """The filters of training pairs, in a fixed order; `dropped` counts what each was first to refuse."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.dropped = dict.fromkeys(
            ("blank", "identical", "duplicates", "max_words", "max_length_ratio", "max_pieces"), 0
        )
        self._seen: set[int] = set()

    def keep(self, pair: SentencePair) -> bool:
        """Whether the text of a pair passes."""
        reason = self._refusal(pair.source, pair.target)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def keep_encoded(self, num_source_pieces: int, num_target_pieces: int) -> bool:
        """Whether a pair passes once it is encoded. A side of which no piece is left is blank."""
        reason = ""
        longer = max(num_source_pieces, num_target_pieces)
        if self.config.blank and min(num_source_pieces, num_target_pieces) == 0:
            reason = "blank"
        elif self.config.max_pieces and longer > self.config.max_pieces:
            reason = "max_pieces"
        if reason:
            self.dropped[reason] += 1
        return not reason

    def _refusal(self, source: str, target: str) -> str:
        config = self.config
        if config.blank and not (source.strip() and target.strip()):
            return "blank"
        if config.identical and source.strip() == target.strip():
            return "identical"
        if config.duplicates and self._is_duplicate(source, target):
            return "duplicates"
        if config.max_words or config.max_length_ratio:
            fewer, more = sorted((len(source.split()), len(target.split())))
            if config.max_words and more > config.max_words:
                return "max_words"
            if config.max_length_ratio and more > config.max_length_ratio * fewer:
                return "max_length_ratio"
        return ""

    def _is_duplicate(self, source: str, target: str) -> bool:
        # 64 bits: among 40 million pairs one is lost by accident with probability 4e-5.
        digest = hashlib.blake2b(f"{source}\n{target}".encode(errors="replace"), digest_size=8).digest()
        fingerprint = int.from_bytes(digest, "little")
        if fingerprint in self._seen:
            return True
        self._seen.add(fingerprint)
        return False
