"""Long text is cut where sentences, clauses or words end, and joined as it was: nothing is lost, nothing is added."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.text.segment import join, last_place, seam, split

Fits = Callable[[Sequence[str]], list[bool]]
MARKS = list(".!?…,;:–—\"')]») 。！？、，；：」”।؟\u200d\u0301\u3000\t\x85\u2028\r")
WORDS = [" ", "a", "B", "1", "die", "Dr", "Zug", "犬", "ครับ", "👩\u200d🚀", "\u0e31"]
TEXT = st.lists(st.sampled_from([*MARKS, *WORDS])).map("".join)


def shorter_than(limit: int) -> Fits:
    """Blanks around a text do not count, as they have no pieces."""
    return lambda texts: [len(text.strip()) <= limit for text in texts]


@given(text=TEXT, limit=st.integers(1, 9))
def test_the_parts_are_the_text_and_fit(text: str, limit: int) -> None:
    parts = split(text, shorter_than(limit))
    assert "".join(parts) == text
    assert all(shorter_than(limit)(parts))
    assert all(parts) or text == ""


@given(text=TEXT.filter(lambda text: len(text) > 1))
def test_there_is_always_a_place_to_cut_what_goes_on(text: str) -> None:
    assert 0 < last_place(text) < len(text)
    assert 2 * last_place(text) >= len(text) - 16


@given(words=st.lists(st.text("abc.,", min_size=1, max_size=9), min_size=1), limit=st.integers(1, 30))
def test_a_word_that_fits_is_never_cut(words: list[str], limit: int) -> None:
    parts = split(" ".join(words), shorter_than(limit))
    bounds = set(accumulate(len(part) for part in parts))
    start = 0
    for word in words:
        inside = bounds & set(range(start + 1, start + len(word)))
        assert not inside or len(word) > limit
        start += len(word) + 1


def test_a_long_sentence_is_halved_at_clauses_then_at_blanks_then_anywhere() -> None:
    text = "when it rains, the small dog sleeps; the cat, which is old, runs away."
    assert split(text, shorter_than(40)) == [
        "when it rains, the small dog sleeps; ",
        "the cat, which is old, runs away.",
    ]
    assert split("one two three four", shorter_than(9)) == ["one two ", "three ", "four"]
    assert split("abcdefgh", shorter_than(4)) == ["abcd", "efgh"]
    assert split("猫在睡觉，狗在跑", shorter_than(5)) == ["猫在睡觉，", "狗在跑"]


def test_a_quotation_of_several_sentences_is_halved_at_its_full_stops() -> None:
    text = "“The small dog sleeps, while it rains. The old cat, a black one, runs.”"
    assert split(text, shorter_than(40)) == [
        "“The small dog sleeps, while it rains. ",
        "The old cat, a black one, runs.”",
    ]


def test_a_short_text_is_split_at_its_sentences_all_the_same() -> None:
    assert split("Le M. Dupont. Un chien.", shorter_than(99), "fr") == ["Le M. Dupont. ", "Un chien."]


@pytest.mark.parametrize("text", ["e\u0301" * 9, "👩\u200d🚀" * 5, "ที่นี่" * 4], ids=ascii)
def test_a_letter_keeps_its_accents(text: str) -> None:
    for part in split(text, shorter_than(4)):
        assert part[0] not in "\u0301\u200d\u0e35\u0e48"
        assert part[-1] != "\u200d"


@pytest.mark.parametrize("character", [".", "a", " ", ",", "。", "\u0301", ".)", ". ", ", ", "\u200d"], ids=ascii)
def test_nothing_takes_long(character: str) -> None:
    """Of a pattern that reads a long row again from each place, this would take minutes."""
    text = character * 60_000
    assert "".join(split(text, shorter_than(500))) == text
    last_place(text)


# ------------------------------------------------------------------------------------------------------ joining


@given(text=TEXT, limit=st.integers(1, 9))
def test_parts_that_stay_as_they_are_join_to_the_text(text: str, limit: int) -> None:
    parts = split(text, shorter_than(limit))
    joined = join(parts, [part.strip() for part in parts])
    # Blanks alone may differ, where scripts with and without them meet.
    assert "".join(joined.split()) == "".join(text.split())


@given(words=st.lists(st.sampled_from(["a", "b.", "c,", "Dd", "e!"]), min_size=1), gap=st.sampled_from([" ", "  "]))
def test_blanks_between_parts_are_kept(words: list[str], gap: str) -> None:
    parts = split(gap.join(words), shorter_than(3))
    assert join(parts, [part.strip() for part in parts]) == gap.join(words)


@pytest.mark.parametrize(
    ("before", "after", "left", "right", "expected"),
    [
        ("One. ", "Two.", "Eins.", "Zwei.", " "),
        ("One.  ", "Two.", "Eins.", "Zwei.", "  "),
        ("One.\u3000", "Two.", "Eins.", "Zwei.", "\u3000"),
        ("One.\x85", "Two.", "Eins.", "Zwei.", " "),
        ("One. ", "Two.", "一。", "二。", ""),
        ("One. ", "Two.", "一,", "二。", ""),
        ("一。", "二。", "One.", "Two.", " "),
        ("一。", "二。", "イチ。", "ニ。", ""),
        ("aaaa", "aaaa", "bb", "bb", ""),
        ("One. ", "!", "Eins.", "", ""),
        ("?", "One.", "", "Eins.", ""),
    ],
)
def test_the_seam(before: str, after: str, left: str, right: str, expected: str) -> None:
    assert seam(before, after, left, right) == expected


def test_line_breaks_are_kept_on_request() -> None:
    parts, translations = ["One.\n\n", "Two. \r\n", "Three.\u2028", "Four"], ["Eins.", "Zwei.", "Drei.", "Vier"]
    assert join(parts, translations, keep_lines=True) == "Eins.\n\nZwei. \nDrei. Vier"
    assert join(parts, translations) == "Eins.  Zwei.  Drei. Vier"


def test_a_part_that_comes_to_nothing_leaves_one_blank() -> None:
    assert join(["One. ", "* ", "Two."], ["Eins.", "", "Zwei."]) == "Eins. Zwei."
