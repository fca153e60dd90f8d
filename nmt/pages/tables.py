"""Tables in HTML and Markdown. Cells are markup already."""

import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"×?[\d.,-]+\S*( bits)?$")


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Columns that have a number in the first row are aligned to the right."""
    right = [bool(_NUMBER.match(cell)) for cell in rows[0]]
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        pairs = zip(cells, right, strict=True)
        lines.append("".join(f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>" for cell, number in pairs))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, with "|" in cells escaped."""
    for number, row in enumerate((head, *rows)):
        cells = [re.sub(r"(?<!\\)[|]", r"\\|", cell) for cell in row]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'---|' * len(head)}"
