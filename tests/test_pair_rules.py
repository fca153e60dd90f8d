"""Rules that drop training pairs: what each finds, which comes first, and what it leaves alone."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.config import CorpusConfig, Direction, FilterConfig
from nmt.corpus.damage import num_damaged
from nmt.corpus.rules import Candidate, HeldOutTexts, Rules, key_rules, near, rank, whys
from nmt.errors import DataError

EN_DE = Direction("en", "de")
NOTHING = HeldOutTexts()


def rules_of(held_out: HeldOutTexts = NOTHING, **filters: Any) -> Rules:
    return Rules(CorpusConfig(filters=FilterConfig(**filters)), held_out)


def pair(source: str, target: str, score: float | None = None) -> Candidate:
    return Candidate(source, target, EN_DE, score)


def test_the_first_rule_that_rejects_counts() -> None:
    rules = rules_of(identical=True, max_words=5, max_length_ratio=2.0, no_letters=True)
    found = [
        rules.refusal(pair(source, target))
        for source, target in (
            ("a b", "c d"),
            ("\u3000 ", "c"),
            ("a", " "),
            ("same ", "same"),
            ("1 2 3 4 5 6", "1 2 3 4 5 seven"),
            ("1 2 3 4 5", "1 2"),
            ("a 2 3 4", "1 b"),
            ("1 2 3", "1 b"),
        )
    ]
    assert found == ["", "blank", "blank", "identical", "max_words", "max_length_ratio", "", "no_letters"]
    off = rules_of(blank=False, max_words=0)
    assert off.refusal(pair("", "x " * 1000)) == ""
    assert rules_of(blank=False, max_length_ratio=9.0).refusal(pair("", "x")) == "max_length_ratio"


def test_only_active_rules_are_listed_in_the_order_of_counting() -> None:
    corpus = CorpusConfig(filters=FilterConfig(duplicates=True, max_words=1, mojibake=True, near_duplicates=True))
    assert list(whys(corpus)) == ["blank", "max_words", "mojibake", "duplicates", "near_duplicates", "max_pieces"]
    assert whys(corpus)["max_words"] == "with more than 1 word"
    off = CorpusConfig(filters=FilterConfig(blank=False, max_words=0, max_pieces=0))
    assert whys(off) == {}
    settings = set(FilterConfig.__dataclass_fields__) - {"max_pieces"}
    every = [rule.name for rule in key_rules(FilterConfig(**{key: True for key in settings if "duplicate" in key}))]
    assert settings == {*every, *rules_of().names}


@pytest.mark.parametrize(
    "text",
    [
        "Ça va très bien à l'été, «naïve» œuvre – Noël…",
        "Größe, Äpfel, Öl: 20 °C für 3 € (© 2020)",
        "Příliš žluťoučký kůň úpěl ďábelské ódy",
        "A Âncora: NÃO, SÃO João São Paulo",
        "Tiếng Việt có dấu: Â, Ê, Ô ở giữa",
        "Übermäßig “quoted” ‘text’ — Ångström",
        "日本語の文章です。",
        "Χαίρετε, мир",
        "plain ASCII",
    ],
)
def test_correct_text_is_not_damaged(text: str) -> None:
    assert num_damaged(text) == 0


@given(st.text("éèüößñçàõêÇÉÖ’“”…€жψ日", min_size=1, max_size=8), st.sampled_from(["latin-1", "cp1252"]))
def test_utf_8_read_as_another_encoding_is_damaged(letters: str, encoding: str) -> None:
    read = "".join(bytes([byte]).decode(encoding, errors="ignore") or chr(byte) for byte in f"a {letters} b".encode())
    assert num_damaged(read) == len(letters)
    assert rules_of(mojibake=True).refusal(pair("fine", read)) == "mojibake"
    assert rules_of(mojibake=True).refusal(pair("lost \ufffd", "fine")) == "mojibake"


@pytest.mark.parametrize(
    ("rule", "source", "target", "found"),
    [
        ("numbers", "In 1999 we had 1,000.5 tons and three more", "1999 hatten wir 1.000,5 Tonnen und 3 mehr", 0),
        ("numbers", "Article 12 of 1999", "Artikel 13 von 1999", 2),
        ("numbers", "no digits", "keine", 0),
        ("urls", "see https://a.org/x.", "siehe https://a.org/x", 0),
        ("urls", "see www.a.org or me@b.de", "siehe www.a.org", 1),
        ("urls", "see http://a.org/", "siehe http://c.org", 2),
        ("identical", "a ", " a", 1),
        ("no_letters", "12 - 34", "...", 2),
        ("max_length_ratio", "a b c", "d e", 1.5),
    ],
)
def test_scores(rule: str, source: str, target: str, found: float) -> None:
    scores = rules_of().scores(pair(source, target)) if rule != "wrong_language" else {}
    assert scores[rule] == found
    if rule in ("numbers", "urls"):
        assert rules_of(**{rule: True}).refusal(pair(source, target)) == (rule if found else "")


def test_scores_of_a_model() -> None:
    rules = rules_of(min_score=-3.0)
    assert rules.scores(pair("a", "b c", -9.0))["min_score"] == -3.0  # two words and the end
    assert math.isnan(rules_of().scores(pair("a", "b c"))["min_score"])
    assert [rules.refusal(pair("a", "b c", score)) for score in (-9.0, -9.1)] == ["", "min_score"]
    with pytest.raises(DataError, match=r"corpus\.train\.scores"):
        rules.refusal(pair("a", "b"))
    with pytest.raises(ValueError, match=r"corpus\.filters\.min_score=4"):
        FilterConfig(min_score=4.0)


def test_text_of_dev_and_test() -> None:
    held_out = HeldOutTexts.of([("en-de", "The end.", "Das Ende."), ("de-en", "Hallo!", "Hello")])
    rules = rules_of(held_out, test_overlap=True)
    found = [
        rules.refusal(pair(*texts))
        for texts in (("the END", "x"), ("x", "«Das  Ende»"), ("hello", "hallo"), ("Das Ende", "The end"), ("x", "y"))
    ]
    assert found == ["test_overlap", "test_overlap", "test_overlap", "", ""]
    assert held_out.digest() != NOTHING.digest()


def test_languages() -> None:
    pytest.importorskip("py3langid")
    english, german = "The president opened the session in the morning", "Der Präsident eröffnete die Sitzung am Morgen"
    rules = rules_of(wrong_language=0.9)
    assert rules.refusal(pair(english, german)) == ""
    assert rules.refusal(pair(english, english)) == "wrong_language"
    assert rules.refusal(pair(german, german)) == "wrong_language"
    assert rules.refusal(pair("12 x 34", "Berlin")) == ""  # undecided
    unknown = CorpusConfig(target_language="xx", filters=FilterConfig(wrong_language=0.5))
    with pytest.raises(DataError, match=r"corpus\.filters\.wrong_language cannot recognise the language xx"):
        Rules(unknown, NOTHING)
    Rules(CorpusConfig(target_language="pt_BR", filters=FilterConfig(wrong_language=0.5)), NOTHING)


def test_keys() -> None:
    config = FilterConfig(duplicates=True, near_duplicates=True, duplicate_sources=True, duplicate_targets=True)
    keys = {rule.name: rule.key for rule in key_rules(config)}
    assert list(keys) == ["duplicates", "near_duplicates", "duplicate_sources", "duplicate_targets"]
    first, other = pair("The end.", "Das Ende."), pair("the END", "Das Ende.")
    assert {name for name, key in keys.items() if key(first) == key(other)} == {"near_duplicates", "duplicate_targets"}
    back = Candidate("The end.", "Das Ende.", Direction("en", "fr"))
    assert all(key(first) != key(back) for key in keys.values())
    assert all(0 <= key(first) < 1 << 64 for key in keys.values())
    assert rank(" The end.", "Das Ende.  ") == rank("The end.", "Das Ende.") != rank("The end", "Das Ende.")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("$15", "$1.5"),
        ("5 degrees", "-5 degrees"),
        ("C", "C++"),
        ("10", "10 %"),
        ("5>3", "5<3"),
        ("at 10:30", "at 1030"),
        ("€5", "$5"),
        ("C code", "C# code"),
        ("10-20", "1020"),
        ("R&D", "RD"),
        ("उसने कहा कि", "उसने कही का"),
        ("ป่า", "ปา"),
    ],
)
def test_what_changes_a_meaning_is_not_near(first: str, other: str) -> None:
    assert near(first) != near(other)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("In 2010, he said: “No”.", "in 2010 he said - no"),
        ("the pre-1990 law", "The pre 1990 law!"),
        ("−5 °C", "-5°c"),
        ("«Das  Ende» ...", "das Ende…"),
        ("A, B; (C) [d]", "a b c d"),
        ("1990–2000", "1990-2000"),
        ("Cafe\u0301", "CAFÉ"),
    ],
)
def test_case_blanks_and_punctuation_are_near(first: str, other: str) -> None:
    assert near(first) == near(other)


@given(st.text(max_size=20))
def test_near_texts(text: str) -> None:
    assert near(f"  {text} !") == near(text) == near(near(text))
