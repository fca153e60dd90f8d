"""What it takes to load a model on the CPU: seconds and memory of `nmt translate` for one short line.

    python scripts/bench/load.py                      # 195 million and 1 billion parameters
    python scripts/bench/load.py --against CHECKOUT   # each beside another version of this program, in turns

The models have random weights and the network of experiment=europarl_en_fr_moe_32, with as many experts as their size
needs. Memory is what the process held at most: of its own, and with the pages of files that it has mapped. A trained
run lends the vocabulary. Starting Python and PyTorch counts too; the small model shows how much that is.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nmt.checkpoint import EXPORT_FORMAT, EXPORTED_PARAMETERS, seal
from nmt.compose import compose_config, settings_text
from nmt.config import Config
from nmt.cost.operations import model_cost
from nmt.data.subwords import Subwords
from nmt.model.seq2seq import Seq2Seq
from nmt.parameters import write_parameters
from nmt.run import RunDirectory

_POLL_SECONDS = 0.01
_LINE = "Hello.\n"


def config_of(millions: int, vocab_size: int) -> Config:
    """The experiment's network with the fewest experts that give it this many million parameters."""
    config = compose_config(["experiment=europarl_en_fr_moe_32"])
    for num_experts in range(config.model.moe.k, 1 << 14):
        model = replace(config.model, moe=replace(config.model.moe, num_experts=num_experts))
        if model_cost(model, vocab_size).num_parameters >= millions * 10**6:
            return replace(config, model=model)
    raise ValueError(f"{millions} million parameters are out of reach")


def write_export(folder: Path, lender: RunDirectory, config: Config) -> int:
    """Write an exported model of random weights with the vocabulary of `lender`; return its number of parameters."""
    subwords = Subwords.load(lender.subwords_path)
    folder.mkdir()
    export = RunDirectory(folder)
    export.config_path.write_text(settings_text(config), encoding="utf-8")
    shutil.copyfile(lender.subwords_path, export.subwords_path)
    shutil.copyfile(lender.corpus_path, export.corpus_path)
    torch.manual_seed(1)
    write_parameters(Seq2Seq(config.model, subwords.size), folder / EXPORTED_PARAMETERS)
    seal(
        folder,
        {
            "format": EXPORT_FORMAT,
            "step": 1,
            "steps": [1],
            "score": None,
            "best_by": "perplexity",
            "vocabulary": subwords.fingerprint,
            "scores": [],
        },
    )
    return model_cost(config.model, subwords.size).num_parameters


def measure(checkout: Path, export: Path, precision: str) -> tuple[float, float, float]:
    """(seconds, GB of the process's own memory at most, GB with mapped files at most) of translating one line."""
    settings = ("decoding.device=cpu", f"decoding.precision={precision}", "decoding.beam_size=1")
    command = [sys.executable, "-m", "nmt", "translate", str(export), *settings]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(_LINE)
    process.stdin.close()
    own = whole = 0.0
    while process.poll() is None:
        now = memory_of(process.pid)
        own, whole = max(own, now[0]), max(whole, now[1])
        time.sleep(_POLL_SECONDS)
    seconds = time.perf_counter() - start
    assert process.stderr is not None
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} in {checkout}: {process.stderr.read()}")
    return seconds, own, whole


def memory_of(pid: int) -> tuple[float, float]:
    """(anonymous memory, all resident memory) of a process now, in 10^9 bytes; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    kilobytes = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss") or "VmRSS" in line
    }
    return kilobytes.get("RssAnon", 0) * 1024 / 1e9, kilobytes.get("VmRSS", 0) * 1024 / 1e9


def main() -> None:
    """Measure and print one line per model, precision and version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lender", type=Path, default=Path("runs/demo-en-de"), help="a trained run")
    parser.add_argument("--millions", type=int, nargs="+", default=[195, 1000], help="parameters of the models")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    checkouts = [Path(__file__).parents[2], *([options.against] if options.against else [])]
    with TemporaryDirectory() as folder:
        exports = {"the lender": options.lender.resolve()}
        for millions in options.millions:
            path = Path(folder) / str(millions)
            lender = RunDirectory(options.lender)
            config = config_of(millions, Subwords.load(lender.subwords_path).size)
            exports[f"{write_export(path, lender, config) / 1e6:,.0f}M"] = path
        for name, export in exports.items():
            for precision in ("fp32", "bf16"):
                rounds = [[measure(each, export, precision) for each in checkouts] for _ in range(options.repeats)]
                for place, checkout in enumerate(checkouts):
                    seconds, own, whole = (
                        statistics.median(part) for part in zip(*(r[place] for r in rounds), strict=True)
                    )
                    print(
                        f"{name:>12} {precision}  {seconds:6.2f} s  {own:6.2f} GB of its own  "
                        f"{whole:6.2f} GB with mapped files  {checkout}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
