"""docs/tour.ipynb runs, cell by cell."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import load_script

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
script = load_script("scripts/run_notebook.py")


def read_notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text())


def test_the_notebook_has_its_outputs():
    """It was run after it was changed: something is shown for each cell that prints."""
    notebook = read_notebook()
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    for cell in code:
        assert {"execution_count", "metadata", "outputs", "source"} <= cell.keys()
        source = "".join(cell["source"])
        compile(source, "cell", "exec")
        assert ("print(" not in source) or cell["outputs"], source
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert all((NOTEBOOK.parent / target).is_file() for target in re.findall(r"\]\(([^)]+)\)", text))


def test_cells_share_variables_and_print_their_last_value():
    sources = ["x = 2", "print(x)\nx + 1", "None"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    cells.insert(1, {"cell_type": "markdown", "source": ["# title"]})
    printed = script.run_cells(cells)
    assert printed == ["", "2\n3\n", ""]
    shown = script.with_outputs({"nbformat": 4, "cells": cells}, printed)
    outputs = [cell.get("outputs") for cell in shown["cells"]]
    assert outputs == [[], None, [{"name": "stdout", "output_type": "stream", "text": ["2\n", "3\n"]}], []]
    with pytest.raises(ZeroDivisionError):
        script.run_cells([{"cell_type": "code", "source": ["1 / 0"]}])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "code"]
    assert [bool(text) for text in script.run_cells(code)] == [bool(cell["outputs"]) for cell in code]
