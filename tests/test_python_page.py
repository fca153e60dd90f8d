"""docs/python.md, its notebook, and the README: their Python runs, on a toy run in place of the demo."""

import json
import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT, load_script

PAGE = ROOT / "docs" / "python.md"


def test_the_notebook_is_the_page() -> None:
    script = load_script("scripts/make_docs.py")
    assert script.NOTEBOOK.read_text() == script.notebook(PAGE.read_text()), "run python scripts/make_docs.py"
    cells = json.loads(script.NOTEBOOK.read_text())["cells"]
    assert "".join(cells[1]["source"]).startswith("import nmt")
    assert {each["cell_type"] for each in cells} == {"code", "markdown"}


def test_every_cell_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-en-de").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text())["cells"]
    code = ["".join(each["source"]) for each in cells if each["cell_type"] == "code"]
    assert len(code) >= 6
    for number, each in enumerate(code):
        exec(compile(each, f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "encoder.1: 4 experts" in out
    assert out.endswith("2 unknown option beam_sise; did you mean beam_size?\n")


def test_the_readme_has_code_that_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-en-de").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
