"""What it takes to load a model on the CPU: seconds and memory of `nmt translate` for one short line.

    python scripts/bench/load.py                            # 195 million and 1 billion parameters
    python scripts/bench/load.py --millions 8663 --bf16     # 2,048 experts: a file of 17 GB
    python scripts/bench/load.py --against CHECKOUT         # each beside another version of this program, in turns

The models have random weights and the network of experiment=europarl_en_fr_moe_32, with as many experts as their size
needs. Memory is what the process held at most: of its own, and with the pages of files that it has mapped. The last
column is how much of the file was in the process's memory at most. A trained run lends the vocabulary. Starting Python
and PyTorch counts too; the small model shows how much that is. The file was just written, so it is in the file cache.
"""

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from nmt.checkpoint import BF16_FORMAT, EXPORT_FORMAT, EXPORTED_PARAMETERS, seal
from nmt.compose import compose_config, settings_text
from nmt.config import Config
from nmt.cost.operations import model_cost
from nmt.data.subwords import Subwords
from nmt.model.assemble import skeleton
from nmt.model.names import is_expert
from nmt.model.working import precise_names
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


def write_random(config: Config, vocab_size: int, bf16: bool, path: Path) -> dict[str, int]:
    """Write a network of random weights expert by expert, and return the number of experts in each of its parameters.

    Each eighth expert has the same weights: drawing billions of numbers would take minutes.
    """
    network = skeleton(config.model, vocab_size)
    precise = precise_names(network)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in network.named_parameters():
        half = bf16 and name not in precise
        size = parameter.numel() * (2 if half else 4)
        shape, offsets = list(parameter.shape), [end, end + size]
        header[name] = {"dtype": "BF16" if half else "F32", "shape": shape, "data_offsets": offsets}
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, parameter in network.named_parameters():
            dtype = torch.bfloat16 if header[name]["dtype"] == "BF16" else torch.float32
            shape = parameter.shape[1:] if is_expert(name) else parameter.shape
            std = (shape[0] if len(shape) > 1 else 1) ** -0.5
            drawn = [bytes_of((std * torch.randn(shape)).to(dtype)) for _ in range(8 if is_expert(name) else 1)]
            for number in range(len(parameter) if is_expert(name) else 1):
                file.write(drawn[number % len(drawn)])
    return {name: len(parameter) for name, parameter in network.named_parameters() if is_expert(name)}


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor as a file has them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_export(folder: Path, lender: RunDirectory, config: Config, bf16: bool = False) -> int:
    """Write an exported model of random weights with the vocabulary of `lender`; return its number of parameters."""
    subwords = Subwords.load(lender.subwords_path)
    folder.mkdir()
    export = RunDirectory(folder)
    export.config_path.write_text(settings_text(config), encoding="utf-8")
    shutil.copyfile(lender.subwords_path, export.subwords_path)
    shutil.copyfile(lender.corpus_path, export.corpus_path)
    torch.manual_seed(1)
    experts = write_random(config, subwords.size, bf16, folder / EXPORTED_PARAMETERS)
    facts = {
        "format": BF16_FORMAT if bf16 else EXPORT_FORMAT,
        "step": 1,
        "steps": [1],
        "score": None,
        "best_by": "perplexity",
        "vocabulary": subwords.fingerprint,
        "scores": [],
    }
    seal(folder, facts, experts)
    return model_cost(config.model, subwords.size).num_parameters


class Measured(NamedTuple):
    """What translating one line took at most: seconds, and memory in 10^9 bytes."""

    seconds: float
    first_word: float
    """Seconds until the translation was there."""
    own: float
    whole: float
    """With mapped files."""
    mapped: float
    """The pages of the parameters' file alone."""


def measure(checkout: Path, export: Path, precision: str) -> Measured:
    """Translate one line with an export, greedily."""
    settings = ("decoding.device=cpu", f"decoding.precision={precision}", "decoding.beam_size=1")
    command = [sys.executable, "-m", "nmt", "translate", str(export), *settings]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(_LINE)
    process.stdin.close()
    most, first = (0.0, 0.0, 0.0), 0.0
    while process.poll() is None:
        most = tuple(map(max, most, memory_of(process.pid)))
        if not first and select.select([process.stdout], [], [], 0)[0]:
            first = time.perf_counter() - start
        time.sleep(_POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} in {checkout}: {process.stderr.read()}")
    return Measured(seconds, first or seconds, *most)


def memory_of(pid: int) -> tuple[float, float, float]:
    """(anonymous, all, the parameters' file) resident memory of a process in 10^9 bytes; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        places = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0, 0.0
    kilobytes = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss") or "VmRSS" in line
    }
    mapped = 0
    inside = False
    for line in places:
        if line[0] in "0123456789abcdef":  # the first line of a mapping; the others begin with a capital letter
            inside = line.endswith(EXPORTED_PARAMETERS)
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    return (*(kilobytes.get(name, 0) * 1024 / 1e9 for name in ("RssAnon", "VmRSS")), mapped * 1024 / 1e9)


def main() -> None:
    """Measure and print one line per model, precision and version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lender", type=Path, default=Path("runs/demo-en-de"), help="a trained run")
    parser.add_argument("--millions", type=int, nargs="+", default=[195, 1000], help="parameters of the models")
    parser.add_argument("--bf16", action="store_true", help="write the models in bf16")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="decoding.precision")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are written for the time being")
    options = parser.parse_args()
    checkouts = [Path(__file__).parents[2], *([options.against] if options.against else [])]
    with TemporaryDirectory(dir=options.folder) as folder:
        exports = {"the lender": options.lender.resolve()}
        for millions in options.millions:
            path = Path(folder) / str(millions)
            lender = RunDirectory(options.lender)
            config = config_of(millions, Subwords.load(lender.subwords_path).size)
            number = write_export(path, lender, config, options.bf16)
            exports[f"{number / 1e6:,.0f}M"] = path
        for name, export in exports.items():
            for precision in options.precision:
                rounds = [[measure(each, export, precision) for each in checkouts] for _ in range(options.repeats)]
                for place, checkout in enumerate(checkouts):
                    parts = zip(*(each[place] for each in rounds), strict=True)
                    found = Measured(*map(statistics.median, parts))
                    file = export / EXPORTED_PARAMETERS
                    share = f"{found.mapped * 1e9 / file.stat().st_size:6.1%} of the file" if file.exists() else ""
                    print(
                        f"{name:>12} {precision}  {found.seconds:6.2f} s, first line {found.first_word:6.2f} s  "
                        f"{found.own:6.2f} GB of its own  {found.whole:6.2f} GB with mapped files  {share}  {checkout}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
