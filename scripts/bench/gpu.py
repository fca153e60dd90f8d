"""Speed on one GPU: training throughput of whole models, and the mixture-of-experts layer alone. `make bench-gpu`.

Every figure is beside the ceilings measured in the same run: a large bf16 matrix product, and a device copy.
Batches are random pieces of random lengths, made ahead on the host and copied as in training; an update is the
trainer's own. Tokens are real (not padding) source and target tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nmt.batch import Batch, make_batch
from nmt.compose import compose_config
from nmt.config import Config, MoEConfig
from nmt.cost.operations import model_cost
from nmt.device import set_float32_products
from nmt.model.experts import MoE
from nmt.model.init import init_parameters
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater

# What others reached on one NVIDIA H200: NVIDIA's PyTorch GNMT v2 code, the better of fp16 and bf16.
GNMT_V2_BASELINE = {128: 238_400, 512: 502_100}


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


def fixed_sentences(sentences: int, vocabulary: int, count: int) -> list[Batch]:
    """Batches of `sentences` pairs with lengths 15 to 50, BOS and EOS included: NVIDIA's benchmark."""
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(count):
        sides = [
            [rng.integers(4, vocabulary, size=length - 1) for length in rng.integers(15, 51, size=sentences)]
            for _ in range(2)
        ]
        batches.append(make_batch(np.arange(sentences), *sides))
    return batches


def token_budget(tokens: int, vocabulary: int, count: int) -> list[Batch]:
    """Batches of about `tokens` tokens per side, sentences of like lengths (log-normal around 28) together."""
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(count):
        length = int(np.clip(rng.lognormal(3.33, 0.5), 6, 120))
        sentences = tokens // length
        sides = [
            [rng.integers(4, vocabulary, size=max(length - 1 - each, 1)) for each in rng.integers(0, 3, sentences)]
            for _ in range(2)
        ]
        batches.append(make_batch(np.arange(sentences), *sides))
    return batches


def training_speed(config: Config, vocabulary: int, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Updates over the batches, twice round after one round of warm-up."""
    torch.manual_seed(1)
    model = Seq2Seq(config.model, vocabulary).to(device).train()
    updater = Updater(model, make_optimizer(model, config.training), config, World(device))
    cost = model_cost(config.model, vocabulary)
    batches = [batch.pin_memory() for batch in batches]

    def round_trip() -> None:
        for batch in batches:
            updater.update([batch], 1, 1e-4)
        torch.cuda.synchronize()

    round_trip()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    round_trip()
    round_trip()
    seconds = (time.perf_counter() - start) / 2
    tokens = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    flops = sum(
        cost.training_flops(batch.num_source_tokens, batch.num_target_tokens, batch.num_sentences) for batch in batches
    )
    return {
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "ms_per_update": seconds / len(batches) * 1e3,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def moe_layer(num_experts: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Forward and backward of one MoE layer in bf16 (d 512, hidden 2048, k 4), beside a dense pair of equal FLOPs."""
    torch.manual_seed(1)
    moe = MoE(512, num_experts, MoEConfig(num_experts=num_experts, k=4, hidden_sizes=[2048])).to(device).train()
    holder = nn.Linear(1, 1)
    init_parameters(nn.ModuleList([moe]), holder)
    moe.experts.to(torch.bfloat16)
    x_TD = torch.randn(tokens, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)

    def layer() -> None:
        moe.zero_grad(set_to_none=True)
        y_TD, _ = moe(x_TD)
        y_TD.backward(grad_TD)

    rows = torch.randn(4 * tokens, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    dense = nn.Sequential(nn.Linear(512, 2048, bias=False), nn.ReLU(), nn.Linear(2048, 512, bias=False))
    dense.to(device, torch.bfloat16)
    grad_rows = torch.randn_like(rows)

    def pair() -> None:
        dense.zero_grad(set_to_none=True)
        dense(rows).backward(grad_rows)

    return {"ms": milliseconds(layer), "dense_pair_ms": milliseconds(pair)}


def main() -> None:
    """Print the tables; --json also writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    set_float32_products(device, "auto")
    top = ceilings(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"ceilings: bf16 matrix product {top['matmul_tflops']:.0f} TFLOP/s, copy {top['copy_tbs']:.2f} TB/s\n")
    results: dict[str, dict[str, float]] = {"ceilings": top}

    print(f"{'training':<34}{'tokens/s':>12}{'TFLOP/s':>9}{'share':>7}{'ms':>8}{'GB':>7}")
    gnmt = compose_config(["experiment=wmt14_en_de_gnmt_v2"])
    runs = [(f"GNMT v2, batch {n}", gnmt, 32000, fixed_sentences(n, 32000, 12)) for n in (128, 512)]
    euro = token_budget(32768, 16000, 12)
    for name, overrides in {
        "no MoE, 32k tokens per side": ["experiment=europarl_en_fr_dense"],
        "MoE-32, 32k tokens per side": ["experiment=europarl_en_fr_moe_32"],
        "MoE-512, 32k tokens per side": ["experiment=europarl_en_fr_moe_32", "model.moe.num_experts=512"],
    }.items():
        runs.append((name, compose_config(overrides), 16000, euro))
    for name, config, vocabulary, batches in runs:
        figures = training_speed(config, vocabulary, batches, device)
        results[name] = figures
        share = figures["tflops"] / top["matmul_tflops"]
        against = ""
        if name.startswith("GNMT"):
            baseline = GNMT_V2_BASELINE[int(name.split()[-1])]
            against = f"  {figures['tokens_per_second'] / baseline:.2f} x NVIDIA's code on an H200"
        print(
            f"{name:<34}{figures['tokens_per_second']:>12,.0f}{figures['tflops']:>9.0f}{share:>7.1%}"
            f"{figures['ms_per_update']:>8.1f}{figures['memory_gb']:>7.1f}{against}"
        )
        torch.cuda.empty_cache()

    print(f"\n{'MoE layer, forward + backward':<34}{'ms':>8}{'dense pair':>12}{'ratio':>7}")
    for tokens in (8192, 32768):
        for num_experts in (8, 64, 512, 2048):
            figures = moe_layer(num_experts, tokens, device)
            results[f"moe layer E={num_experts} T={tokens}"] = figures
            print(
                f"{f'E = {num_experts}, {tokens} tokens':<34}{figures['ms']:>8.2f}{figures['dense_pair_ms']:>12.2f}"
                f"{figures['ms'] / figures['dense_pair_ms']:>7.2f}"
            )
            torch.cuda.empty_cache()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
