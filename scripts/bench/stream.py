"""Memory and speed of `nmt translate` for files of many lines. Memory is flat if lines are never piled up.

    python scripts/bench/stream.py                                  # 100,000 and 1,000,000 lines
    python scripts/bench/stream.py --lines 20000 --model demo-en-de decoding.beam_size=4

The model has random weights and layers of 16 units, and writes ten subwords per line. So most of the time goes into
reading, encoding and writing lines. `--model` measures a trained one. Memory is what the process held at most.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from nmt.compose import compose_config
from nmt.run import RunDirectory
from scripts.bench.load import write_export

_TINY = (
    "experiment=demo",
    "model.hidden_size=16",
    "model.cell_size=16",
    "model.attention.size=16",
    "model.moe.num_experts=0",
    "decoding.beam_size=1",
    "decoding.max_length_ratio=0.01",
    # A model of random weights repeats itself in nearly every line.
    "decoding.retry=false",
    "decoding.batch_tokens=8192",
)
_LONG_EVERY = 10_000


class Figures(NamedTuple):
    """What a file took."""

    lines: int
    seconds: float
    peak_bytes: int


def made_lines(count: int, words: list[str]) -> Iterator[str]:
    """Yield lines of 0 to 10 words, and a few of 400; the same ones in each call."""
    generator = random.Random(1)
    for number in range(count):
        length = 400 if number % _LONG_EVERY == _LONG_EVERY - 1 else generator.randrange(11)
        yield " ".join(generator.choices(words, k=length))


def num_lines(path: Path) -> int:
    """Return the number of line ends in a file."""
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def translate(model: Path, source: Path, output: Path, settings: list[str]) -> Figures:
    """Translate a file with the command. RuntimeError if it fails, or if lines are missing."""
    command = [sys.executable, "-m", "nmt", "translate", str(model), str(source), "-o", str(output), *settings]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    if num_lines(source) != num_lines(output):
        raise RuntimeError(f"{num_lines(source):,} lines in, {num_lines(output):,} lines out")
    return Figures(num_lines(output), seconds, usage.ru_maxrss * 1024)


def main() -> None:
    """Measure and print one line per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 1_000_000], help="lines of the files")
    parser.add_argument(
        "--lender", type=Path, default=Path("runs/demo-en-de"), help="a run, for its vocabulary and text"
    )
    parser.add_argument("--model", help="a trained model (default: a tiny one of random weights)")
    options, settings = parser.parse_known_args()
    words = (options.lender / "text" / "test.source").read_text(encoding="utf-8").split()
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model) if options.model else folder / "tiny"
        if not options.model:
            write_export(model, RunDirectory(options.lender), compose_config([*_TINY]))
        for count in options.lines:
            source = folder / "source"
            with source.open("w", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in made_lines(count, words))
            found = translate(model, source, folder / "output", settings)
            speed = found.lines / found.seconds
            print(
                f"{found.lines:>10,} lines  {found.seconds:8.1f} s  {speed:8,.0f} lines/s  "
                f"{found.peak_bytes / 1e6:7,.0f} MB at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
