"""Tags and fields are taken out of a line, and put back: each once, nested, and in a copy just as they were."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.decoding.alignment import Attended, Block
from nmt.decoding.placing import Restored, is_clear, restore
from nmt.text.markup import SLOTS, Item, Masked, find_items, mask, numbers_for, slots_for, without

PIECES = ["<b>", "</b>", "<i>", "</i>", "<br/>", "<p>", "</p>", "{name}", "%s", " ", "  ", "one", "two", "three.", "8"]
ODD = [
    "&amp;",
    "&nbsp;",
    "<x id='1'></x>",
    "a < b > c",
    "5 % of",
    "{",
    "}",
    "<",
    ">",
    "http://a.b/c",
    "[X0X]",
    "(",
    ")",
]
RARE = ["<code>", "</code>", "l'", "\u3000", "東京", "<!-- c -->", "{n, plural, one {# day} other {# days}}", "x@y.org"]
LINES = st.lists(st.sampled_from([*PIECES, *ODD, *RARE]), min_size=1, max_size=12).map("".join)


def roles(line: str) -> list[tuple[str, str]]:
    return [(item.role, item.text) for item in find_items(line)]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a <b>c</b>", [("open", "<b>"), ("close", "</b>")]),
        ("<b>c", [("empty", "<b>")]),
        ("c</b>", [("empty", "</b>")]),
        ("<b><i>c</b></i>", [("open", "<b>"), ("empty", "<i>"), ("close", "</b>"), ("empty", "</i>")]),
        ("<p>a<br>b</p>", [("open", "<p>"), ("empty", "<br>"), ("close", "</p>")]),
        ("<a></a> <x id='1'></x> <x/>", [("empty", "<a></a>"), ("kept", "<x id='1'></x>"), ("kept", "<x/>")]),
        ("<code>a <b> c</code> <code>", [("kept", "<code>a <b> c</code>"), ("empty", "<code>")]),
        ("<i translate='no'>A</i>", [("kept", "<i translate='no'>A</i>")]),
        ("{n, plural, one {# a} other {{x} b}} c", [("kept", "{n, plural, one {# a} other {{x} b}}")]),
        ("{n, plural, one {# a", [("kept", "{n, plural")]),
        ("10&nbsp;%s &lt;", [("empty", "&nbsp;"), ("kept", "%s"), ("kept", "&lt;")]),
        ("a < b > c, 5 % of {", []),
    ],
)
def test_items(line: str, found: list[tuple[str, str]]) -> None:
    assert roles(line) == found
    for item in find_items(line):
        assert line[item.start : item.end] == item.text


def test_deep_nesting_is_no_recursion() -> None:
    line = "<b>" * 3000 + "x" + "</b>" * 3000
    items = find_items(line)
    masked = mask(line, items, without(items))
    assert copied(items, masked).text == line


@pytest.mark.parametrize(
    ("line", "number", "bare"),
    [
        ("Hello {name}, you", "Hello 3816, you", "Hello, you"),
        ("one<br/>two", "one two", "one two"),
        ("un<b>der</b>line", "underline", "underline"),
        ("<li>one</li><li>two</li>", "one two", "one two"),
        ("R&amp;D is 10&nbsp;km", "R&D is 10 km", "R&D is 10 km"),
        ("3816 %s %d", "3816 3823 3830", "3816  "),
    ],
)
def test_the_text_that_is_translated(line: str, number: str, bare: str) -> None:
    items = find_items(line)
    substitutes = numbers_for(line, items, 4)
    assert substitutes is not None
    masked = mask(line, items, substitutes)
    assert masked.text == number
    assert mask(line, items, without(items)).text == bare
    for place, character in enumerate(masked.text):
        if character.isalpha() and "&" not in line:
            assert line[masked.in_line(place)] == character


def test_substitutes_run_out() -> None:
    line = "%s " * 200
    items = find_items(line)
    assert len(numbers_for(line, items, 4) or ()) == 200
    assert numbers_for(line, items, 2) is None
    assert slots_for(line, items) is None
    assert slots_for(f"{SLOTS[3]} %s", find_items("%s")) is None
    # Numbers that touch digits are not seen again in a translation.
    items = find_items("8[X0X]")
    assert not is_clear(mask("8[X0X]", items, ["38"]))
    assert is_clear(mask("8[X0X]", items, [SLOTS[0]]))


# --- putting back ---


def places(text: str) -> np.ndarray:
    return np.array([match.start() for match in re.finditer(r"\S", text)], dtype=np.int64)


def attended(source: str, target: str, attention_TS: np.ndarray) -> Attended:
    return Attended(source, target, (Block(places(source), places(target), attention_TS),))


def copied(items: tuple[Item, ...], masked: Masked) -> Restored:
    """What a translator that copies gives: each character attends to itself."""
    return restore(items, masked, attended(masked.text, masked.text, np.eye(len(places(masked.text)))))


def inside_a_word(line: str) -> bool:
    """Whether an item is within a word, or a number such as 8.5: a tag then encloses all of it."""
    plain = line
    for item in sorted(find_items(line), key=lambda item: -len(item.text)):
        plain = plain.replace(item.text, "\0")
    return bool(re.search(r"\w[.,:]?\0+[.,:]?\w", plain))


@settings(max_examples=300)
@given(LINES)
def test_a_copy_has_all_as_it_was(line: str) -> None:
    items = find_items(line)
    for substitutes in (numbers_for(line, items, 4), slots_for(line, items)):
        masked = mask(line, items, substitutes or without(items))
        if substitutes is None or not is_clear(masked):
            continue
        found = copied(items, masked)
        assert found.complete
        if not inside_a_word(line):
            assert found.text == line
            assert not found.flags


TRANSLATIONS = ["", "x", "Der Zug, 3816 (38).", "38 3823 l'une & <", f"a {SLOTS[0]}{SLOTS[1]} b"]


@settings(max_examples=300)
@given(LINES, st.sampled_from(TRANSLATIONS), st.integers(0, 1 << 30))
def test_every_item_is_there_once_whatever_the_translation(line: str, given_translation: str, seed: int) -> None:
    items = find_items(line)
    for substitutes in (numbers_for(line, items, 4), slots_for(line, items), without(items)):
        if substitutes is None:
            continue
        masked = mask(line, items, substitutes)
        translation = given_translation
        found = restore(items, masked, at_random(masked, translation, seed))
        for text in {item.text for item in items}:
            assert found.text.count(text) >= sum(item.text.count(text) for item in items)
        # Besides, there is the translation without substitutes, and nothing else.
        for substitute in filter(None, substitutes):
            translation = translation.replace(substitute, "", 1)
        whole = re.sub(f"[{SLOTS}]", "", translation) + "".join(item.text for item in items)
        assert sorted("".join(found.text.split())) == sorted("".join(whole.split()))


def at_random(masked: Masked, translation: str, seed: int) -> Attended:
    shape = len(places(translation)), len(places(masked.text))
    return attended(masked.text, translation, np.random.default_rng(seed).random(shape) ** 8)


@st.composite
def nested(draw: st.DrawFn) -> str:
    """A line of elements within elements, each with a name of its own."""
    text, opened = "", []
    for number in range(draw(st.integers(1, 6))):
        text += f"<t{number}>" + draw(st.sampled_from(["one ", "two", ", three "]))
        opened.append(number)
        while opened and draw(st.booleans()):
            text += f"</t{opened.pop()}>" + draw(st.sampled_from(["", " one", " two"]))
    return text + "".join(f"</t{number}>" for number in reversed(opened))


def outer_names(text: str) -> dict[str, str]:
    """The name of the element around each element; the tags must be in pairs."""
    around, opened = {}, [""]
    for close, name in re.findall(r"<(/?)(t\d)>", text):
        if close:
            assert opened.pop() == name
        else:
            around[name] = opened[-1]
            opened.append(name)
    assert opened == [""]
    return around


@settings(max_examples=200)
@given(nested(), st.sampled_from(["", "x", "Der Zug fährt, ja, fährt."]), st.integers(0, 1 << 30))
def test_elements_stay_within_each_other(line: str, translation: str, seed: int) -> None:
    items = find_items(line)
    masked = mask(line, items, without(items))
    found = restore(items, masked, at_random(masked, translation, seed))
    assert outer_names(found.text) == outer_names(line)


def words_attend(source: str, target: str, pairs: dict[int, int]) -> Attended:
    """The attention if words of the target come from words of the source as `pairs` says."""
    source_S, target_T = (
        np.array([word for word, match in enumerate(re.finditer(r"\S+", text)) for _ in match[0]])
        for text in (source, target)
    )
    attention_TS = source_S[None, :] == np.array([pairs[word] for word in target_T.tolist()])[:, None]
    return attended(source, target, attention_TS / attention_TS.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("line", "translation", "pairs", "wanted"),
    [
        # The verb moves to the end; what is around it stays together.
        ("he <b>has seen</b> it", "er hat es gesehen", {0: 0, 1: 1, 2: 3, 3: 2}, "er <b>hat</b> es gesehen"),
        ("<i>the <b>red</b> car</i>", "la voiture rouge", {0: 0, 1: 2, 2: 1}, "<i>la voiture <b>rouge</b></i>"),
        ("a <b>c</b> d<br/>", "d c a", {0: 2, 1: 1, 2: 0}, "d <b>c</b> a<br/>"),
        ("<b>a</b> <i>c</i>", "c a", {0: 1, 1: 0}, "<i>c</i> <b>a</b>"),
        ("a<n/> c", "c a", {0: 1, 1: 0}, "c a<n/>"),
        ("a <n/>c", "c a", {0: 1, 1: 0}, "<n/>c a"),
        ("<n/> a c</b> <i/>", "c a", {0: 1, 1: 0}, "<n/> c a</b> <i/>"),
        ("a <n/> c d", "d c a", {0: 2, 1: 1, 2: 0}, "d <n/> c a"),
    ],
)
def test_tags_follow_their_words(line: str, translation: str, pairs: dict[int, int], wanted: str) -> None:
    items = find_items(line)
    masked = mask(line, items, without(items))
    found = restore(items, masked, words_attend(masked.text, translation, pairs))
    assert found.text == wanted
    assert not found.flags


def test_paragraphs_keep_their_line_breaks() -> None:
    line = "<p>one</p>\n<p>two</p>"
    items = find_items(line)
    assert copied(items, mask(line, items, ())).text == line


def test_what_has_no_place_is_flagged() -> None:
    line = "<b>a</b> c"
    items = find_items(line)
    attention_TS = np.array([[0.0, 1.0], [0.0, 1.0]])
    found = restore(items, mask(line, items, []), attended("a c", "d e", attention_TS))
    assert sorted(re.sub(r"\s", "", found.text)) == sorted("<b></b>de")
    assert [flag.kind for flag in found.flags] == ["tag"]
    line = "to {city} now"
    items = find_items(line)
    found = restore(items, mask(line, items, ["38"]), attended("to 38 now", "nun", np.ones((3, 7)) / 7))
    assert found.text.count("{city}") == 1
    assert not found.complete
    assert [flag.kind for flag in found.flags] == ["placeholder"]
