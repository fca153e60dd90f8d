"""docs/python.md and the README: their Python runs, on a toy run in place of the demo."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import ROOT, own_text


def python_of(page: Path) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures(own_text.__name__)
def test_every_example_runs(run: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in (("demo-en-de", run), ("many", many)):
        (tmp_path / "runs" / name).symlink_to(path)
    names: dict[str, Any] = {}
    code = python_of(ROOT / "docs" / "python.md")
    assert len(code) >= 6
    for number, each in enumerate(code):
        exec(compile(each, f"example {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "encoder.1: 4 experts" in out
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step-00000020").is_dir()
    assert names["config"].to_dict()["training"]["max_minutes"] == 30
    assert out.endswith("2 unknown option beam_sise; did you mean beam_size?\n")


def test_the_readme_has_code_that_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-en-de").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    (code,) = python_of(ROOT / "README.md")
    exec(compile(code, "README.md", "exec"), {})
