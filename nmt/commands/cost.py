"""nmt cost: estimate parameters, operations, memory and time of a configuration before training."""

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from nmt.commands import Parser, show
from nmt.config import Config
from nmt.cost.budget import Budget, SentenceLengths, expert_bytes, training_budget
from nmt.cost.cards import CARDS, GPUS_PER_HOST, NETWORK_GBS, card_called, link_of
from nmt.cost.speed import guess_cpu_tflops
from nmt.cost.step import SPENT_ON, Part, Prediction, bound_of, predict_step
from nmt.data.vocabulary import vocabulary_size
from nmt.errors import UserError
from nmt.metrics.record import TrainLine, read_lines
from nmt.run import RunDirectory
from nmt.wording import counted, duration, scaled

_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
_BYTES = ((1e9, "GB"), (1e6, "MB"))
_COUNTS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


class CostBasis(NamedTuple):
    """Inputs of the estimate besides the configuration."""

    name: str
    vocab_size: int
    lengths: SentenceLengths
    lengths_from: str
    on_gpu: bool
    tflops: float = 0.0
    """10^12 operations per second of each process, given, measured or guessed; 0: to be predicted."""
    tflops_from: str = ""
    measured_gb: float | None = None
    """Largest GPU memory that the run logged."""


def parser() -> Parser:
    """Options of `nmt cost`."""
    parser = Parser(
        "cost",
        "Estimate parameters, operations, memory per GPU, size on disk and time of training a configuration. Nothing\n"
        "is built, read or downloaded. For a RUN, the estimate uses its own measurements. Without any measurement,\n"
        "the time of a step on GPUs is predicted part by part, and the speed of a CPU is guessed. --config-dir,\n"
        "--multirun and --cfg job are as for nmt train.",
        "  nmt cost experiment=europarl_en_fr_moe_32\n"
        "  nmt cost experiment=wmt14_en_fr_moe_2048 --gpus 64 --card h200 --link 50 --price 3\n"
        "  nmt cost experiment=wmt14_en_de_moe_32 model.moe.num_experts=512 training.batch_tokens=16384\n"
        "  nmt cost runs/demo --json",
        takes_run=False,
    )
    parser.add_argument(
        "run",
        metavar="experiment=NAME | RUN",
        help="a configuration, in words as for nmt train; or the folder of a run, or its name in runs/",
    )
    parser.usage = (
        "nmt cost (experiment=NAME [key=value ...] | RUN) [--gpus N] [--card C] [--link GB] [--price P] [--tflops X]\n"
        "                [--device D] [--json]"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that train together (default: 1)")
    parser.add_argument(
        "--card",
        choices=tuple(CARDS),
        help="the kind of GPU (default: this machine's if it is one of these, else h100)",
    )
    parser.add_argument(
        "--link",
        type=float,
        metavar="GB",
        help="10^9 bytes per second that a GPU sends to the others while it receives as many (default: that of the "
        f"card's own links up to {GPUS_PER_HOST} GPUs; above that, {NETWORK_GBS:g} for an adapter of 400 Gb/s per GPU)",
    )
    parser.add_argument("--price", type=float, metavar="P", help="price of an hour of one GPU, in any currency")
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="10^12 operations per second that each GPU (or CPU process) reaches in training (default: the median that "
        "a RUN logged; on GPUs, a prediction; on a CPU, a guess)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="train on this (default: training.device; auto is cuda if this machine has a GPU, or with --gpus, --card, "
        "--link or --tflops)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON (bytes, seconds, FLOPs)")
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Print the cost of a run, with its own vocabulary, sentence lengths and speed."""
    info = run.corpus_info()
    lines = read_lines(run.metrics_path, TrainLine)
    on_gpu = _on_gpu(options, config, any(line.gpu_memory_gb is not None for line in lines) if lines else None)
    speeds = [line.tflops_per_process for line in lines if line.tflops > 0.0]
    memory = [line.gpu_memory_gb for line in lines if line.gpu_memory_gb is not None]
    if options.tflops or not speeds:
        tflops, tflops_from = _speed(options, on_gpu)
    else:
        tflops = statistics.median(speeds)
        tflops_from = f"the median of {counted(len(speeds), 'line')} of {run.metrics_path}"
    basis = CostBasis(
        name=str(run.path),
        vocab_size=info["vocabulary_size"],
        lengths=SentenceLengths.of_corpus(info),
        lengths_from="the run's corpus",
        on_gpu=on_gpu,
        tflops=tflops,
        tflops_from=tflops_from,
        measured_gb=max(memory, default=None),
    )
    _report(options, config, basis)


def estimate(options: argparse.Namespace, config: Config) -> None:
    """Print the cost of a configuration that may never have been trained."""
    on_gpu = _on_gpu(options, config)
    tflops, tflops_from = _speed(options, on_gpu)
    basis = CostBasis(
        name=config.run.name or "this configuration",
        vocab_size=vocabulary_size(config.corpus.subwords),
        lengths=SentenceLengths(),
        lengths_from="assumed",
        on_gpu=on_gpu,
        tflops=tflops,
        tflops_from=tflops_from,
    )
    _report(options, config, basis)


def _speed(options: argparse.Namespace, on_gpu: bool) -> tuple[float, str]:
    """Return (10^12 operations per second of each process, or 0 to predict them; their source) without a run."""
    if options.tflops is not None or on_gpu:
        return options.tflops or 0.0, ""
    guess = guess_cpu_tflops(max(_processes(options), 1))
    return guess, "a guess from matrix products, to a factor of 2; or give --tflops X"


def _processes(options: argparse.Namespace) -> int:
    return 1 if options.gpus is None else options.gpus


def _on_gpu(options: argparse.Namespace, config: Config, measured: bool | None = None) -> bool:
    """Return True to estimate for GPUs; `measured`: a run was trained on GPUs (None: unknown)."""
    device = options.device or config.training.device
    if device != "auto":
        return device == "cuda"
    if measured is not None:
        return measured
    # As nmt train would choose here, unless the options are about other machines.
    about_gpus = (options.gpus, options.tflops, options.card, options.link)
    return any(option is not None for option in about_gpus) or torch.cuda.is_available()


_ABOVE_ZERO = {
    "tflops": "10^12 operations per second of one GPU",
    "link": "10^9 bytes per second that a GPU sends",
    "price": "the price of an hour of one GPU",
}


def _check(options: argparse.Namespace, on_gpu: bool) -> None:
    """Raise UserError for a number that is not above 0, and for an option that would have no effect."""
    for name, meaning in _ABOVE_ZERO.items():
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be greater than 0: {meaning}")
    for name in ("card", "link"):
        if getattr(options, name) is not None and options.tflops is not None:
            raise UserError(
                f"--{name} predicts the speed that --tflops {options.tflops:g} gives: leave one of them out"
            )
    for name in ("card", "link", "price"):
        if getattr(options, name) is not None and not on_gpu:
            raise UserError(
                f"--{name} is about GPUs, but this is training on a CPU: leave it out, or add --device cuda"
            )
    if options.link is not None and _processes(options) == 1:
        raise UserError(f"--link {options.link:g} is between GPUs: add --gpus N with at least 2")


def _report(options: argparse.Namespace, config: Config, basis: CostBasis) -> None:
    _check(options, basis.on_gpu)
    budget = training_budget(config, basis.vocab_size, basis.lengths, _processes(options), basis.on_gpu)
    predicted = None
    if basis.on_gpu and options.tflops is None:
        predicted = _predict(options, config, basis, budget)
        if not basis.tflops:
            flops = budget.flops / config.training.max_steps / budget.gpus
            speed = flops / predicted.seconds / 1e12
            basis = basis._replace(tflops=speed, tflops_from="predicted")
    if options.json:
        show(json.dumps(_as_dict(budget, basis, predicted, options.price), indent=2))
    else:
        show("\n".join(_as_text(budget, basis, config, predicted, options.price)))


def _predict(options: argparse.Namespace, config: Config, basis: CostBasis, budget: Budget) -> Prediction:
    if options.card:
        card = CARDS[options.card]
    else:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        card = card_called(name) or CARDS["h100"]
    return predict_step(config, basis.vocab_size, budget, card, options.link or link_of(card, budget.gpus))


# --------------------------------------------------------------------------------------------------------- as JSON


def _as_dict(budget: Budget, basis: CostBasis, predicted: Prediction | None, price: float | None) -> dict[str, Any]:
    cost = budget.cost
    seconds = budget.seconds(basis.tflops)
    gpu_hours = seconds * budget.gpus / 3600 if basis.on_gpu else None
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
        "tflops_from": basis.tflops_from or "given",
        "seconds": seconds,
        "gpu_hours": gpu_hours,
        "price": None if gpu_hours is None or price is None else gpu_hours * price,
        "predicted_step": predicted and _step_as_dict(predicted),
        "assumed": {
            "source_tokens_per_sentence": basis.lengths.source,
            "target_tokens_per_sentence": basis.lengths.target,
            "unused": basis.lengths.unused,
            "activations_of": budget.longest._asdict(),
            "bytes_per_number": budget.numbers.size,
        },
    }


def _step_as_dict(predicted: Prediction) -> dict[str, Any]:
    return {
        "card": predicted.card.name,
        "link_gigabytes_per_second": predicted.link_gbs,
        "parts": {part.name: {"ms": part.ms, "bound": part.bound} for part in predicted.parts},
        "ms": predicted.seconds * 1e3,
        "bound": bound_of(predicted.parts),
        "tokens_per_second": predicted.tokens_per_second,
    }


# --------------------------------------------------------------------------------------------------------- as text


def _as_text(
    budget: Budget, basis: CostBasis, config: Config, predicted: Prediction | None, price: float | None
) -> Iterator[str]:
    yield f"{basis.name}, vocabulary of {basis.vocab_size:,}"
    yield ""
    yield from _counts(budget)
    yield ""
    yield from _memory(budget, basis, config, predicted)
    yield ""
    if predicted:
        yield from _step(budget, predicted)
        yield ""
    yield from _time(budget, basis, config, price)
    yield ""
    yield from _assumptions(budget, basis, config, predicted)


def _counts(budget: Budget) -> Iterator[str]:
    cost = budget.cost
    ops = cost.ops
    yield f"{'':<32}{'parameters':>14}{'share':>8}{'ops/timestep':>16}{'share':>8}"

    def column(count: int, whole: int, width: int) -> str:
        return f"{count / 1e6:>{width},.3f} M{count / whole:>8.1%}" if count else f"{'-':>{width + 2}}{'-':>8}"

    def line(name: str, parameters: int, operations: int) -> str:
        columns = column(parameters, cost.num_parameters, 12), column(operations, cost.ops_per_timestep, 14)
        return f"{name:<32}{''.join(columns)}"

    for part, parameters in cost.parameters.items():
        yield line(part if parameters else f"{part} (the embeddings' matrix)", parameters, ops.get(part, 0))
    yield line("all", cost.num_parameters, cost.ops_per_timestep)
    rest = cost.num_parameters - cost.num_vocabulary_parameters
    yield line("all but embeddings and softmax", rest, cost.ops_per_timestep - ops["softmax"])
    yield f"training, per target token: {scaled(budget.flops_per_target_token, _FLOPS)}"


def _memory(budget: Budget, basis: CostBasis, config: Config, predicted: Prediction | None) -> Iterator[str]:
    products = "bf16" if budget.numbers.size == 2 else "float32"
    factored = config.training.expert_optimizer == "factored" and config.model.moe_layer_names()
    in_bf16 = config.model.moe_layer_names() and expert_bytes(config, budget.numbers)[0] == 2
    types = "experts in bf16" if in_bf16 else "float32"
    names = {
        "weights": f"weights, {types}",
        "masters": "float32 weights of experts",
        "optimiser": "Adam (experts factored), float32" if factored else "Adam's two moments, float32",
        "gradients": f"gradients, {types}",
        "copies": f"copies of weights, {products}",
        "activations": f"activations, {products}",
        "working": "working space",
        "shared": "never used at the same time",
    }
    title = f"memory of each of {_devices(budget)}" if budget.gpus > 1 else f"memory of {_devices(budget)}"
    yield f"{title:<32}{'dense':>14}{'experts':>14}{'all':>14}"

    scale, unit = _BYTES[budget.memory_bytes < _BYTES[0][0]]

    def line(name: str, *counts: int) -> str:
        return f"{name:<32}" + "".join(f"{count / scale:>11,.2f} {unit}" if count else f"{'-':>14}" for count in counts)

    for row in budget.memory:
        if row.total:
            yield line(names[row.kind], row.dense, row.experts, row.total)
    dense = sum(row.dense for row in budget.memory)
    yield line("all", dense, budget.memory_bytes - dense, budget.memory_bytes)
    if basis.measured_gb is not None:
        yield f"{'maximum in this run':<60}{basis.measured_gb:>11,.2f} GB"
    if predicted and budget.memory_bytes > predicted.card.memory_gb * 1e9:
        yield f"does not fit: this is more than the {predicted.card.memory_gb:g} GB of an {predicted.card.name}"
    kept, size = config.training.keep_checkpoints + 1, budget.checkpoint_bytes
    yield f"checkpoint on disk: {scaled(size, _BYTES)}; up to {kept} are kept, {scaled(kept * size, _BYTES)}"


def _step(budget: Budget, predicted: Prediction) -> Iterator[str]:
    each = "on each of " if budget.gpus > 1 else "on "
    yield f"{f'a step, {each}{_devices(budget)}':<32}{'ms':>14}{'share':>8}  spent on"
    whole = predicted.seconds * 1e3
    for part in [*predicted.parts, Part("all", whole, bound_of(predicted.parts))]:
        most = "mostly " if part.name == "all" else ""
        yield f"{part.name:<32}{part.ms:>14,.2f}{part.ms / whole:>8.1%}  {most}{SPENT_ON[part.bound]}"
    speed = predicted.tokens_per_second
    per_gpu = f", {speed / budget.gpus:,.0f} per GPU" if budget.gpus > 1 else ""
    yield f"{speed:,.0f} source and target tokens per second{per_gpu}"


def _time(budget: Budget, basis: CostBasis, config: Config, price: float | None) -> Iterator[str]:
    training = config.training
    yield (
        f"{training.max_steps:,} steps of {training.micro_batches:,} x {training.batch_tokens:,} tokens per side: "
        f"{scaled(budget.target_tokens, _COUNTS)} target tokens, {scaled(budget.flops, _FLOPS)}"
    )
    seconds = budget.seconds(basis.tflops)
    each = " each" if budget.gpus > 1 else ""
    source = f" ({basis.tflops_from})" if basis.tflops_from else ""
    yield f"time: {duration(seconds)} on {_devices(budget)}, at {basis.tflops:,.4g} TFLOP/s{each}{source}"
    if basis.on_gpu:
        hours = seconds * budget.gpus / 3600
        yield f"price: {hours:,.4g} GPU-hours" + ("" if price is None else f", {hours * price:,.2f} at {price:g} each")
    limit = training.max_minutes * 60.0
    if limit and seconds > limit:
        yield f"stops after {duration(limit)} (training.max_minutes={training.max_minutes:g})"


def _assumptions(budget: Budget, basis: CostBasis, config: Config, predicted: Prediction | None) -> Iterator[str]:
    lengths, shape = basis.lengths, budget.longest
    text = (
        f"Sentences have {lengths.source:.1f} source and {lengths.target:.1f} target tokens with EOS "
        f"({basis.lengths_from}). A mean micro-batch has {1.0 - lengths.unused:.0%} of training.batch_tokens on its "
        "longer side. A multiply-add is two FLOPs, and the backward pass takes twice the forward pass. Validation and "
        "saving are not included. "
    )
    if predicted:
        card = predicted.card
        text += (
            f"The step is predicted for {card.name} cards, whose matrix products reach {card.tflops:g} TFLOP/s in bf16 "
            f"and whose memory {card.copy_tbs:g} TB/s ({card.source}). "
        )
        if budget.gpus > 1:
            text += f"Each GPU sends {predicted.link_gbs:g} GB/s. "
    if config.model.moe_layer_names() and config.training.micro_batches > budget.gpus:
        text += (
            "With several micro-batches per GPU, all layers below the last gate run forward twice, which FLOPs do not "
            "include: take X from such a run. "
        )
    text += (
        f"A GB is 10^9 bytes, an MB 10^6. Activations are those of {shape.sentences:,} sentences of {shape.source} "
        "tokens per side: a full micro-batch without padding, with equally busy experts. Memory of the driver is not "
        "included."
    )
    yield from textwrap.wrap(text, 100)


def _devices(budget: Budget) -> str:
    unit = "GPU" if budget.numbers.on_gpu else "CPU process"
    if budget.gpus == 1:
        return f"one {unit}"
    return f"{budget.gpus} {unit}{'es' if unit.endswith('s') else 's'}"
