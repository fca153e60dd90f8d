"""Words of any script, and the words in which two texts differ."""

import pytest

from nmt.text.words import differences, num_words, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The train to Köln, «fast»!", ["the", "train", "to", "köln", "fast"]),
        ("14:35 costs 3.50€ A4", ["costs"]),
        ("don't re-read_it", ["don", "t", "re", "read", "it"]),
        ("Поезд в Рим", ["поезд", "в", "рим"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("我们坐火车。", list("我们坐火车")),
        ("قطار إلى روما؟", ["قطار", "إلى", "روما"]),
        ("", []),
        ("... — \u2028 \x00 7", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_numbers_count_as_words_of_a_length() -> None:
    assert num_words("The train leaves at 14:35.") == 6
    assert num_words("火车 2") == 3
    assert num_words(" ...\n") == 0


def marked(first: str, second: str) -> tuple[str, str]:
    """Both texts with their differing stretches in brackets."""
    sides = differences(first, second)
    assert ["".join(text for text, _ in side) for side in sides] == [first, second]
    one, other = ("".join(f"[{text}]" if differs else text for text, differs in side) for side in sides)
    return one, other


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b c", "a x c", ("a [b] c", "a [x] c")),
        ("a b", "a b", ("a b", "a b")),
        ("", "a b", ("", "[a b]")),
        ("a  b", "a b", ("a  b", "a b")),
        ("at 7:00.", "at 8:00!", ("at [7]:00[.]", "at [8]:00[!]")),
        ("我坐火车", "我坐飞机", ("我坐[火车]", "我坐[飞机]")),
        ("x\u2028y\n", "x\u2028z\n", ("x\u2028[y]\n", "x\u2028[z]\n")),
    ],
)
def test_differing_words_are_found(first: str, second: str, expected: tuple[str, str]) -> None:
    assert marked(first, second) == expected
    assert marked(second, first) == expected[::-1]


def test_long_texts_stay_whole() -> None:
    """Comparing stops, and the rest is not marked."""
    first, second = "la " * 5000, "la lo " * 5000
    one, other = marked(first, second)
    assert one.endswith("la la ")
    assert other.count("[lo]") <= 300
