"""Settings of the rules that drop training pairs."""

from dataclasses import dataclass

from nmt.config.checks import at_least, fraction


@dataclass
class FilterConfig:
    """Rules that drop training pairs; dev and test are never filtered. 0, false or null switches a rule off.

    `nmt prepare --scores` writes what each rule measures in each pair.
    """

    blank: bool = True
    """Drop pairs with a blank side."""
    identical: bool = False
    """Drop pairs with the same text on both sides (untranslated lines of web corpora)."""
    max_words: int = 150
    """Drop pairs with more than this many blank-separated words on either side."""
    max_length_ratio: float = 0.0
    """Drop pairs whose longer side has more than this many times the words of the shorter side."""
    no_letters: bool = False
    """Drop pairs with a side that has no letter: rows of numbers, menus."""
    mojibake: bool = False
    """Drop pairs with characters whose encoding was damaged, such as Ã© for é, or the replacement character."""
    urls: bool = False
    """Drop pairs whose URLs and e-mail addresses differ."""
    numbers: bool = False
    """Drop pairs whose numbers differ. 1,000.5 and 1 000,5 are equal, and so are 3 and "three"."""
    test_overlap: bool = False
    """Drop pairs with a side that is in dev or test, whatever its case, blanks and punctuation."""
    min_score: float | None = None
    """Drop pairs whose log-probability per word (nats, the end counts as a word) is below this: -4 is usual. It comes
    from files of `nmt score` in `train.scores`, made with any run."""
    wrong_language: float = 0.0
    """Drop pairs with a side that is in the language of the other side with more than this probability: 0.9 is usual.
    Needs the library of the extra `language`. It takes ten times as long as all other rules."""
    duplicates: bool = False
    """Drop pairs seen before."""
    near_duplicates: bool = False
    """Drop pairs that differ from an earlier one only in case, blanks and punctuation. Per cent, a minus, and the signs
    within a number count, and so do symbols such as $ and +."""
    duplicate_sources: bool = False
    """Drop pairs whose source was seen before."""
    duplicate_targets: bool = False
    """Drop pairs whose target was seen before."""
    max_pieces: int = 200
    """Drop pairs with more than this many subwords on either side."""

    def __post_init__(self) -> None:
        for name in ("max_words", "max_length_ratio", "max_pieces"):
            at_least(f"corpus.filters.{name}", getattr(self, name), 0)
        if 0 < self.max_length_ratio < 1:
            raise ValueError(
                f"corpus.filters.max_length_ratio={self.max_length_ratio:g} must be at least 1, or 0 for no limit: the "
                "longer side counts"
            )
        fraction("corpus.filters.wrong_language", self.wrong_language)
        if self.min_score is not None and not -1000 <= self.min_score <= 0:
            raise ValueError(
                f"corpus.filters.min_score={self.min_score:g} must be a log-probability: at most 0, such as -4"
            )
