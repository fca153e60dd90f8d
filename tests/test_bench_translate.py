"""The bench of searches on a CPU: every precision does the same work, and the table has a row for each."""

import json
from pathlib import Path

import pytest
import torch

from tests.scripts import load_script


@pytest.mark.slow
def test_each_work_has_a_row_and_all_outputs_the_same_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bench itself asserts the lengths of outputs."""
    bench = load_script("scripts/bench/translate.py")
    monkeypatch.setattr(bench, "PIECES", 3)
    threads = torch.get_num_threads()
    path = tmp_path / "figures.json"
    words = ["--sentences", "2", "--turns", "1", "--precisions", "fp32", "int8", "--beams", "1", "2", "--threads", "1"]
    try:
        assert bench.main([*words, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())
    assert [(row["precision"], row["beam"]) for row in rows] == [("fp32", 1), ("int8", 1), ("fp32", 2), ("int8", 2)]
    assert all(row["speed"] > 0 for row in rows)
    assert "sentences/s" in capsys.readouterr().out
