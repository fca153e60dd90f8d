"""results/*.json and the pages made from them: nothing is typed twice, and nothing is stale."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "results"


script = load_script("scripts/results/pages.py")


@pytest.mark.parametrize("name", script.PAGES)
def test_a_page_is_what_its_results_give(name: str):
    assert (PAGES / f"{name}.md").read_text() == script.page(name), "run python scripts/results/pages.py"


def test_charts_are_what_their_results_give():
    drawn = dict(script.charts())
    assert drawn
    # scripts/results/profile_step.py draws the steps, and small_data_tables.py the growth.
    assert {path.name for path in PAGES.glob("*.svg")} - {"step.svg", "growth.svg"} == drawn.keys()
    for file, drawing in drawn.items():
        assert (PAGES / file).read_text() == drawing, "run python scripts/results/pages.py"


def test_bars_are_as_long_as_their_figures():
    chart = {"file": "a.svg", "text": "a < b", "label": "{run}", "figure": "score", "cell": "{score:.1f}"}
    tree = ElementTree.fromstring(script.bars(chart, [{"run": "one & two", "score": 2.0}, {"run": "x", "score": 0.5}]))
    space = "{http://www.w3.org/2000/svg}"
    _, long, short = (float(each.attrib["width"]) for each in tree.iter(f"{space}rect"))
    assert long == 4 * short
    assert [each.text for each in tree.iter(f"{space}text")] == ["a < b", "one & two", "2.0", "x", "0.5"]


def test_the_table_of_the_readme_is_what_its_results_give():
    readme = (ROOT / "README.md").read_text()
    assert readme == script.with_table(readme), "run python scripts/results/pages.py"


def test_every_result_is_on_one_page_and_every_page_is_made():
    shown = [file for _, files in script.PAGES.values() for file in files]
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "results").glob("*.json"))
    assert {path.stem for path in PAGES.glob("*.md")} == script.PAGES.keys()


def test_pictures_of_results_are_there():
    for file in (ROOT / "results").glob("*.json"):
        for table in json.loads(file.read_text())["tables"]:
            assert "picture" not in table or (PAGES / table["picture"]["file"]).is_file()


def test_every_column_shows_something():
    """A misspelt figure in a cell would be a column of dashes."""
    for file in (ROOT / "results").glob("*.json"):
        for table in json.loads(file.read_text())["tables"]:
            lines = [line.split(" | ") for line in list(script.rows_as_markdown(table))[2:]]
            assert all(any(cell.strip("| ") != "-" for cell in column) for column in zip(*lines, strict=True)), file


def test_a_table():
    """A lacking figure is a dash, the best one is bold, and a cell cannot end early."""
    columns = [
        {"title": "run", "cell": "{run}"},
        {"title": "perplexity", "cell": "{perplexity:.1f}", "best": "lowest"},
        {"title": "tokens/s", "cell": "{slowest:,} to {fastest:,}"},
    ]
    rows = [{"run": "a|b", "perplexity": 5.25, "slowest": 1000}, {"run": "c", "perplexity": 5.0}, {"run": "d"}]
    rows[1] |= {"slowest": 1000, "fastest": 2000}
    assert list(script.rows_as_markdown({"columns": columns, "rows": rows})) == [
        "| run | perplexity | tokens/s |",
        "|---|---|---|",
        "| a\\|b | 5.2 | - |",
        "| c | **5.0** | 1,000 to 2,000 |",
        "| d | - | - |",
    ]


def test_rows_of_a_study_are_the_changes_that_have_been_run(tmp_path: Path):
    changes = [
        {"name": name, "change": f"the {name}", "variants": {"few": [], "many": []}} for name in ("both", "one", "none")
    ]
    study = {"variants": {"few": [], "many": []}, "changes": [*changes, {"name": "later", "change": "?", "needs": "x"}]}
    (tmp_path / "queue.yaml").write_text(json.dumps({"tiny": study}))
    (tmp_path / "runs").mkdir()
    for run, dev, train in (("both.few", 6.0, {5: 5.0, 6: 1.0}), ("both.many", 4.5, {5: 4.0}), ("one.many", 3.0, {})):
        record = {"dev_perplexity": dev, "train_perplexities": train}
        (tmp_path / "runs" / f"tiny.{run}.json").write_text(json.dumps(record))
    both, one = script.rows_of_study("tiny", tmp_path)
    assert (both["change"], one["change"]) == ("the both", "the one")
    assert (both["few"]["dev_perplexity"], one["many"]["dev_perplexity"]) == (6.0, 3.0)
    assert both["gain"] == {"few": 0.0, "many": pytest.approx(-0.25)}
    assert both["train_gain"]["many"] == {5: pytest.approx(-0.2)}
    assert (one["gain"], one["train_gain"]) == ({}, {})


def test_a_readme_without_its_marks_is_refused():
    text = script.with_table("a\n<!-- table: results/europarl.json -->\nold\n<!-- end of table -->\nz\n")
    assert text.startswith("a\n")
    assert text.endswith("<!-- end of table -->\nz\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="lacks the lines"):
        script.with_table("a\n<!-- table: results/europarl.json -->\nold\n")
