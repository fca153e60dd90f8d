"""How much of the numbers, placeholders, tags and URLs of a set its translations have."""

from collections.abc import Sequence

from nmt.text.checks import KEPT, Kept, kept


def content_kept(sources: Sequence[str], translations: Sequence[str]) -> dict[str, Kept]:
    """Return the sums of `kept` over a set, for each kind of `KEPT` that its sources have."""
    found = [kept(source, translation) for source, translation in zip(sources, translations, strict=True)]
    sums = {
        kind: Kept(sum(each[kind].kept for each in found), sum(each[kind].total for each in found)) for kind in KEPT
    }
    return {kind: each for kind, each in sums.items() if each.total}
