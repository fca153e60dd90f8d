"""Run the cells of a notebook in order, in the working directory, and keep what they print in it.

  python scripts/run_notebook.py docs/tour.ipynb

It needs no Jupyter: cells are plain Python, and outputs are text.
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
"""A cell of a notebook, as JSON gives it."""


def run_cells(cells: list[Cell]) -> list[str]:
    """Run the code cells, with the same variables, and return what each prints.

    As in a notebook, a cell that ends with an expression also prints its value. Errors of a cell are its own.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    return [_run("".join(cell["source"]), variables) for cell in cells if cell["cell_type"] == "code"]


def _run(source: str, variables: dict[str, Any]) -> str:
    tree = ast.parse(source)
    shown: ast.expr | None = None
    if tree.body and isinstance(last := tree.body[-1], ast.Expr):
        shown = last.value
        tree.body.pop()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), variables)
        if shown is not None:
            value = eval(compile(ast.Expression(shown), "cell", "eval"), variables)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


def with_outputs(notebook: dict[str, Any], printed: list[str]) -> dict[str, Any]:
    """The notebook with these outputs of its code cells."""
    texts = iter(printed)
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            text = next(texts)
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell = {**cell, "execution_count": None, "outputs": [stream] if text else []}
        cells.append(cell)
    return {**notebook, "cells": cells}


def main() -> None:
    """The command line above."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    result = with_outputs(notebook, run_cells(notebook["cells"]))
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
