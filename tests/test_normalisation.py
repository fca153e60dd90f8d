"""The rules of normalisation that keep meaning, as the vocabulary file carries them, against Python's own."""

import unicodedata
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nmt.config import SubwordConfig
from nmt.data.subwords import Subwords, train_subwords
from nmt.text.normalisation import CONTROLS, canonical_rules

MARKS = "\u0300\u0301\u0302\u0303\u0307\u0308\u030a\u0327\u0323\u0328\u031b\u0345\u05b8\u05bc\u05c1\u064e\u0651\u3099"
LETTERS = "aeoucdÅΩω한ᄒ\u1161\u11abか\u212b\u2126שב\ufb2cا\u1e63ệ\u0958"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Subwords:
    path = tmp_path_factory.mktemp("vocabulary") / "m"
    train_subwords(["abc def ghi jkl mno"] * 20, SubwordConfig(kind="bpe", vocab_size=20), path)
    return Subwords.load(path)


@cache
def rules() -> dict[str, str]:
    return canonical_rules()


def plain(text: str) -> str:
    """Single blanks for runs of blanks and controls."""
    kept = "".join(" " if character in CONTROLS else character for character in text).replace("▁", "_")
    return " ".join(filter(None, kept.split(" ")))


@pytest.mark.parametrize(
    "text",
    [
        "10⁶ m² ½ … ™ ① 1ª １２，。！（ﬁ）ﷺ",
        "می\u200cخواهم",
        "👩\u200d🚀",
        "5\u00a0km 5\u202fkm",
        "\u200fשלום\u200e",
        "soft\u00adhyphen zero\u200bwidth",
        "q⁇▅⁇",
    ],
)
def test_nothing_that_has_meaning_is_changed(vocabulary: Subwords, text: str) -> None:
    assert vocabulary.normalise(text) == text
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_blanks_and_controls(vocabulary: Subwords) -> None:
    for control in CONTROLS:
        assert vocabulary.normalise(f" a{control} b  c ") == "a b c"
    assert vocabulary.normalise("▁▂▃ ") == "_▂▃"


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40) | st.text(alphabet=LETTERS + MARKS + " ", max_size=20))
@example("a\u0302\u0323")
@example("\u05bc\u05b8")
def test_any_text_stays_canonically_equivalent(vocabulary: Subwords, text: str) -> None:
    assert unicodedata.normalize("NFC", vocabulary.normalise(text)) == unicodedata.normalize("NFC", plain(text))


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=LETTERS, min_size=1), st.sampled_from(["NFC", "NFD"]))
def test_letters_come_out_composed(vocabulary: Subwords, text: str, form: str) -> None:
    assert vocabulary.normalise(unicodedata.normalize(form, text)) == unicodedata.normalize("NFC", text)


def test_every_character_that_can_be_taken_apart_is_put_together(vocabulary: Subwords) -> None:
    letters = [rules().get(letter, letter) for letter in {*rules().values()}]
    together = "\n".join(letters)
    assert all(unicodedata.normalize("NFC", letter) == letter for letter in letters)
    assert vocabulary.normalise(unicodedata.normalize("NFD", together)).split(" ") == together.split("\n")


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40) | st.text(alphabet=LETTERS + MARKS + " ", max_size=20))
def test_normalising_twice_is_normalising_once(vocabulary: Subwords, text: str) -> None:
    once = vocabulary.normalise(text)
    assert vocabulary.normalise(once) == once


def test_the_rules_keep_equivalence_and_are_complete() -> None:
    assert all(unicodedata.normalize("NFD", text) == unicodedata.normalize("NFD", new) for text, new in rules().items())
    assert all(unicodedata.normalize("NFC", new) == new for new in rules().values())
    for number in range(0x30000):
        character = chr(number)
        decomposed = unicodedata.normalize("NFD", character)
        if decomposed != character:
            composed = unicodedata.normalize("NFC", character)
            assert decomposed == composed or rules()[decomposed] == composed
            assert character == composed or rules()[character] == composed
