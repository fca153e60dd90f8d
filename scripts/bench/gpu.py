"""Speed on one GPU: training of whole models, and the mixture-of-experts layer alone. `make bench-gpu`, 8 minutes.

Every figure is beside the ceilings measured in the same run: a large bf16 matrix product, and a device copy.
Batches are random pieces in sentences of random lengths, made ahead on the host and copied as in training. An update
is the trainer's own. Tokens are source and target tokens. `idle` is the share of an update in which no kernel runs.

The bound of an MoE layer is the larger of two times, for R = 4 T rows, E experts, d = 512 and h = 2048:

    12 R d h / (matrix product),          two products forward and four backward
    2 (6 E d h + 6 R h + 6 R d) / (copy)

The second has bytes of bf16 numbers. Weights (2 E d h) are read twice, and their gradient is written. The forward pass
writes and reads hidden values (R h). The backward pass reads them, and writes their gradient and reads it twice. The
forward pass reads an input row (d) and writes an output row. The backward pass reads the input, reads the output's
gradient twice, and writes that of the input. What the gate needs is left out.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nmt.batch import Batch, Shape, covering, fit, make_batch, make_flat_batch
from nmt.compose import compose_config
from nmt.config import Config, MoEConfig, TrainingConfig
from nmt.cost.operations import model_cost
from nmt.data.batching import common_shape, plan_epoch
from nmt.device import set_float32_products
from nmt.model.experts import MoE
from nmt.model.init import init_parameters
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater

Step = list[Batch]
"""The micro-batches of an update."""

# Tokens per second of NVIDIA's PyTorch GNMT v2 code on one card, the better of fp16 and bf16, by sentences per batch.
GNMT_V2 = {"H100": {128: 199_500, 512: 415_200}, "H200": {128: 238_400, 512: 502_100}}
UPDATES = 12
D, H, K = 512, 2048, 4
"""Width, hidden size and active experts of the MoE layer."""


class Case(NamedTuple):
    """A network in training: settings for `compose_config`, and batches."""

    settings: list[str]
    sentences: int = 0
    """Sentences of 15 to 50 tokens in a batch, as in NVIDIA's benchmark; 0: batches as the trainer plans them."""
    spread: float = 0.5
    """Standard deviation of the logarithm of the lengths; 0: all are 28."""
    against: str = ""
    """The case whose speed this one is compared with."""


def _rows(experiment: str, *settings: str) -> list[str]:
    """Settings for updates of one batch of 32k tokens per side."""
    one = ("training.micro_batches=1", "training.batch_tokens=32768")
    return [f"experiment={experiment}", *one, *settings]


CASES = {
    "GNMT v2, batch 128": Case(["experiment=wmt14_en_de_gnmt_v2"], 128),
    "GNMT v2, batch 512": Case(["experiment=wmt14_en_de_gnmt_v2"], 512),
    "no MoE": Case(_rows("europarl_en_fr_dense")),
    "MoE-32, one length": Case(_rows("europarl_en_fr_moe_32"), spread=0.0),
    "MoE-32": Case(_rows("europarl_en_fr_moe_32"), against="MoE-32, one length"),
    "MoE-32, 4 micro-batches": Case(
        _rows("europarl_en_fr_moe_32", "training.micro_batches=4", "training.batch_tokens=8192"),
        against="MoE-32, one length",
    ),
    "MoE-512": Case(_rows("europarl_en_fr_moe_32", "model.moe.num_experts=512")),
    "MoE-2048": Case(_rows("wmt14_en_fr_moe_2048", "training.expert_weights=bfloat16")),
    "S17, parallel": Case(_rows("wmt14_en_de_s17", "model.attention.wiring=parallel")),
    "S17, feedback": Case(_rows("wmt14_en_de_s17"), against="S17, parallel"),
}


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time of `work` by device events, after warming up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured bf16 matrix products (TFLOP/s) and copy bandwidth (TB/s, read and write)."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / milliseconds(lambda: a @ b) / 1e9
    x = torch.empty(2**31, device=device, dtype=torch.uint8).random_()
    y = torch.empty_like(x)
    return {"matmul_tflops": product, "copy_tbs": 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e9}


# ------------------------------------------------------------------------------------------------- batches


def fixed_sentences(sentences: int, vocabulary: int, updates: int) -> tuple[list[Step], Shape]:
    """Updates of `sentences` pairs with lengths 15 to 50, BOS and EOS included, and a shape that holds them all."""
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(updates):
        sides = [
            [rng.integers(4, vocabulary, size=length - 1) for length in rng.integers(15, 51, size=sentences)]
            for _ in range(2)
        ]
        batches.append(make_batch(np.arange(sentences), *sides))
    return [[batch] for batch in batches], covering(*(batch.shape for batch in batches))


def planned(
    training: TrainingConfig, vocabulary: int, updates: int, spread: float = 0.5, middle: int = 28, longest: int = 119
) -> tuple[list[Step], Shape]:
    """Updates as the trainer plans them for log-normal lengths around `middle`, and the shape that it gives them."""
    rng = np.random.default_rng(1)
    pairs = 40 * updates * training.micro_batches * training.batch_tokens // middle
    sources = np.clip(middle * rng.lognormal(0.0, spread, pairs), 5, longest).astype(np.int64)
    targets = np.clip(sources * rng.lognormal(0.0, 0.3 * spread, pairs), 5, longest).astype(np.int64)
    plan = plan_epoch(sources, targets, training, 0)
    shape = common_shape(plan, sources, targets)

    def batch(own: np.ndarray) -> Batch:
        sides = [(rng.integers(4, vocabulary, lengths.sum()), lengths) for lengths in (sources[own], targets[own])]
        return make_flat_batch(own, *sides[0], *sides[1])

    return [[batch(pairs) for pairs in step] for step in plan[:updates]], shape


def prepare(case: Case, updates: int = UPDATES) -> tuple[Config, int, list[Step], Shape]:
    """(configuration, vocabulary, updates, their shape) of a case."""
    config = compose_config(case.settings)
    vocabulary = config.corpus.subwords.vocab_size
    if case.sentences:
        return config, vocabulary, *fixed_sentences(case.sentences, vocabulary, updates)
    return config, vocabulary, *planned(config.training, vocabulary, updates, case.spread)


def fitted(steps: list[Step], shape: Shape) -> list[Step]:
    """The same updates, each batch padded to `shape` and in page-locked memory, as the trainer has them."""
    return [[fit(batch, shape).pin_memory() for batch in step] for step in steps]


# ------------------------------------------------------------------------------------------------- training


def make_updater(config: Config, vocabulary: int, device: torch.device) -> Updater:
    """The trainer's updater for a new network."""
    torch.manual_seed(1)
    with device:  # billions of random weights take a CPU minutes
        model = Seq2Seq(config.model, vocabulary).train()
    return Updater(model, make_optimizer(model, config.training), config, World(device))


def free_memory() -> None:
    """Give back the memory of a network that is out of use; a recording and what it records refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def run_updates(updater: Updater, steps: list[Step]) -> float:
    """Seconds for all updates."""
    start = time.perf_counter()
    for step in steps:
        updater.update(step, 1, 1e-4)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def busy_milliseconds(work: Callable[[], object]) -> float:
    """Time during which at least one kernel or copy of `work` runs."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
    ranges = [each.time_range for each in profiler.events() if each.device_type == DeviceType.CUDA]
    busy = reached = 0.0
    for each in sorted(ranges, key=lambda each: each.start):
        busy += max(each.end - max(each.start, reached), 0.0)
        reached = max(reached, each.end)
    return busy / 1e3


def training_speed(case: Case, device: torch.device) -> dict[str, float]:
    """Speed of the updates, twice round after one round of warm-up."""
    config, vocabulary, steps, shape = prepare(case)
    cost = model_cost(config.model, vocabulary)
    batches = [batch for step in steps for batch in step]
    tokens = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    flops = sum(
        cost.training_flops(batch.num_source_tokens, batch.num_target_tokens, batch.num_sentences) for batch in batches
    )
    steps = fitted(steps, shape)
    updater = make_updater(config, vocabulary, device)
    run_updates(updater, steps)
    torch.cuda.reset_peak_memory_stats()
    seconds = min(run_updates(updater, steps) for _ in range(2))
    few = steps[: max(1, len(steps) // 3)]
    alone = run_updates(updater, few)
    busy = busy_milliseconds(lambda: run_updates(updater, few)) / 1e3
    return {
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "ms_per_update": seconds / len(steps) * 1e3,
        "idle": max(1.0 - busy / alone, 0.0),
        "padding": 1.0 - tokens / (len(batches) * (sum(shape.source) + sum(shape.target))),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """The work as one CUDA graph, so that launching it costs the host nothing, as in training."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def moe_layer(num_experts: int, tokens: int, top: dict[str, float], device: torch.device) -> dict[str, float]:
    """Forward and backward of one MoE layer in bf16, its bound, and a dense pair of equal FLOPs."""
    torch.manual_seed(1)
    moe = MoE(D, num_experts, MoEConfig(num_experts=num_experts, k=K, hidden_sizes=[H])).to(device).train()
    init_parameters(nn.ModuleList([moe]), nn.Linear(1, 1))
    moe.experts.to(torch.bfloat16)
    x_TD = torch.randn(tokens, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)

    def layer() -> None:
        moe.zero_grad(set_to_none=True)
        x_TD.grad = None
        y_TD, _ = moe(x_TD)
        y_TD.backward(grad_TD)

    rows = torch.randn(K * tokens, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    dense = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False))
    dense.to(device, torch.bfloat16)
    grad_rows = torch.randn_like(rows)

    def pair() -> None:
        dense.zero_grad(set_to_none=True)
        rows.grad = None
        dense(rows).backward(grad_rows)

    num_rows = K * tokens
    products = 12 * num_rows * D * H / top["matmul_tflops"] / 1e9
    traffic = 2 * (6 * num_experts * D * H + 6 * num_rows * (H + D)) / top["copy_tbs"] / 1e9
    return {
        "ms": milliseconds(recorded(layer)),
        "bound_ms": max(products, traffic),
        "dense_pair_ms": milliseconds(recorded(pair)),
    }


# ------------------------------------------------------------------------------------------------- tables


def comparison(name: str, results: dict[str, Any], device: str) -> str:
    """What a case is compared with, and the ratio of the speeds, on a device of this name."""
    case, speed = CASES[name], results[name]["tokens_per_second"]
    if case.against in results:
        return f"{speed / results[case.against]['tokens_per_second']:.2f} x {case.against}"
    card = next((card for card in GNMT_V2 if card in device), None)
    if case.sentences and card:
        return f"{speed / GNMT_V2[card][case.sentences]:.2f} x NVIDIA's code on an {card}"
    return ""


def main() -> None:
    """Print the tables; --json also writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases with this in their names")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    set_float32_products(device, "auto")
    top = ceilings(device)
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}")
    print(f"ceilings: bf16 matrix product {top['matmul_tflops']:.0f} TFLOP/s, copy {top['copy_tbs']:.2f} TB/s\n")
    results: dict[str, Any] = {"device": card, "torch": torch.__version__, "ceilings": top}

    print(f"{'training':<34}{'tokens/s':>12}{'TFLOP/s':>9}{'share':>7}{'ms':>8}{'idle':>7}{'GB':>7}", flush=True)
    for name, case in CASES.items():
        if options.only not in name:
            continue
        free_memory()
        try:
            figures = results[name] = training_speed(case, device)
        except torch.OutOfMemoryError:
            print(f"{name:<34}does not fit in the memory of this card", flush=True)
            continue
        share = figures["tflops"] / top["matmul_tflops"]
        print(
            f"{name:<34}{figures['tokens_per_second']:>12,.0f}{figures['tflops']:>9.0f}{share:>7.1%}"
            f"{figures['ms_per_update']:>8.1f}{figures['idle']:>7.1%}{figures['memory_gb']:>7.1f}"
            f"  {comparison(name, results, card)}",
            flush=True,
        )

    print(f"\n{'MoE layer, forward + backward':<34}{'ms':>8}{'bound':>8}{'ratio':>7}{'dense pair':>12}")
    for tokens in (8192, 32768):
        for num_experts in (8, 64, 512, 2048):
            name = f"MoE layer, E = {num_experts}, {tokens} tokens"
            if options.only not in name:
                continue
            free_memory()
            figures = results[name] = moe_layer(num_experts, tokens, top, device)
            print(
                f"{f'E = {num_experts}, {tokens} tokens':<34}{figures['ms']:>8.2f}{figures['bound_ms']:>8.2f}"
                f"{figures['ms'] / figures['bound_ms']:>7.2f}{figures['dense_pair_ms']:>12.2f}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
