"""Training text on disk before it is encoded: which pairs are yielded and counted."""

from pathlib import Path

import pytest

from nmt.config import Direction
from nmt.corpus.filters import HoldOut
from nmt.corpus.pairs import SentencePair
from nmt.data.kinds import Kind
from nmt.data.spools import Spools

EN_DE, EN_FR = Direction("en", "de"), Direction("en", "fr")


@pytest.mark.parametrize(
    "kinds",
    [[Kind(None, "")], [Kind(EN_DE, ""), Kind(EN_FR, "")], [Kind(EN_DE, ""), Kind(EN_FR, ""), Kind(EN_FR, "bt")]],
    ids=len,
)
def test_counts_are_those_of_the_pairs_that_are_yielded(tmp_path: Path, kinds: list[Kind]) -> None:
    hold_out = HoldOut(4, 3)
    spools = Spools(tmp_path, kinds, hold_out)
    with spools:
        for number in [*range(20), 5, 6, 7]:
            for kind in kinds:
                target = f"{kind.direction} {number}"
                spools.append(SentencePair(f"source {number}", target, "", kind.tag, kind.direction))
    before = spools.total
    held = spools.hold_back()
    yielded = {kind: len(list(spools.pairs(kind))) for kind in kinds}
    assert spools.num_pairs == yielded
    assert held == before - sum(yielded.values()) >= 7
    assert len(list(spools.sample(5))) == 5
