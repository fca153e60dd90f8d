"""results/*.json and the pages made from them: nothing is typed twice, and nothing is stale."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nmt.errors import UserError
from scripts.results.pictures import Series, bars, points
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "results"


script = load_script("scripts/results/pages.py")


@pytest.mark.parametrize("name", script.PAGES)
def test_a_page_is_what_its_results_give(name: str):
    assert (PAGES / f"{name}.md").read_text() == script.page(name), "run python -m scripts.results.pages"


def test_charts_are_what_their_results_give():
    drawn = dict(script.charts())
    assert drawn
    # scripts/results/profile_step.py draws the steps, and small_data_tables.py the growth.
    assert {path.name for path in PAGES.glob("*.svg")} - {"step.svg", "growth.svg"} == drawn.keys()
    for file, drawing in drawn.items():
        assert (PAGES / file).read_text() == drawing, "run python -m scripts.results.pages"


def test_bars_are_as_long_as_their_figures():
    chart = {"file": "a.svg", "text": "a < b", "label": "{run}", "figure": "score", "cell": "{score:.1f}"}
    tree = ElementTree.fromstring(bars(chart, [{"run": "one & two", "score": 2.0}, {"run": "x", "score": 0.5}]))
    space = "{http://www.w3.org/2000/svg}"
    _, long, short = (float(each.attrib["width"]) for each in tree.iter(f"{space}rect"))
    assert long == 4 * short
    assert [each.text for each in tree.iter(f"{space}text")] == ["a < b", "one & two", "2.0", "x", "0.5"]


SVG = "{http://www.w3.org/2000/svg}"


def places(drawing: str) -> list[tuple[float, float]]:
    """The points of the lines of a chart."""
    tree = ElementTree.fromstring(drawing)
    joined = [line.attrib["points"] for line in tree.iter(f"{SVG}polyline")]
    return [(float(x), float(y)) for line in joined for x, y in (point.split(",") for point in line.split())]


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_their_figures_are(log: bool):
    chart = {"text": "a < b", "x_title": "experts", "y_title": "perplexity", "log": log}
    series = [Series("one & two", [(4.0, 5.0), (16.0, 4.0), (64.0, 4.5)], ["x", "y", "z"])]
    drawing = points(chart, series)
    (x1, y1), (x2, y2), (x3, y3) = places(drawing)
    assert (x2 - x1) / (x3 - x1) == pytest.approx(0.5 if log else 0.2, abs=0.01)
    assert y1 < y3 < y2  # the smaller, the lower
    assert (y3 - y1) / (y2 - y1) == pytest.approx(0.5, abs=0.01)
    texts = [each.text for each in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert {"a < b", "experts", "perplexity", "one & two", "x", "y", "z"} <= {*texts}
    assert ("16" in texts) == log
    assert len(list(ElementTree.fromstring(drawing).iter(f"{SVG}circle"))) == 4  # and one for the key


@pytest.mark.parametrize("order", [1, -1])
def test_labels_of_near_points_are_in_the_order_of_the_points(order: int):
    near = [(2.0, 5.28, "lower"), (2.0, 5.31, "upper")][::order]
    each = Series("", [(1.0, 6.0), *(near[n][:2] for n in (0, 1)), (9.0, 5.0)], ["", near[0][2], near[1][2], ""])
    drawing = ElementTree.fromstring(points({"text": "", "x_title": "", "y_title": ""}, [each]))
    y = {text.text: float(text.attrib["y"]) for text in drawing.iter(f"{SVG}text") if text.text in ("lower", "upper")}
    assert y["upper"] < y["lower"]


def test_points_without_any_spread_are_drawn():
    (place,) = places(points({"text": "", "x_title": "", "y_title": ""}, [Series("only", [(3.0, 2.0)])]))
    assert place == (312.0, 187.0)


def test_zero_has_a_place_on_a_logarithmic_axis():
    chart = {"text": "", "x_title": "experts", "y_title": "", "log": True}
    drawing = points(chart, [Series("", [(0.0, 6.0), (4.0, 5.0), (32.0, 4.0), (512.0, 3.0)])])
    (none, _), (few, _), (more, _), (most, _) = places(drawing)
    assert none < few < more < most
    assert (more - few) / (most - few) == pytest.approx(3 / 7, abs=0.01)
    texts = [each.text for each in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert {"0", "4", "32", "512"} <= {*texts}


@pytest.mark.parametrize("zero", [[], [0.0]])
def test_ticks_of_many_values_are_few_powers_of_2(zero: list[float]):
    chart = {"text": "", "x_title": "", "y_title": "perplexity", "log": True}
    drawing = points(chart, [Series("", [(x, 2.0) for x in [*zero, *range(1, 1000, 100)]])])
    below = [each for each in ElementTree.fromstring(drawing).iter(f"{SVG}text") if each.get("text-anchor") == "middle"]
    ticks = [float(each.text) for each in below if each.text and each.text.isdigit()]
    assert 2 <= len(ticks) <= 8
    assert all(math.log2(tick).is_integer() for tick in ticks if tick)
    assert (0.0 in ticks) == bool(zero)


def test_labels_of_points_do_not_overlap():
    """Those of points at one place have four places around it; no more are drawn than find one."""
    chart = {"text": "", "x_title": "", "y_title": ""}
    series = [
        Series("", [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], ["left", f"number {place}", "right"]) for place in range(6)
    ]
    labels = [
        each for each in ElementTree.fromstring(points(chart, series)).iter(f"{SVG}text") if "fill" in each.attrib
    ]
    found = [each for each in labels if (each.text or "").startswith("number")]
    assert len(found) == 4
    assert len({(each.attrib["x"], each.attrib["y"]) for each in labels}) == len(labels)
    assert all(float(each.attrib["x"]) < 560 for each in labels)


def test_series_are_rows_or_curves():
    rows = [
        {"experts": 32, "ppl": 4.5, "seed": 1, "dev": {"10": 9.0, "20": 4.5}},
        {"experts": 4, "ppl": 5.0, "seed": 1, "dev": {"10": 9.5}},
        {"experts": 4, "ppl": 5.1, "seed": 2, "dev": {}},
    ]
    chart = {"x": "{experts}", "y": "{ppl}", "series": "seed {seed}", "label": "MoE-{experts}"}
    assert script.series_of(chart, rows) == [
        Series("seed 1", [(4.0, 5.0), (32.0, 4.5)], ["MoE-4", "MoE-32"]),
        Series("seed 2", [(4.0, 5.1)], ["MoE-4"]),
    ]
    curve = {"curve": "dev", "series": "{experts} experts"}
    assert script.series_of(curve, rows[:2])[0] == Series("32 experts", [(10.0, 9.0), (20.0, 4.5)])
    in_seconds = script.series_of({**curve, "x": "{step}"}, [{**rows[0], "step": 0.5}])
    assert in_seconds == [Series("32 experts", [(5.0, 9.0), (10.0, 4.5)])]


def test_variants_of_a_study_have_the_means_of_their_runs(tmp_path: Path):
    changes = [
        {"name": f"seed_{seed}", "change": f"seed {seed}", "variants": {"few": [], "many": []}} for seed in (1, 2)
    ]
    study = {"variants": {"none": [], "many": [], "few": []}, "changes": changes}
    (tmp_path / "queue.yaml").write_text(json.dumps({"claim": study}))
    (tmp_path / "runs").mkdir()
    for run, figure in (("seed_1.few", 6.0), ("seed_2.few", 8.0), ("seed_1.many", 4.0)):
        record = {"name": run, "ppl": figure, "scores": {"test": {"BLEU": 3 * figure}, "unit": "13a"}, run: 1}
        (tmp_path / "runs" / f"claim.{run}.json").write_text(json.dumps(record))
    many, few = script.rows_of_variants("claim", tmp_path)
    assert (many["variant"], many["runs"], many["ppl"], many["sd"]["ppl"]) == ("many", 1, 4.0, 0.0)
    assert (few["variant"], few["runs"], few["ppl"]) == ("few", 2, 7.0)
    assert few["scores"] == {"test": {"BLEU": 21.0}, "unit": "13a"}
    assert few["sd"]["scores"]["test"]["BLEU"] == pytest.approx(4.243, abs=1e-3)
    assert "seed_1.few" not in few  # not in both
    assert [(each["variant"], each["change"]) for each in script.runs_of_study("claim", tmp_path)] == [
        ("few", "seed 1"),
        ("many", "seed 1"),
        ("few", "seed 2"),
    ]


def test_records_have_their_experts_and_seconds(tmp_path: Path):
    """All sittings count, those that were only to score a run too."""
    study = {"variants": {"x": []}, "changes": [{"name": name, "change": "", "variants": {"x": []}} for name in "ab"]}
    (tmp_path / "queue.yaml").write_text(json.dumps({"claim": study}))
    (tmp_path / "runs").mkdir()
    for name, seconds in (("a", [60.0, 30.0, 10.0]), ("b", [140.0])):
        sittings = [{"commit": "c", "seconds": each} for each in seconds]
        record = {"steps": 50, "sittings": sittings, "config": {"model.moe.num_experts": 32}, "parameters": 2_500_000}
        (tmp_path / "runs" / f"claim.{name}.x.json").write_text(json.dumps(record))
    first, second = script.runs_of_study("claim", tmp_path)
    assert (first["experts"], first["seconds"], first["seconds_per_step"]) == (32, 100.0, 2.0)
    assert second["seconds_per_step"] == pytest.approx(2.8)
    assert second["millions"] == {"parameters": 2.5}
    (both,) = script.rows_of_variants("claim", tmp_path)
    assert (both["experts"], both["seconds"]) == (32, 120.0)
    (second,) = script.rows_of_variants("claim", tmp_path, changes=["b"])
    assert second["seconds"] == 140.0
    with pytest.raises(ValueError, match="no change c"):
        list(script.runs_of_study("claim", tmp_path, changes=["a", "c"]))


def test_a_section_may_have_samples_and_experts(monkeypatch: pytest.MonkeyPatch):
    texts = {"source": "A dog said so.", "reference": "Un chien."}
    systems = [{"run": "r", "chrF2": 50.0, "translation": "Un chat.", "layers": []}]
    sample = {"line": 7, **texts, "systems": systems}
    layer = {"layer": "encoder.1", "k": 2, "max_over_mean_load": 1.2, "revealed": 0.2, "revealed_by_chance": 0.1}
    files = {
        "claim": {
            "title": "All",
            "tables": [
                {"title": "Samples", "samples": "x/samples", "systems": {"r": "a system"}, "reading": ["Read them."]},
                {"title": "Experts", "experts": {"file": "e.svg", "text": "Loads", "record": "x/experts"}},
            ],
        },
        "x/samples": {"source": "a.gz", "rule": "All lines.", "samples": [sample]},
        "x/experts": {"layers": [{**layer, "loads": [0.5, 0.3, 0.2], "named": []}]},
    }
    monkeypatch.setattr(script, "read_result", files.__getitem__)
    monkeypatch.setattr(script, "PAGES", {"one": ("One", ["claim"])})
    lines = script.page("one").splitlines()
    assert lines.index("### Samples") < lines.index("#### Line 7") < lines.index("Read them.")
    assert any("Un chat" in line for line in lines)
    assert lines[-1] == "![Loads](e.svg)"
    ((file, drawing),) = script.charts()
    assert file == "e.svg"
    assert ElementTree.fromstring(drawing).tag == f"{SVG}svg"


def test_the_table_of_the_readme_is_what_its_results_give():
    readme = (ROOT / "README.md").read_text()
    assert readme == script.with_table(readme), "run python -m scripts.results.pages"


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
            if "columns" not in table:
                continue
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
    text = script.with_table("a\n<!-- table: results/claim.json -->\nold\n<!-- end of table -->\nz\n")
    assert text.startswith("a\n")
    assert text.endswith("<!-- end of table -->\nz\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="lacks the lines"):
        script.with_table("a\n<!-- table: results/claim.json -->\nold\n")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            {"rows": [{"a": 1}, {"a": 2}], "columns": [{"title": "B", "cell": "{b:.1f}"}]},
            "no row has the figure {b:.1f}",
        ),
        ({"study": "clam", "columns": []}, "there is no 'clam'"),
        ({"runs_of": "claim", "changes": ["seed_0"], "columns": []}, "the study claim has no change seed_0"),
        ({"compared": "claim/significance", "names": {"a over b": "a"}, "columns": []}, "there is no 'a over b'"),
        ({"compared": "claim/nothing", "names": {}, "columns": []}, "No such file"),
        ({"rows": [], "columns": [], "chart": {"file": "a.svg"}}, "chart: the key text is missing: add it"),
        ({"colums": [], "rows": []}, "unknown key colums; did you mean columns?"),
        ({"columns": [], "row": []}, "unknown key row; did you mean rows?"),
        ({"columns": []}, "it has columns but no rows: give it one of rows, study, "),
        ({"rows": [], "columns": [], "readings": ["x"]}, "unknown key readings; did you mean reading?"),
        ({"hardwear": "x"}, "unknown key hardwear; did you mean hardware?"),
        ({"zzz": 1}, "unknown key zzz; the keys are title, about, "),
        ({"picture": {"file": "a.png", "text": "x", "tezt": "y"}}, "picture: unknown key tezt; did you mean text?"),
        (
            {"rows": [{"a": 1}], "columns": [{"title": "A", "cell": "{a}", "best": "lowst"}]},
            "column A: best is lowst: it may be lowest or highest",
        ),
        ({"rows": [], "columns": [{"title": "A", "cel": "{a}"}]}, "column A: unknown key cel; did you mean cell?"),
        ({"scaling": "week", "columns": []}, "scaling is week: it may be weak or strong"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_table(table: dict[str, object], problem: str):
    result = {"title": "Claim", "tables": [{"title": "T", **table}]}
    with pytest.raises(UserError, match=r"results/claim\.json, T[:,] .*" + re.escape(problem)):
        list(script.section(result, "claim"))


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ({"title": "x", "tables": [], "comit": "y"}, "results/x.json: unknown key comit; did you mean commit?"),
        ({"tables": []}, "results/x.json: the key title is missing"),
        ({"title": "x"}, "results/x.json: the key tables is missing"),
        ({"title": "x", "tables": [{"titel": "y"}]}, "results/x.json, table 1: unknown key titel; did you mean title?"),
    ],
)
def test_a_wrong_key_of_a_file_is_an_error_that_names_it(result: dict[str, object], problem: str):
    with pytest.raises(UserError, match=re.escape(problem)):
        list(script.section(result, "x"))


def test_the_table_of_the_readme_is_checked(monkeypatch: pytest.MonkeyPatch):
    text = "<!-- table: results/claim.json -->\nold\n<!-- end of table -->\n"
    for table, problem in (({"colums": []}, "T: unknown key colums; "), ({"rows": []}, "T: there is no 'columns'")):
        result = {"title": "Claim", "tables": [{"title": "T", **table}]}
        monkeypatch.setattr(script, "read_result", {"claim": result}.__getitem__)
        with pytest.raises(UserError, match=re.escape(f"results/claim.json, {problem}")):
            script.with_table(text)


def test_a_file_of_results_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad", "gone"):
        with pytest.raises(UserError, match=rf"results/{name}\.json cannot be read \(.*\): correct"):
            script.read_result(name, tmp_path)


def test_no_page_is_written_if_one_has_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "good.json").write_text('{"title": "Good", "tables": []}')
    (tmp_path / "results" / "bad.json").write_text(
        '{"title": "Bad", "tables": [{"title": "T", "study": "x", "columns": []}]}'
    )
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PAGES", {"a": ("A", ["good"]), "b": ("B", ["bad"])})
    monkeypatch.setattr(script.read_result, "__defaults__", (tmp_path / "results",))
    with pytest.raises(SystemExit, match=re.escape("pages: results/bad.json, T: ")):
        script.main()
    (tmp_path / "results" / "bad.json").write_text('{"title": "Bad", "tables": [{"title": "T", "readin": []}]}')
    with pytest.raises(SystemExit, match=r"^pages: results/bad.json, T: unknown key readin; did you mean reading\?$"):
        script.main()
    assert not list(tmp_path.rglob("*.md"))


def test_rows_of_scaling_are_by_experts_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def speed(processes: int, experts: int, tokens: float, scaling: str = "weak") -> dict:
        what = {"kind": "speed", "scaling": scaling, "processes": processes}
        return {**what, "experts": experts, "tokens_per_second": tokens}

    records = [{"kind": "device", "name": "x"}, speed(1, 32, 10.0), speed(1, 0, 12.0), speed(2, 32, 18.0)]
    records += [speed(2, 32, 3.0, "strong")]
    (tmp_path / "two.json").write_text(json.dumps(records))
    (tmp_path / "big.json").write_text(json.dumps([speed(2, 2048, 5.0)]))
    names = {"0": "no experts", "32": "32 experts", "2048": "most"}
    table = {"scaling": "weak", "records": ["two", "big"], "names": names}
    none, some, most = script.rows_of_scaling(table, tmp_path)
    assert [row["model"] for row in (none, some, most)] == ["no experts", "32 experts", "most"]
    assert most["on"].keys() == {2}
    assert some["on"][1]["tokens_per_second"] == 10.0
    assert some["on"][2]["tokens_per_second"] == 18.0
    monkeypatch.setattr(script.rows_of_scaling, "__defaults__", (tmp_path,))
    columns = [{"title": name, "cell": f"{{on[{n}][tokens_per_second]:.0f}}"} for n, name in ((1, "one"), (2, "two"))]
    lines = list(script.rows_as_markdown({**table, "columns": columns}))
    assert lines[2:] == ["| 12 | - |", "| 10 | 18 |", "| - | 5 |"]
