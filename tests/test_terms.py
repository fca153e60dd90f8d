"""Terms: found at word borders, longest first; required translations checked; tables read from files."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.errors import DataError
from nmt.text.term_files import read_terms
from nmt.text.terms import Terms, find_terms, is_form, missing, words

TABLE = Terms.of(
    {
        "pump": "Pumpe",
        "pump station": "Pumpwerk",
        "station": "Bahnhof",
        "heat-pump": "Wärmepumpe",
        "C++": None,
        "Liland": "=",
        "Apple": "Apple Inc.",
        "café": "Café",
        "水": "Wasser",
    }
)


def found(text: str, *tables: Terms) -> list[tuple[str, str]]:
    return [(match.source, match.target) for match in find_terms(text, tables or (TABLE,))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The pump is new.", [("pump", "Pumpe")]),
        ("pumps, pumping, pumpX, 2pump", []),
        ("the pump  station", [("pump  station", "Pumpwerk")]),
        ("pump pump station station", [("pump", "Pumpe"), ("pump station", "Pumpwerk"), ("station", "Bahnhof")]),
        ("a heat-pump, (pump)", [("heat-pump", "Wärmepumpe"), ("pump", "Pumpe")]),
        ("heat - pump", [("pump", "Pumpe")]),
        ("He likes C++, not C.", [("C++", "C++")]),
        ("to Liland", [("Liland", "Liland")]),
        # Case: exact, or a capital at the start of a sentence.
        ("Pump it. “Pump it.” A Pump, a PUMP", [("Pump", "Pumpe"), ("Pump", "Pumpe")]),
        ("apple juice", []),
        # Composed and decomposed letters are the same.
        ("one cafe\u0301.", [("cafe\u0301", "Café")]),
        ("cafe\u0301s cafe", []),
        # Without blanks between words, every character is a word.
        ("喝水吧", [("水", "Wasser")]),
        ("", []),
        (" \t", []),
    ],
)
def test_terms_in_a_text(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


def test_the_first_table_wins_and_the_longest_term() -> None:
    own = Terms.of({"pump": "Förderer", "the pump": "Ding"})
    assert found("a pump", own, TABLE) == [("pump", "Förderer")]
    assert found("a pump", TABLE, own) == [("pump", "Pumpe")]
    assert found("the pump station", own, TABLE) == [("the pump", "Ding"), ("station", "Bahnhof")]
    assert found("a pump station", own, TABLE) == [("pump station", "Pumpwerk")]
    assert found("the pump", Terms.of({})) == []


@settings(max_examples=200)
@given(st.text("ab -.A\u0301水", max_size=20), st.lists(st.text("ab -水", min_size=1, max_size=4), max_size=6))
def test_matches_are_in_order_and_at_borders(text: str, sources: list[str]) -> None:
    kept = {source.strip(): "x" for source in sources if source.strip()}
    keys = {tuple(word.text for word in words(source)) for source in kept}
    if len(keys) < len(kept):
        return  # "a b" and "a  b" are one term
    borders = {place for word in words(text) for place in (word.start, word.end)}
    end = 0
    for match in find_terms(text, [Terms.of(kept)]):
        assert end <= match.start < match.end
        assert {match.start, match.end} <= borders
        assert text[match.start : match.end] == match.source
        end = match.end


def test_words_are_the_text_without_its_blanks() -> None:
    text = " Ärger,\tC++ 3.14 का水水\u00a0x"
    assert "".join(word.text for word in words(text)) == "".join(text.split())
    assert [word.text for word in words("C++ (3.14) का 水水")] == [
        *"C ++ ( 3 . 14 )".replace("++", "+ +").split(),
        "का",
        "水",
        "水",
    ]


def test_a_large_table() -> None:
    """100,000 terms that begin with 1,000 words, in a long text: comparing all with all would take hours."""
    large = Terms.of({f"word{n % 1000} term{n}": str(n) for n in range(100_000)})
    matches = find_terms("word7 term1007 and " * 5_000, [large])
    assert [match.target for match in matches] == ["1007"] * 5_000


# ----------------------------------------------------------------------------------------- required translations


def lacking(text: str, translation: str) -> list[str]:
    return [match.target for match in missing(find_terms(text, [TABLE]), translation)]


@pytest.mark.parametrize(
    ("text", "translation", "expected"),
    [
        ("the pump", "die Pumpe", []),
        ("the pump", "die PUMPEN!", []),
        ("the pump", "das Pumpenhaus", ["Pumpe"]),
        ("the pump", "das Gerät", ["Pumpe"]),
        ("the pump and the pump", "die Pumpe und die Pumpe", []),
        ("the pump and the pump", "die Pumpe und das Gerät", ["Pumpe"]),
        ("the Apple", "die Apple  Inc.", []),
        ("the Apple", "die Apple", ["Apple Inc."]),
        # What is not translated must be there exactly.
        ("in Liland", "in Liland.", []),
        ("in Liland", "in liland", ["Liland"]),
        ("in Liland", "in Lilands", ["Liland"]),
        ("pump in Liland", "", ["Pumpe", "Liland"]),
    ],
)
def test_required_translations(text: str, translation: str, expected: list[str]) -> None:
    assert lacking(text, translation) == expected


@pytest.mark.parametrize(
    ("word", "form", "expected"),
    [
        ("Pumpe", "pumpen", True),
        ("Haus", "Hauses", True),
        ("rouge", "rouges", True),
        ("animal", "animaux", True),
        ("IT", "it", True),
        ("IT", "item", False),
        ("Pumpe", "Pum", False),
        ("Pumpe", "Pumpenhaus", False),
        ("Haus", "Maus", False),
    ],
)
def test_forms_of_a_word(word: str, form: str, expected: bool) -> None:
    assert is_form(word, form) == expected


# ------------------------------------------------------------------------------------------------------- tables

TBX = """<?xml version="1.0" encoding="UTF-8"?>
<tbx xmlns="urn:iso:std:iso:30042:ed-2"><text><body>
 <conceptEntry id="1">
  <langSec xml:lang="de-DE"><termSec><term>Pumpe</term></termSec><termSec><term>Förderer</term></termSec></langSec>
  <langSec xml:lang="en"><termSec><term> heat
     <hi>pump</hi> </term></termSec><termSec><term>pump &amp; co</term></termSec></langSec>
 </conceptEntry>
 <conceptEntry id="2"><langSec xml:lang="fr"><termSec><term>pompe</term></termSec></langSec></conceptEntry>
</body></text></tbx>
"""
MARTIF = """<martif type="TBX"><text><body><termEntry>
<langSet xml:lang="EN"><tig><term>pump</term></tig></langSet>
<langSet xml:lang="de"><ntig><termGrp><term>Pumpe</term></termGrp></ntig></langSet>
</termEntry></body></text></martif>"""

TWICE = MARTIF.replace("<termEntry>", f"{MARTIF[MARTIF.index('<termEntry>') : MARTIF.index('</body>')]}\n<termEntry>")


def table(folder: Path, name: str, text: str) -> Terms:
    (folder / name).write_text(text)
    return read_terms(folder / name, "en", "de")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.tsv", 'pump\t Pumpe \n\nLiland\t=\nMr. "X"\t\n'),
        ("t.TSV", '\ufeffsource\tTarget\r\npump\tPumpe\r\nLiland\t\r\nMr. "X"\t=\r\n'),
        ("t.csv", 'pump,Pumpe\nLiland,=\n"Mr. ""X""",\n'),
        ("t.csv", 'Source;target\npump;Pumpe\n;\nLiland;=\n"Mr. ""X""";=\n'),
    ],
)
def test_rows(tmp_path: Path, name: str, text: str) -> None:
    terms = table(tmp_path, name, text)
    assert len(terms) == 3
    expected = [("pump", "Pumpe"), ("Liland", "Liland"), ('Mr. "X"', 'Mr. "X"')]
    assert found('a pump in Liland of Mr. "X"', terms) == expected


def test_tbx(tmp_path: Path) -> None:
    terms = table(tmp_path, "t.tbx", TBX)
    assert len(terms) == 2
    assert found("a heat pump, a pump & co", terms) == [("heat pump", "Pumpe"), ("pump & co", "Pumpe")]
    assert found("a pump", table(tmp_path, "m.tbx", MARTIF)) == [("pump", "Pumpe")]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("t.tsv", "a\tb\nc\td\na\tx\n", "t.tsv line 3: the source term 'a' is in {}/t.tsv line 1, too"),
        ("t.tsv", "a\tb\n \tx\n", "t.tsv line 2: the source term is empty"),
        ("t.tsv", "a\x01b\tx\n", "t.tsv line 1: the source term 'a\\x01b' has a control character"),
        ("t.tsv", "a\tx\u2028y\n", "t.tsv line 1: the target term 'x\\u2028y' has a control character"),
        ("t.tsv", "a b\n", "t.tsv line 1 has 1 column, not 2: write the source term, a tab and"),
        ("t.tsv", "a\tb\tc\n", "t.tsv line 1 has 3 columns, not 2"),
        ("t.csv", 'a,b\n"c,d\n', "t.csv line 2: not valid CSV"),
        ("t.csv", 'a,b\n"a",c\n', "t.csv line 2: the source term 'a' is in {}/t.csv line 1, too"),
        ("t.txt", "a\tb\n", "t.txt: a table of terms ends in .tsv, .csv, .tbx"),
        ("t.tbx", "<martif><body>\n<", "t.tbx line 2 is not well-formed XML"),
        ("t.tbx", "", "t.tbx line 1 is not well-formed XML"),
        ("t.tbx", TBX.replace("de-DE", "nl"), "t.tbx has no entry with a term in en and one in de"),
        ("t.tbx", TWICE, "t.tbx line 6: the source term 'pump' is in {}/t.tbx line 2, too"),
        ("t.tbx", '<!DOCTYPE martif SYSTEM "x.dtd">' + MARTIF, "t.tbx line 1 has a document type"),
        ("t.tbx", '<!DOCTYPE m [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>\n<m>&b;</m>', "line 1 has a document type"),
    ],
)
def test_refusals(tmp_path: Path, name: str, text: str, part: str) -> None:
    with pytest.raises(DataError) as refused:
        table(tmp_path, name, text)
    assert part.format(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path, kind: str) -> None:
    between = {"tsv": "\t", "csv": ","}[kind]
    (tmp_path / f"t.{kind}").write_text(f"dog{between}Hund\ncoffee{between}café\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"line 2 has bytes that are not UTF-8: save the text as UTF-8$"):
        read_terms(tmp_path / f"t.{kind}", "en", "de")


def test_missing_files_and_tables_that_are_no_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"terms: .*no\.tsv does not exist: correct the name$"):
        read_terms(tmp_path / "no.tsv", "en", "de")
    for entries, part in (({"": "x"}, "is empty"), ({"a": 3}, "are texts"), ({"a": "b", " a": "c"}, "is in terms")):
        with pytest.raises(DataError, match=part):
            Terms.of(entries)
