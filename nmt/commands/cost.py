"""nmt cost: parameters, operations, memory and time of a configuration, before anything is spent on it."""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from nmt.commands import Parser
from nmt.config import Config
from nmt.errors import UserError
from nmt.evaluation.budget import Budget, Lengths, training_budget
from nmt.run import RunDirectory

_SCALES = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


class Basis(NamedTuple):
    """What the estimate rests on besides the configuration."""

    name: str
    vocab_size: int
    lengths: Lengths
    lengths_from: str
    on_gpu: bool
    tflops: float | None
    tflops_from: str
    measured_gb: float | None = None
    """The most GPU memory that a run reported."""


def parser() -> Parser:
    """Options of `nmt cost`."""
    parser = Parser(
        "cost",
        "Parameters, operations, memory of each GPU, size on disk and time of training a configuration. Nothing is\n"
        "built, read or downloaded; a RUN adds what it measured itself.",
        "  nmt cost experiment=europarl_en_fr_moe_32\n"
        "  nmt cost experiment=wmt14_en_fr_moe_2048 --gpus 8 --tflops 150\n"
        "  nmt cost experiment=wmt14_en_de_moe_32 model.moe.num_experts=512 training.batch_tokens=16384\n"
        "  nmt cost runs/demo --json",
    )
    parser.usage = "nmt cost (experiment=NAME [key=value ...] | RUN) [--gpus N] [--tflops X] [--device D] [--json]"
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that train together (default: 1)")
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="10^12 operations a second that each GPU reaches in training (default, for a RUN: the median it logged)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="train on this (default: training.device; auto counts as cuda)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON (bytes, seconds, FLOPs)")
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """The cost of a run: its own vocabulary, sentence lengths and speed."""
    info = run.corpus_info()
    pairs = max(info["pairs_kept"], 1)
    # Pieces are counted without EOS.
    lengths = Lengths(info["source_pieces"] / pairs + 1, info["target_pieces"] / pairs + 1)
    lines = list(_train_lines(run))
    speeds = [line["tflops"] for line in lines if line.get("tflops")]
    memory = [line["gpu_memory_gb"] for line in lines if "gpu_memory_gb" in line]
    _report(
        options,
        config,
        Basis(
            name=str(run.path),
            vocab_size=info["vocabulary_size"],
            lengths=lengths,
            lengths_from="the run's corpus",
            on_gpu=_on_gpu(options, config, bool(memory) or not lines),
            tflops=options.tflops or (statistics.median(speeds) if speeds else None),
            tflops_from="" if options.tflops else f"the median of {len(speeds)} lines of {run.metrics_path}",
            measured_gb=max(memory, default=None),
        ),
    )


def estimate(options: argparse.Namespace, config: Config) -> None:
    """The cost of a configuration that need not have been trained."""
    _report(
        options,
        config,
        Basis(
            name=config.run.name or "this configuration",
            vocab_size=config.corpus.subwords.vocab_size,
            lengths=Lengths(),
            lengths_from="assumed",
            on_gpu=_on_gpu(options, config, True),
            tflops=options.tflops,
            tflops_from="",
        ),
    )


def _on_gpu(options: argparse.Namespace, config: Config, otherwise: bool) -> bool:
    device = options.device or config.training.device
    return otherwise if device == "auto" else device == "cuda"


def _train_lines(run: RunDirectory) -> Iterator[dict[str, Any]]:
    if not run.metrics_path.is_file():
        return
    for text in run.metrics_path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a crash
        if isinstance(line, dict) and line.get("kind") == "train":
            yield line


def _report(options: argparse.Namespace, config: Config, basis: Basis) -> None:
    if options.tflops is not None and not 0 < options.tflops < math.inf:
        raise UserError(f"--tflops {options.tflops} must be greater than 0: 10^12 operations a second of one GPU")
    budget = training_budget(config, basis.vocab_size, basis.lengths, options.gpus, basis.on_gpu)
    if options.json:
        print(json.dumps(_as_dict(budget, basis), indent=2))
    else:
        print("\n".join(_as_text(budget, basis, config)))


# --------------------------------------------------------------------------------------------------------- as JSON


def _as_dict(budget: Budget, basis: Basis) -> dict[str, Any]:
    cost = budget.cost
    return {
        "name": basis.name,
        "vocabulary_size": basis.vocab_size,
        "parameters": {
            **cost.parameters,
            "all": cost.num_parameters,
            "without_embeddings_and_softmax": cost.num_parameters - cost.num_vocabulary_parameters,
        },
        "ops_per_timestep": {**cost.encoder_ops, **cost.decoder_ops, "all": cost.ops_per_timestep},
        "training_flops_per_target_token": budget.flops_per_target_token,
        "gpus": budget.gpus,
        "device": "cuda" if basis.on_gpu else "cpu",
        "memory_bytes_per_gpu": {
            **{row.kind: {"dense": row.dense, "experts": row.experts} for row in budget.memory},
            "all": budget.memory_bytes,
        },
        "measured_gpu_memory_gb": basis.measured_gb,
        "checkpoint_bytes": budget.checkpoint_bytes,
        "training_flops": budget.flops,
        "target_tokens": budget.target_tokens,
        "tflops_per_gpu": basis.tflops,
        "seconds": None if basis.tflops is None else budget.seconds(basis.tflops),
        "assumed": {
            "source_tokens_per_sentence": basis.lengths.source,
            "target_tokens_per_sentence": basis.lengths.target,
            "padding": basis.lengths.padding,
            "activations_of": budget.longest._asdict(),
            "bytes_per_number": budget.numbers.size,
        },
    }


# --------------------------------------------------------------------------------------------------------- as text


def _as_text(budget: Budget, basis: Basis, config: Config) -> Iterator[str]:
    yield f"{basis.name}, vocabulary of {basis.vocab_size:,}"
    yield ""
    yield from _counts(budget)
    yield ""
    yield from _memory(budget, basis, config)
    yield ""
    yield from _time(budget, basis, config)
    yield ""
    yield from _assumptions(budget, basis)


def _counts(budget: Budget) -> Iterator[str]:
    cost = budget.cost
    ops = cost.encoder_ops | cost.decoder_ops
    ops["attention"] = ops.pop("attention keys") + ops.pop("attention query")
    yield f"{'':<34}{'parameters':>14}{'share':>8}{'ops/timestep':>16}{'share':>8}"

    def line(name: str, parameters: int, operations: int | None) -> str:
        text = f"{name:<34}{parameters / 1e6:>12,.3f} M{parameters / cost.num_parameters:>8.1%}"
        if operations is not None:
            text += f"{operations / 1e6:>14,.3f} M{operations / cost.ops_per_timestep:>8.1%}"
        return text

    for part, parameters in cost.parameters.items():
        yield line(part, parameters, ops.get(part, 0))
    yield line("all", cost.num_parameters, cost.ops_per_timestep)
    yield line("all but embeddings and softmax", cost.num_parameters - cost.num_vocabulary_parameters, None)
    yield f"training, for each target token: {budget.flops_per_target_token / 1e6:,.0f} MFLOP"


def _memory(budget: Budget, basis: Basis, config: Config) -> Iterator[str]:
    unit = "GPU" if basis.on_gpu else "CPU process"
    names = {
        "weights": "weights, float32",
        "gradients": "gradients, float32",
        "optimiser": "Adam's two moments, float32",
        "copies": "copies of weights, bf16",
        "activations": f"activations, {'bf16' if budget.numbers.size == 2 else 'float32'}",
        "working space": "working space",
    }
    yield f"{f'memory of each of {budget.gpus} {unit}s' if budget.gpus > 1 else f'memory of one {unit}':<34}" + "".join(
        f"{column:>12}" for column in ("dense", "experts", "all")
    )
    for row in budget.memory:
        if row.total:
            yield f"{names[row.kind]:<34}" + "".join(
                f"{count / 1e9:>9,.2f} GB" for count in (row.dense, row.experts, row.total)
            )
    sums = [sum(row.dense for row in budget.memory), sum(row.experts for row in budget.memory), budget.memory_bytes]
    yield f"{'all':<34}" + "".join(f"{count / 1e9:>9,.2f} GB" for count in sums)
    if basis.measured_gb is not None:
        yield f"{'the most that the run had':<34}{'':>24}{basis.measured_gb:>9,.2f} GB"
    kept = config.training.keep_checkpoints + 1
    yield (
        f"checkpoint on disk: {budget.checkpoint_bytes / 1e9:,.2f} GB; the run keeps up to {kept}, "
        f"{kept * budget.checkpoint_bytes / 1e9:,.1f} GB"
    )


def _time(budget: Budget, basis: Basis, config: Config) -> Iterator[str]:
    training = config.training
    yield (
        f"{training.max_steps:,} updates of {training.micro_batches} x {training.batch_tokens:,} positions a side: "
        f"{budget.target_tokens / 1e6:,.0f} M target tokens, {_flops(budget.flops)}"
    )
    on = f"{budget.gpus} {'GPU' if basis.on_gpu else 'CPU process'}{'s' if budget.gpus > 1 else ''}"
    if basis.tflops is None:
        yield (
            f"time: {budget.flops / 3.6e15:,.4g} hours / X on {on} at X TFLOP/s each"
            if budget.gpus == 1
            else f"time: {budget.flops / 3.6e15 / budget.gpus:,.4g} hours / X on {on} at X TFLOP/s each"
        )
        yield "give --tflops X: make bench-gpu measures it, and nmt cost RUN takes it from a run"
        return
    source = f" ({basis.tflops_from})" if basis.tflops_from else ""
    yield f"time: {_duration(budget.seconds(basis.tflops))} on {on} at {basis.tflops:,.4g} TFLOP/s each{source}"


def _assumptions(budget: Budget, basis: Basis) -> Iterator[str]:
    lengths, shape = basis.lengths, budget.longest
    yield (
        f"sentences: {lengths.source:.1f} source and {lengths.target:.1f} target tokens with EOS ({basis.lengths_from}), "
        f"all alike; {lengths.padding:.0%} of a micro-batch's longer side is padding, which is no work"
    )


def _flops(count: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in _SCALES if count >= scale), _SCALES[-1])
    return f"{count / scale:,.4g} {unit}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
