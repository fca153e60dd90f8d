"""Segments in markup: TMX files, and WMT's test sets in SGML and XML."""

import gzip
import tracemalloc
from pathlib import Path

import pytest

from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs
from nmt.errors import DataError
from nmt.text.xml import XmlParser

TMX = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-GB"><seg>Press <bpt i="1">&lt;b&gt;</bpt>Start<ept i="1">&lt;/b&gt;</ept> &amp; wait.</seg></tuv>
<tuv xml:lang="DE"><seg>Drücken Sie
  Start.</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>No German.</seg></tuv><tuv xml:lang="fr"><seg>Rien.</seg></tuv></tu>
<tu><tuv lang="de"><seg>Zwei</seg></tuv><tuv lang="en_US"><seg>Two</seg></tuv>
<tuv lang="en"><seg>A pair</seg></tuv></tu>
</body></tmx>
"""
SGM = """<refset setid="newstest" srclang="any" trglang="de">
<doc sysid="ref" docid="a" genre="news">
<hl><seg id="1">Eins &amp; zwei</seg></hl>
<p>
<seg id="2"> R&D und <b>mehr</b> </seg>
</p></doc></refset>
"""
XML = """<?xml version='1.0' encoding='utf-8'?>
<dataset id="newstest2021"><collection id="general">
<doc origlang="en" id="a">
<src lang="en"><p><seg id="1">One</seg><seg id="2">Two &lt;3</seg></p></src>
<ref lang="de" translator="A"><p><seg id="1">Eins</seg><seg id="2">Zwei</seg></p></ref>
<ref lang="de" translator="B"><p><seg id="1">Ein</seg><seg id="2">Zwo</seg></p></ref>
<hyp lang="de" system="X"><p><seg id="1">x</seg><seg id="2">y</seg></p></hyp>
</doc>
<doc origlang="de" id="b"><src lang="en"><p><seg id="1">Three</seg></p></src>
<ref lang="fr" translator="A"><p><seg id="1">Trois</seg></p></ref>
<ref lang="de" translator="B"><p><seg id="1">Drei</seg></p></ref></doc>
</collection></dataset>
"""


def texts(folder: Path, split: str = "train", **files: list[str]) -> list[tuple[str, str]]:
    corpus = CorpusConfig(source="files", root=str(folder), **{split: FilesConfig(**files)})
    return [pair[:2] for pair in read_pairs(corpus, split)]


@pytest.mark.parametrize("name", ["a.tmx", "a.tmx.gz"])
def test_pairs_of_a_tmx_file(tmp_path: Path, name: str) -> None:
    data = TMX.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(tmp_path, pairs=[name]) == [("Press Start & wait.", "Drücken Sie Start."), ("Two", "Zwei")]
    # In one line, and in UTF-16, as many programs export them.
    (tmp_path / "one.tmx").write_text(TMX.replace("\n", " "), encoding="utf-8")
    assert texts(tmp_path, pairs=["one.tmx"]) == texts(tmp_path, pairs=[name])
    (tmp_path / "wide.tmx").write_text(TMX.replace("UTF-8", "UTF-16"), encoding="utf-16")
    assert texts(tmp_path, pairs=["wide.tmx"]) == texts(tmp_path, pairs=[name])


def test_tmx_that_is_refused(tmp_path: Path) -> None:
    bomb = TMX.replace('SYSTEM "tmx14.dtd"', '[<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]')
    cases = {
        bomb: "declares the entity a",
        TMX[: len(TMX) // 2]: r"line \d+ is not well-formed XML \(no element found\)",
        TMX.replace("Zwei", "x" * (1 << 23)): "has a segment of more than",
    }
    for text, problem in cases.items():
        (tmp_path / "a.tmx").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=problem) as caught:
            texts(tmp_path, pairs=["a.tmx"])
        assert str(tmp_path / "a.tmx") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_test_sets_of_wmt(tmp_path: Path) -> None:
    (tmp_path / "ref.sgm").write_text(SGM)
    (tmp_path / "src.sgm.gz").write_bytes(gzip.compress(SGM.replace("Eins", "One").encode()))
    (tmp_path / "set.xml").write_text(XML)
    (tmp_path / "two.txt").write_text("1\n2\n")
    expected = [("One & zwei", "Eins & zwei"), ("R&D und mehr", "R&D und mehr")]
    assert texts(tmp_path, "dev", source=["src.sgm.gz"], target=["ref.sgm"]) == expected
    assert texts(tmp_path, "test", source=["set.xml"], target=["set.xml"]) == [
        ("One", "Eins"),
        ("Two <3", "Zwei"),
        ("Three", "Drei"),
    ]
    assert texts(tmp_path, "dev", source=["two.txt"], target=["ref.sgm"])[0] == ("1", "Eins & zwei")
    with pytest.raises(DataError, match=r"3 lines in .*set\.xml but 2 in .*two\.txt"):
        texts(tmp_path, "dev", source=["set.xml"], target=["two.txt"])
    (tmp_path / "set.xml").write_text(XML.replace('lang="de"', 'lang="cs"'))
    with pytest.raises(DataError, match=r"corpus\.dev\.target: .*set\.xml has no segments of the target in de"):
        texts(tmp_path, "dev", source=["set.xml"], target=["set.xml"])


def test_columns_by_path_and_by_varying_languages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"inputs": {"text": "one"}, "targets": ["eins", "ein"]}\n')
    assert texts(tmp_path, pairs=["a.jsonl"], columns=["inputs.text", "targets.0"]) == [("one", "eins")]
    with pytest.raises(DataError, match=r"line 1: no column targets\.7"):
        texts(tmp_path, pairs=["a.jsonl"], columns=["inputs.text", "targets.7"])
    (tmp_path / "b.jsonl").write_text('{"translation": {"language": ["de", "en"], "translation": ["zwei", "two"]}}\n')
    assert texts(tmp_path, pairs=["b.jsonl"]) == [("two", "zwei")]
    assert SentencePair("a", "b")[:2] == ("a", "b")


def refusal(folder: Path, split: str = "train", **files: list[str]) -> str:
    with pytest.raises(DataError) as caught:
        texts(folder, split, **files)
    message = str(caught.value)
    assert "\n" not in message
    return message


MEGABYTES = 10_000_000


def filled(text: str) -> str:
    return text * (MEGABYTES // len(text))


# Each takes hours if a search starts again at every tag.
@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.sgm", "<srcset>\n" + filled("<seg>"), "a.sgm line 2 has a <seg> without its </seg>"),
        ("a.sgm", "<srcset>\n" + filled("<seg>x</seg ") + "<p>", "a.sgm line 2 has a <seg> without its </seg>"),
        ("a.sgm", "<srcset><seg>" + filled("<"), "without its </seg>"),
        ("a.sgm", "<srcset><seg>&#" + "9" * 5000 + ";</seg>", "a.sgm has a character reference"),
        ("a.sgm", "<srcset><seg>" + filled("<b ") + "</seg>", "a.sgm has a segment of more than 4,194,304 characters"),
        ("a.xml", "<dataset>" + filled("<seg "), "a.xml has no segments of the source in en"),
        ("a.xml", "<dataset><src " + filled("a") + ">", "a.xml has no segments of the source in en"),
        ("a.xml", "<dataset><src " + filled("a ") + "><seg>", "a.xml line 1 has a <seg> without its </seg>"),
        ("a.xml", "<dataset><src lang='en'>\n<seg>one<seg>two</seg></src>", "a.xml line 2 has a <seg> without"),
        ("a.xml", "<dataset><src lang='en'>\n<seg>one</src><src lang='en'>", "a.xml line 2 has a <seg> without"),
    ],
    ids=[f"case{number}" for number in range(10)],
)
def test_test_sets_that_are_refused_in_linear_time(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    assert problem in refusal(tmp_path, "dev", source=[name], target=[name])


def test_segments_without_end_are_read_in_linear_time(tmp_path: Path) -> None:
    for filling in ("<", "<b ", "&", "<!--", "</"):
        text = filling * (1 << 20)
        (tmp_path / "a.sgm").write_text(f"<srcset><seg>{text}</seg><seg>2</seg>")
        assert texts(tmp_path, "dev", source=["a.sgm"], target=["a.sgm"])[1:] == [("2", "2")]
    (tmp_path / "a.sgm").write_text("<srcset><seg id='1'>5 < 6 and <b>7</b> > 3 <<i>R&D</i></seg>")
    assert texts(tmp_path, "dev", source=["a.sgm"], target=["a.sgm"])[0][0] == "5 < 6 and 7 > 3 <R&D"


@pytest.mark.parametrize(
    ("begin", "filling", "problem"),
    [
        ("<tmx>\n", "<a>", "line 2 has more than 100 elements inside each other"),
        ("<tmx>\n<!--", "x", "line 2 has a tag or comment of more than 4,194,304 bytes"),
        ("\n<!--", "x", "line 2 has a tag or comment of more than"),
        ("<tmx a='", "x", "line 1 has a tag or comment of more than"),
        ("<tmx>\n<?p ", "x", "line 2 has a tag or comment of more than"),
        ("<!DOCTYPE tmx [\n", "<!-- x -->", "line 2 has a document type (<!DOCTYPE>) of more than"),
        ("<!DOCTYPE tmx [\n<!ATTLIST a b CDATA 'x'>]><tmx>", "<a/>", "line 2 declares a default value of b in <a>"),
        ("<!DOCTYPE tmx SYSTEM 'a.dtd'>\n<tmx>", "&nbsp;", "line 2 has the entity &nbsp;"),
        ("<tmx><tu><tuv xml:lang='en'>\n<seg>", "&amp;", "line 2 has a segment of more than 4,194,304 characters"),
    ],
    ids=[f"case{number}" for number in range(9)],
)
def test_tmx_without_end_is_refused_in_little_memory(tmp_path: Path, begin: str, filling: str, problem: str) -> None:
    packed = gzip.compress(filled(filling).encode())
    (tmp_path / "a.tmx.gz").write_bytes(gzip.compress(begin.encode()) + packed * 12)
    tracemalloc.start()
    assert f"a.tmx.gz {problem}" in refusal(tmp_path, pairs=["a.tmx.gz"])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60_000_000


def test_tmx_with_names_without_end_is_refused(tmp_path: Path) -> None:
    for text in ("".join(f"<a{number}/>" for number in range(2000)), f"<{'a' * 100_000}/>"):
        (tmp_path / "a.tmx").write_text(f"<tmx>{text}</tmx>")
        assert "a.tmx line 1 has more than 1,000 names of elements" in refusal(tmp_path, pairs=["a.tmx"])


def test_a_tag_that_comes_byte_by_byte_is_parsed_in_linear_time() -> None:
    names = []

    class Nothing:
        def start(self, name: str, _attributes: dict[str, str]) -> None:
            names.append(name)

        def end(self, name: str) -> None:
            pass

        def characters(self, text: str) -> None:
            pass

    parser = XmlParser("x", Nothing())
    for byte in b"<a><!--" + b"x" * 1_000_000 + b"--><b/></a>":
        parser.feed(bytes([byte]))
    parser.close()
    assert names == ["a", "b"]


def reported(folder: Path, split: str = "train", **files: list[str]) -> tuple[list[tuple[str, str]], ReadReport]:
    report = ReadReport()
    corpus = CorpusConfig(source="files", root=str(folder), **{split: FilesConfig(**files)})
    return [pair[:2] for pair in read_pairs(corpus, split, report)], report


def test_other_encodings_are_refused_or_counted(tmp_path: Path) -> None:
    declared = TMX.replace("UTF-8", "ISO-8859-1")
    (tmp_path / "a.tmx").write_text(declared, encoding="latin-1")
    message = refusal(tmp_path, pairs=["a.tmx"])
    assert f"{tmp_path / 'a.tmx'} line 5 is not UTF-8, and the file declares ISO-8859-1: convert it" in message
    assert "iconv -f ISO-8859-1 -t UTF-8 FILE > NEW" in message
    # After that command, the declaration is no longer what the file is.
    (tmp_path / "a.tmx").write_text(declared, encoding="utf-8")
    assert reported(tmp_path, pairs=["a.tmx"])[0][0][1] == "Drücken Sie Start."
    (tmp_path / "b.tmx").write_text(TMX, encoding="latin-1")
    pairs, report = reported(tmp_path, pairs=["b.tmx"])
    assert pairs[0][1] == "Dr\ufffdcken Sie Start."
    assert report.invalid_lines == 1
    (tmp_path / "jp.tmx").write_text(TMX.replace("UTF-8", "ISO-2022-JP").replace("ü", "日"), encoding="iso2022_jp")
    assert "declares ISO-2022-JP" in refusal(tmp_path, pairs=["jp.tmx"])
    (tmp_path / "a.sgm").write_text(SGM.replace("mehr", "mögen"), encoding="latin-1")
    pairs, report = reported(tmp_path, "dev", source=["a.sgm"], target=["a.sgm"])
    assert pairs[1][0] == "R&D und m\ufffdgen"
    assert report.invalid_lines == 2  # once for each side
    (tmp_path / "a.sgm").write_text(f"<?xml version='1.0' encoding='latin1'?>\n{SGM}ö", encoding="latin-1")
    assert "a.sgm line 8 is not UTF-8, and the file declares latin1" in refusal(
        tmp_path, "dev", source=["a.sgm"], target=["a.sgm"]
    )


def test_tmx_without_the_languages_names_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.tmx").write_text(TMX, encoding="utf-8")
    assert reported(tmp_path, pairs=["a.tmx"])[1].empty_rows == 1
    (tmp_path / "b.tmx").write_text(TMX.replace('"de"', '"nl"').replace('"DE"', '"nl-\nBE"'), encoding="utf-8")
    message = refusal(tmp_path, pairs=["a.tmx", "b.tmx"])
    assert f"{tmp_path / 'b.tmx'} has no unit with text in en and de" in message
    assert "its languages (xml:lang): en, en-GB, en_US, fr, nl, nl-BE" in message
    (tmp_path / "b.tmx").write_text("<tmx/>")
    assert "its languages (xml:lang): none" in refusal(tmp_path, pairs=["b.tmx"])


def test_endings_are_read_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "A.TMX").write_text(TMX, encoding="utf-8")
    (tmp_path / "B.Tmx.GZ").write_bytes(gzip.compress(TMX.encode()))
    assert texts(tmp_path, pairs=["A.TMX"]) == texts(tmp_path, pairs=["B.Tmx.GZ"]) != []
    (tmp_path / "newstest2014-deen-ref.de.SGM.GZ").write_bytes(gzip.compress(SGM.encode()))
    (tmp_path / "newstest2014-deen-ref.de.sgm").write_text(SGM)
    names = ["newstest2014-deen-ref.de.SGM.GZ"], ["newstest2014-deen-ref.de.sgm"]
    assert texts(tmp_path, "dev", source=names[0], target=names[1])[1][0] == "R&D und mehr"


def test_only_the_last_ending_makes_a_test_set(tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"corpus.xml.{language}").write_text(f"one <b>{language}</b>\n")
    assert texts(tmp_path, source=["corpus.xml.en"], target=["corpus.xml.de"]) == [("one <b>en</b>", "one <b>de</b>")]
    (tmp_path / "ref.sgm.de").write_text(SGM)
    assert "is a file of <refset> markup" in refusal(tmp_path, source=["ref.sgm.de"], target=["corpus.xml.de"])
