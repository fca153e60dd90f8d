"""Write docs/results/*, and the table in README.md, from results/*.json: python scripts/results/pages.py

A file of results has a `title`, sentences `about` it, and `tables`. Where and how the figures were found is in
`hardware`, `commit`, `decoding`, `command` (a list) and `scores` (sacreBLEU signatures), of the file or of one table.

A table has a `title`, sentences `about` it, `columns`, `rows`, sentences of `reading`, and perhaps a `picture`. A row
is an object of plain figures. A column has a `title`, and a `cell` that Python's str.format fills with the figures of
a row, such as "{dev_perplexity:.2f}"; a row that lacks a figure shows "-". With `best`, "lowest" or "highest", the
best figure of a column is bold.

A `chart` draws a bar for each row: `file` is its name, `text` its title, `label` fills the text beside a bar, `figure`
is the bar's length, and `cell` fills the text at its end.

A table with a `study` instead of rows has a row for each change of that study in results/queue.yaml that has been run.
The figures of a row are the `change`, and the record of each variant under the variant's name, as in
"{moe_4[dev_perplexity]:.2f}". `gain`, as in "{gain[moe_32]:+.1%}", is the ratio of a variant's perplexity to that of
the first, less 1. `train_gain`, as in "{train_gain[moe_32][550]:+.1%}", is the same for the training text at a step.
"""

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import yaml

from nmt.pages.markdown import wrapped
from nmt.pages.tables import markdown_table

ROOT = Path(__file__).parents[2]
PAGES = {
    "quality": ("Quality", ["europarl", "experts_gain", "multi30k", "demo", "alignments"]),
    "small-data": ("Small data", ["small_data"]),
    "studies": ("Studies", ["studies", "sentence_lengths", "start_scales"]),
    "speed": ("Speed", ["speed", "decoding", "large", "tried", "factored", "loading", "cpu_training"]),
    "scaling": ("Several GPUs", ["two_gpus", "step_time", "same_training", "processes"]),
}
"""Pages by file name: the title, and the files of results that it shows."""
IN_README = "europarl"
"""The file of results whose first table is in README.md."""
_MARKS = "<!-- table: {} -->\n", "<!-- end of table -->\n"

Result = dict[str, Any]
"""A file of results, or one of its tables, as JSON gives it."""


def read_result(name: str, folder: Path = ROOT / "results") -> Result:
    """The file of results `name`.json."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def page(name: str) -> str:
    """The whole text of docs/results/`name`.md."""
    title, files = PAGES[name]
    lines = [f"# {title}", "", "Made from `results/*.json` by `python scripts/results/pages.py`; change those instead."]
    for file in files:
        lines += ["", *section(read_result(file), file)]
    return "\n".join(lines) + "\n"


def section(result: Result, file: str) -> Iterator[str]:
    """The lines of one file of results."""
    yield f"## {result['title']}"
    yield from _paragraph(result.get("about", []))
    yield from _origin(result, file)
    for each in result["tables"]:
        yield ""
        yield f"### {each['title']}"
        yield from _paragraph(each.get("about", []))
        yield from _origin(each)
        yield ""
        yield from rows_as_markdown(each)
        yield from _paragraph(each.get("reading", []))
        for picture in (each[name] for name in ("chart", "picture") if name in each):
            yield ""
            yield f"![{picture['text']}]({picture['file']})"


def rows_of_study(name: str, folder: Path = ROOT / "results") -> Iterator[Result]:
    """A row for each change of the study of which there is a record."""
    study = yaml.safe_load((folder / "queue.yaml").read_text(encoding="utf-8"))[name]
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


def rows_of(of_table: Result) -> list[Result]:
    """The rows of a table, which are in it or are those of a study."""
    return list(rows_of_study(of_table["study"])) if "study" in of_table else of_table["rows"]


def rows_as_markdown(of_table: Result) -> Iterator[str]:
    """The lines of a table in Markdown."""
    columns = of_table["columns"]
    rows = rows_of(of_table)
    cells = [[_cell(column, row) for column in columns] for row in rows]
    for place, column in enumerate(columns):
        if "best" in column:
            key = re.findall(r"\{(\w+)", column["cell"])[0]
            figures = [row[key] for row in rows if key in row]
            best = min(figures) if column["best"] == "lowest" else max(figures)
            for row, line in zip(rows, cells, strict=True):
                if row.get(key) == best:
                    line[place] = f"**{line[place]}**"
    return markdown_table(tuple(column["title"] for column in columns), [tuple(line) for line in cells])


def _cell(column: Result, row: Result) -> str:
    try:
        return column["cell"].format(**row)
    except KeyError:
        return "-"


def _paragraph(sentences: list[str]) -> Iterator[str]:
    if sentences:
        yield ""
        yield wrapped(" ".join(sentences))


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
                if "chart" in each:
                    yield each["chart"]["file"], bars(each["chart"], rows_of(each))


def bars(chart: Result, rows: list[Result]) -> str:
    """An SVG of horizontal bars that begin at 0, on white so that it is seen in a dark page too."""
    left, wide, high = 8 + max(7 * len(chart["label"].format(**row)) for row in rows), 340, 26
    longest = max(row[chart["figure"]] for row in rows)
    width, height = left + wide + 90, 34 + high * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="#24292f">',
        f"<title>{escape(chart['text'])}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-weight="bold">{escape(chart["text"])}</text>',
    ]
    for place, row in enumerate(rows):
        top, length = 34 + high * place, wide * row[chart["figure"]] / longest
        label, value = (escape(chart[name].format(**row)) for name in ("label", "cell"))
        lines += [
            f'<text x="{left - 8}" y="{top + 16}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{top + 3}" width="{length:.1f}" height="{high - 8}" fill="#3b6ea8"/>',
            f'<text x="{left + length + 6:.1f}" y="{top + 16}">{value}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def with_table(text: str) -> str:
    """The text of README.md with its table as results/ has it now."""
    start, end = (mark.format(f"results/{IN_README}.json") for mark in _MARKS)
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md lacks the lines {start.strip()} and {end.strip()}")
    lines = "\n".join(rows_as_markdown(read_result(IN_README)["tables"][0]))
    return f"{before}{start}\n{lines}\n\n{end}{after}"


def main() -> None:
    """Write all of them."""
    folder = ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")
    for file, drawing in charts():
        (folder / file).write_text(drawing, encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
