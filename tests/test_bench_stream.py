"""scripts/bench/stream.py: its lines, its count of lines, and, slow, a file that it measures."""

from pathlib import Path

import pytest

from tests.scripts import load_script

bench = load_script("scripts/bench/stream.py")
WORDS = ["the", "dog", "runs"]


def test_the_lines_are_the_same_each_time_and_of_many_lengths() -> None:
    lines = list(bench.made_lines(20_000, WORDS))
    assert lines == list(bench.made_lines(20_000, WORDS))
    lengths = [len(line.split()) for line in lines]
    assert {*range(11), 400} == set(lengths)
    assert lengths.count(400) == 2


@pytest.mark.slow
def test_a_file_is_measured_and_missing_lines_are_told(run: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(f"{line}\n" for line in bench.made_lines(70, WORDS)))
    found = bench.translate(run, source, output, ["decoding.beam_size=1"])
    assert found.lines == bench.num_lines(output) == 70
    assert found.seconds > 0
    assert 50e6 < found.peak_bytes < 50e9
    with pytest.raises(RuntimeError, match="ended with status 2"):
        bench.translate(run, source, output, ["decoding.beam_size=0"])
