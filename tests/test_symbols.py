"""The meanings of reserved symbols, and the symbols before a source sentence."""

import pytest

from nmt.config import Direction, SubwordConfig
from nmt.data.subwords import Subwords, train_subwords
from nmt.data.symbols import Symbols
from nmt.errors import DataError
from nmt.run import RunDirectory


@pytest.mark.parametrize("text", ["en", "en-", "-de", "en-en", "en-de-fr", ""])
def test_a_direction_is_two_different_codes(text):
    with pytest.raises(ValueError, match="is not a direction"):
        Direction.of(text)
    assert str(Direction.of("en-pt_BR")) == "en-pt_BR"


def test_meanings_survive_a_manifest():
    symbols = Symbols(("de", "fr"), ("bt",))
    assert Symbols.of({"pairs": 3, **symbols.to_dict()}, "x") == symbols
    assert Symbols.of({}, "x") == Symbols()


@pytest.mark.parametrize(
    "record", [{"languages": "de"}, {"tags": [1]}, {"tags": ["a", "a"]}, {"tags": list("abcdefghi")}]
)
def test_damaged_meanings_name_their_file(record):
    with pytest.raises(DataError, match="manifest is damaged"):
        Symbols.of(record, "manifest")


def test_the_prefix_is_the_language_then_the_tag(tmp_path):
    train_subwords(["the cat sees the dog"] * 9, SubwordConfig(kind="bpe", vocab_size=20), tmp_path / "model")
    subwords = Subwords.load(tmp_path / "model")
    symbols = Symbols(("de", "fr"), ("news", "bt"))
    language, tag = subwords.symbol("language", 1), subwords.symbol("tag", 1)
    assert symbols.prefix(subwords, "fr", "bt") == (language, tag)
    assert symbols.prefix(subwords, "fr") == (language,)
    assert Symbols(tags=("bt",)).prefix(subwords, "fr", "bt") == (subwords.symbol("tag", 0),)
    assert Symbols().prefix(subwords, "fr") == ()
    with pytest.raises(DataError, match=r"cs is none of the languages .* de, fr"):
        symbols.prefix(subwords, "cs")
    with pytest.raises(DataError, match="old is none of the tags"):
        symbols.prefix(subwords, "de", "old")


def test_directions_of_a_split_survive_in_a_run(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_text("dev", ["a", "b"], ["c", "d"], [], [Direction("en", "de"), Direction("de", "en")])
    assert run.text("dev") == (["a", "b"], ["c", "d"], [])
    assert run.directions("dev") == [("en", "de"), ("de", "en")]
    run.write_text("dev", ["a", "b"], ["c", "d"], [])
    assert run.directions("dev") == []


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (Symbols(("de", "fr"), ("bt",)), True),
        (Symbols(("de", "fr", "cs")), True),
        (Symbols(("de",), ("bt", "news")), True),
        (Symbols(("fr", "de")), False),
        (Symbols(("de", "fr"), ("news",)), False),
        (Symbols((), ("bt",)), False),
    ],
)
def test_tables_agree_if_no_symbol_has_two_meanings(other, agrees):
    mine = Symbols(("de", "fr"), ("bt",))
    assert mine.agrees_with(other) == other.agrees_with(mine) == agrees
    assert Symbols().agrees_with(Symbols(tags=("bt",)))


def test_what_a_reader_sees_for_symbols(tmp_path):
    train_subwords(["the cat sees the dog"] * 9, SubwordConfig(kind="bpe", vocab_size=20), tmp_path / "model")
    subwords = Subwords.load(tmp_path / "model")
    shown = Symbols(("de", "fr"), ("bt",)).shown(subwords)
    assert shown[subwords.symbol("language", 1)] == "⟨to fr⟩"
    assert shown[subwords.symbol("tag", 0)] == "⟨bt⟩"
    assert len(shown) == 3
