"""Write docs/results/*, and the table in README.md, from results/*.json: python -m scripts.results.pages

A file of results has a `title`, sentences `about` it, and `tables`. Where and how the figures were found is in
`hardware`, `commit`, `decoding`, `command` (a list) and `scores` (sacreBLEU signatures), of the file or of one table.

A table has a `title`, sentences `about` it, `columns`, `rows`, sentences of `reading`, and perhaps a `picture`.
Sentences in lists are paragraphs. A row is an object of plain figures. A column has a `title`, and a `cell` that
Python's str.format fills with the figures of a row, such as "{dev_perplexity:.2f}"; a row that lacks a figure shows
"-". With `best`, "lowest" or "highest", the best figure of a column is bold.

A `chart` draws a bar for each row: `file` is its name, `text` its title, `label` fills the text beside a bar, `figure`
is the bar's length, and `cell` fills the text at its end.

A table may have `points`: `file`, `text`, `x_title`, `y_title` and perhaps `log` as `pictures.points` takes them. Its
rows are the points: `x` and `y` are figures such as "{ops_per_timestep}", `series` and `label` texts such as
"{variant}". With `curve`, such as "dev_perplexities", each row is a series: the mapping from x to y of that name. Its
numbers are then multiplied by `x`, if that is there: "{seconds_per_step}" makes seconds of steps.

A table with `samples` shows a file that scripts/results/samples.py wrote, and one with `experts` draws the picture of a
file of scripts/results/expert_picture.py. The heads of samples_page.py and expert_picture.py have what they take.

A table with a `study` instead of rows has a row for each change of that study in results/queue.yaml that has been run.
The figures of a row are the `change`, and the record of each variant under the variant's name, as in
"{moe_4[dev_perplexity]:.2f}". `gain`, as in "{gain[moe_32]:+.1%}", is the ratio of a variant's perplexity to that of
the first, less 1. `train_gain`, as in "{train_gain[moe_32][550]:+.1%}", is the same for the training text at a step.

A table with `variants_of` instead has a row for each variant of that study. Its figures are the means over the records
of its changes, such as seeds. `sd` has their standard deviations, as in "{sd[scores][test][BLEU]:.2f}", and `runs`
counts them. A table with `runs_of` has a row for each record, with its `variant` and `change`. Both kinds of rows have
the number of `experts`, the `seconds` of all sittings, with start and validation, and the `seconds_per_step` too.
`millions` has parameters and ops_per_timestep, as in "{millions[parameters]:.1f}M".

Of these three kinds, a table with `changes` has only the changes of these names, such as ["seed_1", "seed_2"].

A table with `compared`, such as "claim/significance", has a row for each comparison and set in that file of
scripts/results/significance.py. `names` maps what the file calls a pair to what readers call it, in order: it is the
figure `pair`. Other figures are those of the file, as in "{BLEU[difference]:+.2f}".

A table with `scaling`, "weak" or "strong", has a row for each number of `experts` in `records`, which are files of
scripts/bench/scaling.py. `names` maps these numbers to what readers call the model: it is the figure `model`. `on` has
the figures by number of processes, as in "{on[2][efficiency]:.2f}".
"""

import difflib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from nmt.errors import UserError
from nmt.pages.markdown import wrapped
from nmt.pages.tables import markdown_table
from scripts.results.expert_picture import loads
from scripts.results.pictures import Series, bars, points
from scripts.results.samples_page import samples_as_markdown

ROOT = Path(__file__).parents[2]
PAGES = {
    "quality": ("Quality", ["claim", "experts_gain", "europarl", "multi30k", "demo", "alignments"]),
    "small-data": ("Small data", ["small_data"]),
    "studies": ("Studies", ["studies", "sentence_lengths", "start_scales"]),
    "speed": ("Speed", ["speed", "decoding", "large", "tried", "factored", "loading", "cpu_training"]),
    "scaling": ("Several GPUs", ["two_gpus", "step_time", "same_training", "processes"]),
}
"""Pages by file name: the title, and the files of results that it shows."""
IN_README = "claim"
"""The file of results whose first table is in README.md."""
_ORIGIN = ("hardware", "commit", "decoding", "command", "scores")
_ROWS = ("rows", "study", "variants_of", "runs_of", "compared", "scaling")
"""The keys that give a table its rows."""
# small_data_tables.py makes the columns and rows of a table with `of`.
_IN_TABLE = ("title", "about", *_ORIGIN, "columns", *_ROWS, "changes", "names", "records", "reading", "of")
_IN_PARTS = {
    "picture": ("file", "text"),
    "chart": ("file", "text", "label", "figure", "cell"),
    "points": ("file", "text", "x_title", "y_title", "log", "x", "y", "series", "label", "curve"),
    "experts": ("file", "text", "record"),
}
"""The parts of a table that are objects, with their keys."""
_BEST = ("lowest", "highest")
_SCALING = ("weak", "strong")
_MARKS = "<!-- table: {} -->\n", "<!-- end of table -->\n"

Result = dict[str, Any]
"""A file of results, or one of its tables, as JSON gives it."""


def read_result(name: str, folder: Path = ROOT / "results") -> Result:
    """The file of results `name`.json. Raises UserError if it cannot be read."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"results/{name}.json cannot be read ({reason}): correct the file or its name") from error


def page(name: str) -> str:
    """The whole text of docs/results/`name`.md."""
    title, files = PAGES[name]
    lines = [f"# {title}", "", "Made from `results/*.json` by `python -m scripts.results.pages`; change those instead."]
    for file in files:
        lines += ["", *section(read_result(file), file)]
    return "\n".join(lines) + "\n"


def section(result: Result, file: str) -> Iterator[str]:
    """The lines of one file of results."""
    check(result, file)
    yield f"## {result['title']}"
    yield from _paragraph(result.get("about", []))
    yield from _origin(result, file)
    for each in result["tables"]:
        with _named(file, each):
            yield from _table(each)


def check(result: Result, file: str) -> None:
    """Raise UserError, which names the file and the table, for a key or a value of `best` that is not known."""
    _check_keys(result, ("title", "about", *_ORIGIN, "tables"), ("title", "tables"), f"results/{file}.json")
    for number, each in enumerate(result["tables"], 1):
        where = f"results/{file}.json, {each.get('title', f'table {number}')}"
        _check_keys(each, (*_IN_TABLE, *_IN_PARTS, "samples", "systems", "experts_of"), ("title",), where)
        if "columns" in each and not any(key in each for key in _ROWS):
            raise UserError(f"{where}: it has columns but no rows: give it one of {', '.join(_ROWS)}")
        if each.get("scaling", _SCALING[0]) not in _SCALING:
            raise UserError(f"{where}: scaling is {each['scaling']}: it may be {' or '.join(_SCALING)}")
        for part in _IN_PARTS.keys() & each.keys():
            _check_keys(each[part], _IN_PARTS[part], ("file", "text"), f"{where}, {part}")
        for column in each.get("columns", []):
            place = f"{where}, column {column.get('title')}"
            _check_keys(column, ("title", "cell", "best"), ("title", "cell"), place)
            if column.get("best", _BEST[0]) not in _BEST:
                raise UserError(f"{place}: best is {column['best']}: it may be {' or '.join(_BEST)}")


def _check_keys(given: Result, known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key}; {advice}")
    for key in needed:
        if key not in given:
            raise UserError(f"{where}: the key {key} is missing: add it")


def _table(each: Result) -> Iterator[str]:
    yield ""
    yield f"### {each['title']}"
    yield from _paragraph(each.get("about", []))
    yield from _origin(each)
    if "samples" in each:
        yield ""
        yield from samples_as_markdown(each, read_result(each["samples"]))
    if "columns" in each:
        yield ""
        yield from rows_as_markdown(each)
    yield from _paragraph(each.get("reading", []))
    for picture in (each[name] for name in ("chart", "points", "experts", "picture") if name in each):
        yield ""
        yield f"![{picture['text']}]({picture['file']})"


@contextmanager
def _named(file: str, of_table: Result) -> Iterator[None]:
    """Name the table in errors about names and figures that it gives, which are UserErrors."""
    try:
        yield
    except (KeyError, ValueError, OSError) as error:
        problem = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"results/{file}.json, {of_table.get('title', 'a table without title')}: {problem}") from error


def read_study(name: str, folder: Path, changes: Sequence[str]) -> Result:
    """A study of the queue, with only the changes of these names if there are any. ValueError for an unknown name."""
    study: Result = yaml.safe_load((folder / "queue.yaml").read_text(encoding="utf-8"))[name]
    if unknown := {*changes} - {change["name"] for change in study["changes"]}:
        raise ValueError(f"the study {name} has no change {min(unknown)}")
    return {**study, "changes": [each for each in study["changes"] if not changes or each["name"] in changes]}


def rows_of_study(name: str, folder: Path = ROOT / "results", changes: Sequence[str] = ()) -> Iterator[Result]:
    """A row for each change of the study of which there is a record."""
    study = read_study(name, folder, changes)
    for change in study["changes"]:
        paths = {each: folder / "runs" / f"{name}.{change['name']}.{each}.json" for each in change.get("variants", [])}
        records = {each: json.loads(path.read_text(encoding="utf-8")) for each, path in paths.items() if path.is_file()}
        if records:
            yield {"change": change["change"], **_gains(records, next(iter(study["variants"]))), **records}


def _gains(records: dict[str, Result], first: str) -> Result:
    """`gain` and `train_gain` of all variants over the first; empty if the first has not been run."""
    if first not in records:
        return {"gain": {}, "train_gain": {}}
    before = records[first]["train_perplexities"]
    gain = {each: record["dev_perplexity"] / records[first]["dev_perplexity"] - 1.0 for each, record in records.items()}
    train_gain = {
        each: {int(step): now / before[step] - 1.0 for step, now in of["train_perplexities"].items() if step in before}
        for each, of in records.items()
    }
    return {"gain": gain, "train_gain": train_gain}


def runs_of_study(name: str, folder: Path = ROOT / "results", changes: Sequence[str] = ()) -> Iterator[Result]:
    """The records of a study in its order, each with its `variant` and `change`."""
    study = read_study(name, folder, changes)
    for change in study["changes"]:
        for variant in change.get("variants", []):
            path = folder / "runs" / f"{name}.{change['name']}.{variant}.json"
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                yield {**record, **_derived(record), "variant": variant, "change": change["change"]}


def _derived(record: Result) -> Result:
    """Figures of a record that follow from others of it."""
    found: Result = {
        "millions": {key: record[key] / 1e6 for key in ("parameters", "ops_per_timestep") if key in record}
    }
    if "config" in record:
        found["experts"] = record["config"]["model.moe.num_experts"]
    if "sittings" in record:
        found["seconds"] = sum(each["seconds"] for each in record["sittings"])
        found["seconds_per_step"] = found["seconds"] / record["steps"]
    return found


def rows_of_variants(name: str, folder: Path = ROOT / "results", changes: Sequence[str] = ()) -> Iterator[Result]:
    """A row for each variant of a study with a record: means over its records, `sd` and `runs`."""
    found: dict[str, list[Result]] = {}
    for record in runs_of_study(name, folder, changes):
        found.setdefault(record["variant"], []).append(record)
    for variant in read_study(name, folder, changes)["variants"]:
        if records := found.get(variant):
            spread = _together(records, lambda values: statistics.stdev(values) if len(values) > 1 else 0.0)
            yield {**_together(records, statistics.fmean), "sd": spread, "variant": variant, "runs": len(records)}


def _together(records: Sequence[Result], function: Any) -> Result:
    """The function of each figure that all records have, in nested objects too; other values are those of the first."""
    merged: Result = {}
    for key, first in records[0].items():
        values = [record[key] for record in records if key in record]
        if len(values) < len(records):
            continue
        if isinstance(first, dict):
            merged[key] = _together(values, function)
        elif isinstance(first, int | float) and not isinstance(first, bool):
            merged[key] = function(values)
        else:
            merged[key] = first
    return merged


def rows_of_comparisons(of_table: Result, folder: Path = ROOT / "results") -> Iterator[Result]:
    """The comparisons that a table names, set by set."""
    pairs = read_result(of_table["compared"], folder)["pairs"]
    for pair, name in of_table["names"].items():
        yield from ({**found, "pair": name} for found in pairs[pair])


def rows_of_scaling(of_table: Result, folder: Path = ROOT / "results") -> Iterator[Result]:
    """The measurements by experts and processes, file by file."""
    for name in of_table["records"]:
        found: dict[int, dict[int, Result]] = {}
        for each in json.loads((folder / f"{name}.json").read_text(encoding="utf-8")):
            if each["kind"] == "speed" and each["scaling"] == of_table["scaling"]:
                found.setdefault(each["experts"], {})[each["processes"]] = each
        yield from ({"model": of_table["names"][str(experts)], "on": found[experts]} for experts in sorted(found))


def rows_of(of_table: Result) -> list[Result]:
    """The rows of a table, which are in it, or those of a study or of comparisons."""
    if "compared" in of_table:
        return list(rows_of_comparisons(of_table))
    if "scaling" in of_table:
        return list(rows_of_scaling(of_table))
    for name, rows in (("study", rows_of_study), ("variants_of", rows_of_variants), ("runs_of", runs_of_study)):
        if name in of_table:
            return list(rows(of_table[name], changes=of_table.get("changes", ())))
    return list(of_table["rows"])


def series_of(chart: Result, rows: Sequence[Result]) -> list[Series]:
    """The series of `points` that these rows make."""
    if "curve" in chart:
        curves = ((row, row[chart["curve"]], float(chart.get("x", "1").format(**row))) for row in rows)
        return [
            Series(chart["series"].format(**row), [(unit * float(x), float(y)) for x, y in curve.items()])
            for row, curve, unit in curves
        ]
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        x, y = (float(chart[axis].format(**row)) for axis in ("x", "y"))
        found.setdefault(chart["series"].format(**row), []).append((x, y, chart.get("label", "").format(**row)))
    return [
        Series(name, [(x, y) for x, y, _ in sorted(each)], [label for *_, label in sorted(each)])
        for name, each in found.items()
    ]


def rows_as_markdown(of_table: Result) -> Iterator[str]:
    """The lines of a table in Markdown."""
    columns = of_table["columns"]
    rows = rows_of(of_table)
    cells = [[_cell(column, row) for column in columns] for row in rows]
    for place, column in enumerate(columns):
        if rows and all(line[place] == "-" for line in cells):
            raise ValueError(f"no row has the figure {column['cell']} of the column {column['title']}")
        if "best" in column:
            figures = [_figure(column["cell"], row) for row in rows]
            known = [figure for figure in figures if figure is not None]
            best = min(known) if column["best"] == "lowest" else max(known)
            for figure, line in zip(figures, cells, strict=True):
                if figure == best:
                    line[place] = f"**{line[place]}**"
    return markdown_table(tuple(column["title"] for column in columns), [tuple(line) for line in cells])


def _figure(cell: str, row: Result) -> float | None:
    """The first figure of a row that this cell shows; None if the row lacks it."""
    field = next(field for _, field, _, _ in Formatter().parse(cell) if field)
    try:
        return float(Formatter().get_field(field, (), row)[0])
    except KeyError:
        return None


def _cell(column: Result, row: Result) -> str:
    try:
        return column["cell"].format(**row)
    except KeyError:
        return "-"


def _paragraph(sentences: list[str] | list[list[str]]) -> Iterator[str]:
    """A paragraph, or several if the sentences are in lists."""
    for each in sentences if sentences and isinstance(sentences[0], list) else [sentences]:
        if each:
            yield ""
            yield wrapped(" ".join(each))


def _origin(result: Result, file: str = "") -> Iterator[str]:
    """Where the figures come from, as a list."""
    items = [f"{name}: {result[name]}" for name in ("hardware", "commit", "decoding") if name in result]
    items += [f"command: `{command}`" for command in result.get("command", [])]
    items += [f"{name}: `{signature}`" for name, signature in result.get("scores", {}).items()]
    items += [f"data: [results/{file}.json](../../results/{file}.json)"] if file else []
    if items:
        yield ""
        yield from (wrapped(f"- {item}") for item in items)


def charts() -> Iterator[tuple[str, str]]:
    """(file name, SVG) of all charts."""
    for _, files in PAGES.values():
        for file in files:
            for each in read_result(file)["tables"]:
                with _named(file, each):
                    yield from _charts_of(each)


def _charts_of(each: Result) -> Iterator[tuple[str, str]]:
    if "chart" in each:
        yield each["chart"]["file"], bars(each["chart"], rows_of(each))
    if "points" in each:
        yield each["points"]["file"], points(each["points"], series_of(each["points"], rows_of(each)))
    if "experts" in each:
        yield each["experts"]["file"], loads(each["experts"], read_result(each["experts"]["record"]))


def with_table(text: str) -> str:
    """The text of README.md with its table as results/ has it now."""
    start, end = (mark.format(f"results/{IN_README}.json") for mark in _MARKS)
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"README.md lacks the lines {start.strip()} and {end.strip()}")
    result = read_result(IN_README)
    check(result, IN_README)
    first = result["tables"][0]
    with _named(IN_README, first):
        lines = "\n".join(rows_as_markdown(first))
    return f"{before}{start}\n{lines}\n\n{end}{after}"


def main() -> None:
    """Write all of them, or none if there is an error in one."""
    folder, readme = ROOT / "docs" / "results", ROOT / "README.md"
    try:
        texts = {folder / f"{name}.md": page(name) for name in PAGES}
        texts |= {folder / file: drawing for file, drawing in charts()}
        texts[readme] = with_table(readme.read_text(encoding="utf-8"))
    except UserError as error:
        sys.exit(f"pages: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
