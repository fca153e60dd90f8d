"""Numbers in words: what is printed can be read back, and is what a person would write."""

import pytest

from nmt.wording import brief, counted, duration, millions, percent, scaled, steps_of


@pytest.mark.parametrize(("count", "text"), [(0, "0 lines"), (1, "1 line"), (2, "2 lines"), (12_345, "12,345 lines")])
def test_a_noun_agrees_with_its_count(count: int, text: str) -> None:
    assert counted(count, "line") == text


def test_steps_are_listed() -> None:
    assert steps_of([500]) == "step 500"
    assert steps_of(range(1000, 3000, 1000)) == "steps 1,000, 2,000"


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.00123, 0.0099, 0.01, 0.12345, 0.5, 1.0, 2.5])
def test_a_percentage_can_be_read_back(share: float) -> None:
    text = percent(share)
    assert text.endswith("%")
    assert float(text[:-1]) / 100 == pytest.approx(share, rel=0.06 if share < 0.01 else 0.006)


def test_large_counts_are_in_millions() -> None:
    assert (brief(999_999), brief(1_000_000), brief(2_345_678)) == ("999,999", "1.0M", "2.3M")
    assert millions(195_123_456, 2) == "195.12M"


def test_the_unit_is_the_largest_that_is_filled() -> None:
    units = ((1e9, "GB"), (1e6, "MB"))
    assert [scaled(size, units) for size in (2e9, 1e9, 999e6, 5e3)] == ["2 GB", "1 GB", "999 MB", "0.005 MB"]


def test_there_are_two_of_a_unit_of_time() -> None:
    seconds = (119, 120, 7199, 7200, 172_799, 172_800)
    units = [duration(each).split()[1] for each in seconds]
    assert units == ["seconds", "minutes", "minutes", "hours", "hours", "days"]
    for each in seconds:
        number, unit = duration(each).split()
        length = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}[unit]
        assert float(number) * length == pytest.approx(each, abs=length / 20)
