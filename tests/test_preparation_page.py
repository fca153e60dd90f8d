"""The pages about a preparation: their figures are those of the JSON, and no text can become markup."""

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nmt.errors import DataError
from nmt.pages.preparation import read_preparation, write_preparation
from nmt.pages.preparation_facts import Histogram, advice, lengths, share_of, spread
from nmt.pages.preparation_html import preparation_page, shown
from nmt.pages.preparation_markdown import preparation_markdown
from tests.test_experts_page import Page

HOSTILE = [
    "<script>alert('x')</script>",
    "</p></div></article></main></body></html><!--",
    '"><img src=x onerror=alert(1)>',
    "&lt;b&gt; &amp; \"'",
    "bell\x07 escape\x1b[31m nul\x00 tab\t end",
    "line\u2028separator\u2029\x85next",
    "\u202eevil right to left override",
    "zero\u200bwidth no\u00a0break \ufeffmark",
    "{} {0} {name} %s",
    "a|b `c` *d* [e](f) # g | <b>h</b>",
    "lone \ud800 surrogate",
    "هذا نص من اليمين إلى اليسار 12",
    "می\u200cخواهم",
    "long " * 400,
    "   ",
    "",
]


def example(source: str = "A house.", target: str = "Ein Haus.", row: int | None = 7, **more: Any) -> dict[str, Any]:
    return {"source": source, "target": target, "direction": "en-de", "file": "a.en", "row": row, "score": None, **more}


def figures() -> dict[str, Any]:
    """A report with all parts. Every count differs from all others."""
    return {
        "format": 1,
        "name": "corpus-a",
        "languages": ["en", "de"],
        "directions": ["en-de"],
        "path": "data/prepared/corpus-a-123",
        "pairs_read": 20_010,
        "pairs_kept": 14_203,
        "held_out": 107,
        "sources": [
            {"path": "a.en", "pairs_read": 19_108, "pairs_kept": 14_303},
            {"path": "b.en", "pairs_read": 902, "pairs_kept": 0},
        ],
        "changes": [
            {
                "name": "punctuation",
                "why": "as Moses normalises it",
                "pairs": 311,
                "examples": [
                    example('"Yes"', "ja", before_source="\u201cYes\u201d", before_target="ja"),
                ],
            }
        ],
        "rules": [
            {"name": "blank", "why": "with a blank side", "pairs": 0, "examples": []},
            {"name": "max_words", "why": "with more than 60 words", "pairs": 5_197, "examples": [example()] * 12},
            {"name": "duplicates", "why": "seen before", "pairs": 503, "examples": [example("x", "y", None)]},
        ],
        "augmented": [{"name": "title_case", "pairs": 613, "examples": [example("A House.", "Ein Haus.")]}],
        "histograms": {
            "read": {
                "words": {"source": [1, 2, 17_003, 3_004], "target": [0, 20_010]},
                "ratio": [20_000, 10],
                "pieces": {},
            },
            "kept": {
                "words": {"source": [0, 0, 14_203], "target": [0, 14_203]},
                "ratio": [14_203],
                "pieces": {"source": [0, 0, 0, 14_203], "target": [0, 14_203]},
            },
        },
        "characters": {"source": [["e", 4_001], [" ", 3_002], ["\u200b", 3]], "target": [["ß", 5]]},
        "num_characters": {"source": 3, "target": 1},
        "vocabulary": {
            "size": 8_329,
            "kind": "unigram",
            "from": "learned",
            "subwords_per_word": 1.271,
            "characters": 600_001,
            "characters_in_bytes": 701,
            "lines_in_bytes": 691,
            "whole_words": 0.832,
            "in_bytes": [["☃", 677]],
            "unused": 19,
            "dev": {"subwords_per_word": 1.312, "characters_in_bytes": 13},
            "test": {"subwords_per_word": 1.999, "characters_in_bytes": 23},
        },
        "overlap": {
            "dev": {"pairs": 1_001, "kept_with_source": 31, "kept_with_target": 29, "kept_with_both": 0},
            "test": {"pairs": 1_002, "kept_with_source": 47, "kept_with_target": 43, "kept_with_both": 41},
        },
        "final_pairs": [example(f"source {place}", f"target {place}", place, score=-1.5) for place in range(20)],
        "seconds": {"read": 100.0, "vocabulary": 33.0, "encode": 50.5},
        "processes": 4,
    }


def written(folder: Path, report: dict[str, Any]) -> Path:
    (folder / "report").mkdir(exist_ok=True)
    path = folder / "report" / "prepare.json"
    path.write_text(json.dumps(report))
    return path


def both_forms(folder: Path, report: dict[str, Any]) -> tuple[str, str]:
    written(folder, report)
    page, markdown = write_preparation(folder)
    assert (page, markdown) == (folder / "report" / "prepare.html", folder / "report" / "prepare.md")
    return page.read_text(), markdown.read_text()


def counts_in(value: Any) -> list[int]:
    """All counts of a part."""
    if isinstance(value, dict):
        return [count for each in value.values() for count in counts_in(each)]
    if isinstance(value, list):
        return [count for each in value for count in counts_in(each)]
    return [value] if isinstance(value, int) else []


# ------------------------------------------------------------------------------------------------- figures


def test_all_counts_are_on_both_pages(tmp_path: Path) -> None:
    report = figures()
    page, markdown = both_forms(tmp_path, report)
    words = Page(page).words()
    counts = counts_in({name: report[name] for name in report if name not in ("format", "histograms")})
    assert len(counts) > 60
    for form in (words, markdown):
        found = re.findall(r"\d+(?:,\d{3})*", form)
        assert [count for count in counts if f"{count:,}" not in found] == []
    assert "3.1 minutes" in words
    assert "3.1 minutes" in markdown
    assert "71%" in words  # share kept
    for setting in ("corpus.filters.max_words", "corpus.filters.duplicates", "corpus.punctuation"):
        assert setting in words
        assert f"`{setting}`" in markdown


def test_the_bars_of_rules_are_in_proportion() -> None:
    report = figures()
    page = preparation_page(report | {"vocabulary": None})
    rows = re.findall(
        r"<b>([^<]*)</b><code>corpus\.filters\.\w+</code></span><span class=bar><i.*?width:([\d.]+)%", page
    )
    widths = {name: float(width) for name, width in rows}
    assert widths == {
        "with a blank side": 0,
        "with more than 60 words": 100,
        "seen before": pytest.approx(100 * 503 / 5_197, abs=0.01),
    }
    [stack] = re.findall(r"<div class=flow><span class=bar>(.*?)</span>", page)
    shares = [float(width) for width in re.findall(r"width:([\d.]+)%", stack)]
    assert shares == pytest.approx([100 * count / 20_010 for count in (14_203, 107, 5_700)], abs=0.001)


def test_examples_are_folded_and_at_most_ten_per_rule() -> None:
    page = preparation_page(figures())
    [rule] = re.findall(
        r"<details><summary class=row>(?:(?!</details>).)*max_words.*?</details>", page, flags=re.DOTALL
    )
    assert rule.count("<article") == 10
    assert "10 of 5,197 pairs" in rule
    assert "a.en</bdi>, row 7" in rule
    assert "<details open" not in page
    [none] = re.findall(r'<div class="row none">.*?</div>', page)
    assert "corpus.filters.blank" in none


def test_a_change_is_shown_before_and_after() -> None:
    page = preparation_page(figures())
    [before, after] = re.findall(r"<dt>(?:before|after)</dt><dd[^>]*>(.*?)</dd>", page)
    assert re.sub("<[^>]*>", "", before) == "\u201cYes\u201d"
    assert html.unescape(re.sub("<[^>]*>", "", after)) == '"Yes"'
    assert before.count("<mark>") == after.count("<mark>") == 2


def test_a_change_without_the_text_before_is_shown(tmp_path: Path) -> None:
    report = figures()
    report["changes"][0]["examples"] = [example("only \u00ad after")]
    page, markdown = both_forms(tmp_path, report)
    assert ">before<" not in page
    assert 'only <i class=unseen title="U+00AD SOFT HYPHEN">00AD</i> after' in page
    assert "| en-de, `a.en`, row 7 | only ⟨U+00AD⟩ after | Ein Haus. |" in markdown


def test_final_pairs_have_their_places() -> None:
    page, markdown = preparation_page(figures()), preparation_markdown(figures())
    for place in range(20):
        assert f'<p dir="auto" lang="en">source {place}</p>' in page
        assert f"| en-de, `a.en`, row {place}, score -1.500 | source {place} | target {place} |" in markdown


def test_bars_of_a_histogram_add_up() -> None:
    long = {"read": [30] * 390 + [1] * 10, "kept": [20] * 300 + [1] * 20}
    report = figures()
    report["histograms"]["read"]["words"]["source"] = long["read"]
    report["histograms"]["kept"]["words"]["source"] = long["kept"]
    page = preparation_page(report)
    [chart] = re.findall(r'<svg[^>]*aria-label="Words, en">.*?</svg>', page)
    tips = re.findall(r"<title>(.*?): read ([\d,]+), kept ([\d,]+)</title>", chart)
    assert 10 < len(tips) < 60
    for column, counts in enumerate(long.values(), 1):
        assert sum(int(tip[column].replace(",", "")) for tip in tips) == sum(counts)
        kind = ("read", "kept")[column - 1]
        heights = [float(each) for each in re.findall(rf'<rect class="{kind}"[^>]*height="([\d.]+)"', chart)]
        drawn = [int(tip[column].replace(",", "")) for tip in tips if tip[column] != "0"]
        assert heights == pytest.approx([count * heights[0] / drawn[0] for count in drawn], abs=0.02)
    assert tips[0][0].startswith("0 to ")
    assert tips[-1][0].endswith(" or more")


def test_figures_of_a_histogram() -> None:
    words = Histogram("", {})
    assert spread(words, []) is None
    assert spread(words, [0, 0]) is None
    assert spread(words, [0, 2, 0, 2]) == (2.0, "1", "3 or more")
    assert spread(words, [0, 100, 1, 0]) == (pytest.approx(102 / 101), "1", "1")
    ratios = spread(Histogram("", {}, 1, 0.1), [1, 0, 1, 0])
    assert ratios == (pytest.approx(1.15), "1", "1.2")
    assert next(iter(lengths(figures()))).title == "Words, en"


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(0, 0, "–"), (0, 5, "0%"), (5, 5, "100%"), (99_999, 100_000, "over 99.9%"), (1, 8, "12.5%")],
)
def test_nearly_all_is_not_all(part: int, whole: int, expected: str) -> None:
    assert share_of(part, whole) == expected


# ------------------------------------------------------------------------------------------------- advice


def remarks(report: dict[str, Any]) -> list[str]:
    return [each.text.format(*each.names) for each in advice(report)]


def healthy() -> dict[str, Any]:
    report = figures()
    report["pairs_kept"] += 5_000
    report["rules"][1]["pairs"] -= 5_000
    report["sources"][1]["pairs_kept"] = 900
    report["vocabulary"] |= {"characters_in_bytes": 600, "test": None}
    for found in report["overlap"].values():
        found |= {"kept_with_source": 0, "kept_with_target": 0, "kept_with_both": 0}
    return report


def test_nothing_is_remarked_on_healthy_figures() -> None:
    assert remarks(healthy()) == []
    assert "No figure is suspicious." in preparation_page(healthy())
    assert "No figure is suspicious." in preparation_markdown(healthy())


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("rules", lambda part: part[1].update(pairs=4_100), "loosen or switch off corpus.filters.max_words"),
        ("rules", lambda part: part[2].update(pairs=4_100), "repeats itself"),
        ("rules", lambda part: part[1].update(pairs=196), "do not add up: 20,010 pairs were read"),
        ("overlap", lambda part: part["test"].update(kept_with_both=1), "1 kept training pair is also in the test set"),
        ("overlap", lambda part: part["dev"].update(kept_with_both=2), "2 kept training pairs are also in the dev set"),
        (
            "overlap",
            lambda part: part["test"].update(kept_with_source=9),
            "the test set 9 times, and the target 0 times",
        ),
        ("sources", lambda part: part[1].update(pairs_kept=0), "None of the 902 pairs of b.en was kept"),
        ("sources", lambda part: part[1].update(pairs_read=0, pairs_kept=0), "b.en has no pairs"),
        ("vocabulary", lambda part: part.update(characters_in_bytes=601), "corpus.subwords.character_coverage"),
        ("vocabulary", lambda part: part.update(unused=833), "corpus.subwords.vocab_size"),
        ("vocabulary", lambda part: part["dev"].update(subwords_per_word=1.7), "dev set needs 1.70 subwords per word"),
        ("histograms", lambda part: part["kept"].update(ratio=[0] * 20 + [9]), "corpus.filters.max_length_ratio"),
        ("characters", lambda part: part["target"].append(["\ufffd", 4]), "4 replacement characters (U+FFFD)"),
        ("augmented", lambda part: part[0].update(pairs=0), "Set corpus.examples.title_case to 0"),
    ],
)
def test_a_suspicious_figure_is_remarked(part: str, change: Any, expected: str) -> None:
    report = healthy()
    change(report[part])
    found = remarks(report)
    assert any(expected in remark for remark in found)
    page = Page(preparation_page(report)).words()
    for name in next(each for each in advice(report) if expected in each.text.format(*each.names)).names:
        assert name in page


def test_little_is_kept() -> None:
    report = figures() | {"pairs_kept": 0}
    assert "No pair was kept, so there is nothing to train on." in remarks(report)
    report = healthy() | {"pairs_read": 45_000}
    assert any("Only 42.7% of the pairs were kept" in remark for remark in remarks(report))


def test_severe_advice_comes_first() -> None:
    found = [each.severe for each in advice(figures())]
    assert found == sorted(found, reverse=True)
    assert {True, False} == set(found)


def test_text_of_the_test_set_in_the_training_text_is_a_warning() -> None:
    assert "<p class=warning>41 kept training pairs are also in the test set." in preparation_page(figures())
    assert "<p class=warning>" not in preparation_page(healthy())


# ------------------------------------------------------------------------------------------------- any text


def hostile(value: Any, text: str, key: str = "") -> Any:
    """A part with its texts replaced. Directions and the languages remain texts too."""
    if isinstance(value, dict):
        return {name: hostile(each, text, name) for name, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, text, key) for each in value]
    return text if isinstance(value, str) and len(value) > 1 else value


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(tmp_path: Path, text: str) -> None:
    report = hostile(figures(), text)
    report["overlap"][text] = report["overlap"]["dev"]
    report["seconds"][text] = 2.0
    page, markdown = both_forms(tmp_path, report)
    found = Page(page)
    plain = Page(preparation_page(figures()))
    for tag in ("script", "img", "b", "main", "body", "style", "a"):
        # The set and the stage named by the text add a bold name.
        assert found.tags[tag] == plain.tags[tag] + (tag == "b")
    assert not [name for _, name, _ in found.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert all(value.startswith("#") for value in found.values("a", "href"))
    assert set(found.values("p", "dir")) == {"auto"}
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u200b\ud800]", re.sub("<title>.*?</title>", "", page)
    )
    outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", markdown)
    assert not re.search(r"(?<!\\)<", outside)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", line))) - 1 for line in tables}
    assert cells == {3, 4, 5}


def test_unseen_characters_are_shown() -> None:
    assert shown("a\u200bb") == 'a<i class=unseen title="U+200B ZERO WIDTH SPACE">200B</i>b'
    assert shown("\x00") == '<i class=unseen title="U+0000">0000</i>'
    assert shown("می\u200cخواهم") == "می\u200cخواهم"
    assert shown("x" * 700).startswith("x" * 600 + "<span")
    assert "(100 more characters)" in shown("x" * 700)


def test_unseen_characters_are_shown_in_markdown() -> None:
    report = figures()
    report["final_pairs"] = [example("a\u200bb", "می\u200cخواهم")]
    assert "| a⟨U+200B⟩b | می" in preparation_markdown(report)


def test_blank_sides_are_named() -> None:
    report = figures()
    report["final_pairs"] = [example("", "   ")]
    page = preparation_page(report)
    assert "<i class=soft>empty</i>" in page
    assert "<i class=soft>3 blanks</i>" in page


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page, _ = both_forms(tmp_path, figures())
    assert not re.search(r"https?:|//|@import|url\(", page)
    anchors = set(Page(page).values("a", "href"))
    assert anchors == {f"#{name}" for name in Page(page).values("section", "id")}


# ------------------------------------------------------------------------------------------------- missing and wrong


def test_all_parts_but_the_counts_may_be_missing(tmp_path: Path) -> None:
    least = {"format": 1, "name": "a", "pairs_read": 0, "pairs_kept": 0}
    page, markdown = both_forms(tmp_path, least)
    assert "No rule was active." in Page(page).words()
    assert markdown.startswith("# Preparation of a\n")
    for name in figures().keys() - least.keys():
        report = figures()
        del report[name]
        without = both_forms(tmp_path, report)
        assert both_forms(tmp_path, figures() | {name: None}) == without
        assert all(without)


def zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: zero(each) for name, each in value.items()}
    if isinstance(value, list):
        return [zero(each) for each in value]
    return 0 if isinstance(value, int | float) else value


def test_all_counts_may_be_zero(tmp_path: Path) -> None:
    report = zero(figures()) | {"format": 1}
    page, markdown = both_forms(tmp_path, report)
    Page(page)
    assert "nan" not in page + markdown
    empty = figures() | {name: [] for name in ("sources", "changes", "rules", "augmented", "final_pairs")}
    empty["characters"] = {"source": [], "target": []}
    empty["histograms"]["kept"] = {"words": {"source": [], "target": []}, "ratio": []}
    page, markdown = both_forms(tmp_path, empty)
    assert "<h2>Characters</h2>" not in page
    assert "## Sources" not in markdown


def test_many_directions_have_sides(tmp_path: Path) -> None:
    report = figures() | {"languages": ["en", "de", "fr"], "directions": ["en-de", "de-en", "en-fr"] * 6}
    page, markdown = both_forms(tmp_path, report)
    assert "en → de, de → en, en → fr" in page
    assert "and 6 more" in markdown
    assert "Words, source" in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, "format 2 is unknown"),
        ({"pairs_read": "many"}, "pairs_read: 'many' is not a whole number"),
        ({"pairs_kept": -1}, "pairs_kept: -1 is not a figure of a text"),
        ({"pairs_kept": 10**30}, "pairs_kept: 1e+30 is not a figure of a text"),
        ({"seconds": {"read": float("inf")}}, "seconds.read: inf is not a figure of a text"),
        ({"seconds": {"read": float("nan")}}, "seconds.read: nan is not a figure of a text"),
        ({"seconds": {"a\nb\x1b": "x"}}, "seconds.a b\ufffd: 'x' is not a number"),
        ({"rules": [{"name": "a", "why": "b", "pairs": 1, "examples": [{}]}]}, "rules.0.examples.0: source is missing"),
        ({"final_pairs": [example(row="<b>")]}, "final_pairs.0.row: '<b>' is not a whole number"),
        ({"changes": [{"name": "a", "why": "", "pairs": 1, "examples": [example(before_source=1)]}]}, "1 is not text"),
        (
            {"changes": [{"name": "a", "why": "", "pairs": 1, "examples": [3]}]},
            "changes.0.examples.0: 3 is not a mapping",
        ),
        ({"characters": {"source": [["e", 1, 2]]}}, "characters.source.0 is not [character, count]"),
        ({"characters": {"source": [["ee", 1]]}}, "characters.source.0 is not [character, count]"),
        ({"characters": {"source": [[1, "e"]]}}, "characters.source.0 is not [character, count]"),
        ({"histograms": {"read": []}}, "histograms.read: [] is not a mapping"),
        ({"vocabulary": {}}, "subwords_per_word is missing"),
        ({"overlap": {"dev": {}}}, "overlap.dev: pairs is missing"),
    ],
)
def test_a_wrong_figure_is_one_line(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = written(tmp_path, figures() | change)
    with pytest.raises(DataError) as raised:
        write_preparation(tmp_path)
    assert expected in str(raised.value)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "report" / "prepare.html").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_a_file_that_is_no_report_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "report").mkdir()
    if content is not None:
        (tmp_path / "report" / "prepare.json").write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_preparation(tmp_path / "report" / "prepare.json")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("depth", [700, 5_000])
def test_a_report_nested_too_deeply_is_one_line(tmp_path: Path, depth: int) -> None:
    path = written(tmp_path, figures())
    deep = '{"other": ' + "[" * depth + "]" * depth + ", "
    path.write_text(path.read_text().replace("{", deep, 1))
    with pytest.raises(DataError, match="it is nested too deeply"):
        read_preparation(path)


def test_the_figures_read_are_those_written(tmp_path: Path) -> None:
    report = figures()
    expected = copy.deepcopy(report)
    assert read_preparation(written(tmp_path, report)) == expected
    del report["histograms"]["read"]["pieces"]
    assert read_preparation(written(tmp_path, report)) == expected
