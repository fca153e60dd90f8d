"""Flags: each kind of mistake is found, and good translations have none."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.evaluation.content import content_kept
from nmt.text.checks import KEPT, KINDS, Flag, check, in_order, kept, loop
from nmt.text.numbers import compare_numbers

EQUAL_NUMBERS = [
    ("1,234.5", "1.234,5"),
    ("1,234.5", "1 234,5"),
    ("1,234.5", "1\u202f234,5"),
    ("1,234,567", "1.234.567"),
    ("1,234.5", "1’234.5"),
    ("20,000", "20000"),
    ("3.14", "3,14"),
    ("5.0", "5"),
    ("16.07.2035", "16/07/2035"),
    ("14:30", "14.30 Uhr"),
    ("14:30", "14 h 30"),
    ("14:00", "14h"),
    ("2:30 p.m.", "14h30"),
    ("12 a.m.", "0 Uhr"),
    ("1.5 million", "1 500 000"),
    ("5 billion", "5 Milliarden"),
    ("3 days", "drei Tage"),
    ("a 2-day trip", "eine zweitägige Reise"),
    ("1 dog", "a dog"),
    ("two dogs", "2 Hunde"),
    ("the 19th century", "le XIXe siècle"),
    ("the 1990s", "die 90er"),
    ("٣", "3"),
    ("3人", "三人"),
    ("CO2 and A4", "CO2 und A4"),
]
UNEQUAL_NUMBERS = [
    ("1.5", "15"),
    ("1.5", "5.1"),
    ("2.05", "2.5"),
    ("1,234", "12,34"),
    ("1990", "1890"),
    ("14:30", "14:03"),
    ("2:30 p.m.", "15:30"),
    ("3 days", "vier Tage"),
    ("5 million", "6 000 000"),
    ("17", "71"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL_NUMBERS)
def test_one_number_in_two_ways(left: str, right: str) -> None:
    for source, translation in ((left, right), (right, left), (left, left)):
        assert compare_numbers(source, translation)[1:] == ([], []), (source, translation)


@pytest.mark.parametrize(("left", "right"), UNEQUAL_NUMBERS)
def test_two_numbers(left: str, right: str) -> None:
    for source, translation in ((left, right), (right, left)):
        found = compare_numbers(source, translation)
        assert found.missing or found.added


def test_numbers_written_the_same_belong_together() -> None:
    # 5.000 may be read as 5,000 or as 5.
    assert compare_numbers("5,000 5", "5 5.000 5.00001")[1:] == ([], ["5.00001"])
    assert compare_numbers("5,000 5.000 5", "5 5.000")[1:] == (["5,000"], [])


def test_numbers_are_counted_and_named() -> None:
    assert compare_numbers("5 and 5 and 1,000", "5 und 99") == (3, ["5", "1,000"], ["99"])


@pytest.mark.parametrize("part", ["9", "1,", "1 ", "1 234 ", "1.234,", "1:30 ", "99 ", "²", "III ", "1h"])
def test_numbers_never_take_long(part: str) -> None:
    """If each number were compared with each other one, this would take minutes."""
    text = part * (60_000 // len(part))
    compare_numbers(text + "7", "8" + text[::-1])


GOOD = [
    ("How many dogs (and cats) are there?", "Wie viele Hunde (und Katzen) gibt es?"),
    ("“Go home,” he said.", "„Geh nach Hause“, sagte er."),
    ("Stop it!", "Arrêtez !"),
    ("Note:", "Remarque :"),
    ("We leave…", "Wir gehen ..."),
    ("He came. He saw.", "来た。見た。"),
    ("Is that so?", "هل هذا صحيح؟"),
    ("Is that so?", "Είναι έτσι;"),
    ("He is here.", "เขาอยู่ที่นี่"),
    ("FC Bayern München - VfB Stuttgart", "FC Bayern München - VfB Stuttgart"),
    ("Press <b>OK</b> or write to a@example.org.", "Drücken Sie <b>OK</b> oder schreiben Sie an a@example.org."),
    ("%s of %d at https://example.org/1", "%s von %d auf https://example.org/1"),
    ("very, very, very good", "sehr, sehr, sehr gut"),
    ("---", "---"),
    ("1,5 %", "1.5%"),
    ("Yes", "Oui, bien sûr"),
    ("a) the first", "a) das Erste"),
]


@pytest.mark.parametrize(("source", "translation"), GOOD)
def test_good_translations_have_no_flags(source: str, translation: str) -> None:
    assert check(source, translation) == ()
    assert check(translation, source) == ()


def test_an_entity_may_become_its_character() -> None:
    assert check("Tom&nbsp;Jones", "Tom\u00a0Jones") == ()
    assert check("Tom\u00a0Jones", "Tom&nbsp;Jones") == (Flag("tag", "&nbsp; is added"),)


@pytest.mark.parametrize(
    ("source", "translation", "kind"),
    [
        ("It costs 5 euros.", "Es kostet 6 Euro.", "numbers"),
        ("Hello %s", "Hallo", "placeholder"),
        ("Hello {name}", "Hallo {Name}", "placeholder"),
        ("Hello", "Hallo [X0X]", "placeholder"),
        ("a <b>bold</b> word", "ein <b>fettes Wort", "tag"),
        ("Tom &amp; Jerry", "Tom und Jerry", "tag"),
        ("see www.example.org.", "siehe www.example.de.", "url"),
        ("write to a.b@example.org", "schreibe an ab@example.org", "url"),
        ("the dog (a pug) sleeps", "der Hund (ein Mops schläft", "brackets"),
        ("“Go,” he said", "„Geh, sagte er", "brackets"),
        ("Is he here?", "Er ist hier.", "end"),
        ("He is here.", "Er ist hier", "end"),
        ("the dog", "der Hund.", "end"),
        ("The cat sleeps all day.", "The cat sleeps all day.", "copy"),
        ("The dog, which is old, sleeps in the garden.", "Der Hund.", "length"),
        ("The dog.", "Der Hund, der alt ist, schläft im Garten.", "length"),
        ("The dog", "", "length"),
        ("The old dog", "der alte alte alte Hund", "loop"),
        ("The old dog", "der Hund, der Hund, der Hund", "loop"),
        ("The meat law", "Fleischüberwachungsüberwachungsüberwachungsüberwachungsgesetz", "loop"),
        ("老狗", "犬犬犬犬", "loop"),
        ("The dog", "Der ⁇ Hund", "unknown"),
    ],
)
def test_a_mistake_is_flagged(source: str, translation: str, kind: str) -> None:
    assert kind in {flag.kind for flag in check(source, translation)}


def test_the_page_has_every_kind_with_its_meaning() -> None:
    page = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page[page.index("## Checks") :], flags=re.MULTILINE)[: len(KINDS)]
    assert {kind: meaning.replace("`", "") for kind, meaning in rows} == KINDS


def test_facts_of_the_search_are_flagged() -> None:
    assert check("犬 dog", "Hund", unlearned="犬犬", cut=True) == (
        Flag("unknown", "the model has never seen 犬"),
        Flag("cut", "cut off at its maximum length"),
    )


TEXT = st.lists(
    st.sampled_from([*'0123456789.,:?! ()[]“„"%<>{}&;犬a', "the ", "ha ", "dog", "%s", "<b>", "million ", "XIV ", "\n"])
).map("".join)


@given(source=TEXT, translation=TEXT)
def test_flags_are_in_order_and_of_known_kinds(source: str, translation: str) -> None:
    flags = check(source, translation)
    assert flags == in_order(flags)
    assert all(flag.kind in KINDS and flag.detail and flag.detail.isprintable() for flag in flags if flag.kind != "tag")


@given(text=TEXT)
def test_a_text_keeps_all_of_itself(text: str) -> None:
    assert {flag.kind for flag in check(text, text)} <= {"copy"}
    assert all(each.kept == each.total for each in kept(text, text).values())
    assert not loop(text, text)


@given(source=TEXT, translation=TEXT)
def test_what_is_kept_agrees_with_the_flags(source: str, translation: str) -> None:
    missing = [flag.kind for flag in check(source, translation) if flag.detail.endswith("is missing")]
    if not any(character.isalnum() for character in source):
        return
    found = kept(source, translation)
    assert list(found) == list(KEPT)
    assert {kind: missing.count(kind) for kind in KEPT} == {
        kind: each.total - each.kept for kind, each in found.items()
    }


@given(
    words=st.lists(st.sampled_from("abcd"), min_size=2),
    phrase=st.lists(st.sampled_from("efgh"), min_size=1, max_size=6),
)
def test_a_phrase_three_times_is_a_loop(words: list[str], phrase: list[str]) -> None:
    half = len(words) // 2
    assert loop("", " ".join([*words[:half], *phrase * 3, *words[half:]]))


@pytest.mark.parametrize("part", ["a", "ab", "a ", "a b ", "犬", "(", '"', ".", "<a ", "1 a "])
def test_checks_never_take_long(part: str) -> None:
    text = part * (30_000 // len(part))
    check(text, text[1:])
    check("dog", text)


def test_what_a_set_keeps() -> None:
    sources = ["5 dogs, 7 cats", "see {a} and {b}", "nothing"]
    found = content_kept(sources, ["5 Hunde", "siehe {a} und {b}", "nichts"])
    assert found == {"numbers": (1, 2), "placeholder": (2, 2)}
    assert [each.percent for each in found.values()] == [50.0, 100.0]


def test_a_changed_digit_is_always_found() -> None:
    draw = random.Random(1)
    for _ in range(300):
        number = f"{draw.randint(100, 10**6)}.{draw.randint(1, 9)}"
        place = draw.choice([match.start() for match in re.finditer(r"\d", number)])
        other = f"{number[:place]}{(int(number[place]) + draw.randint(1, 9)) % 10}{number[place + 1 :]}"
        assert compare_numbers(f"It is {number} m.", f"Es sind {other} m.").missing == [number]
