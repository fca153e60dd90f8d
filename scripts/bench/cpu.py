"""Speed on the CPU, part by part, each beside the plain PyTorch that it replaces. `make bench`, under two minutes.

A ratio is ours over plain: below 1 we are faster. The two sides are timed in turns and the ratio is the median over the
turns, because other work on the machine comes and goes. Our LSTM without autocast is PyTorch's own: how far its ratio
lies from 1 shows how noisy the run was. Whole models are compared with the float32 matrix product measured in the same
run, decoding with nothing. Tokens are real (not padding) source and target tokens.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

# As the command line has it, and before PyTorch is loaded: see nmt/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.batch import Batch, make_batch, make_rows
from nmt.compose import compose_config
from nmt.config import AttentionConfig, Config, DecodingConfig, MoEConfig
from nmt.cost.operations import model_cost
from nmt.data.subwords import Subwords
from nmt.decoding.translator import Translator
from nmt.metrics.gate_watch import GateWatch
from nmt.metrics.record import TrainLine
from nmt.metrics.writer import MetricsWriter
from nmt.model.attention import Attention
from nmt.model.experts import MoE
from nmt.model.gate_statistics import relative_load
from nmt.model.init import init_parameters
from nmt.model.loss import linear_cross_entropy
from nmt.model.lstm import LSTM
from nmt.model.rows import unpack
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.parallel.saving import Saver
from nmt.terminal import layer_lines
from nmt.tokens import BOS, NUM_SPECIAL, PAD, UNK
from nmt.training.interval import Interval
from nmt.training.optim import make_optimizer, tensors_to_save
from nmt.training.update import Updater

CPU = torch.device("cpu")
Figures = dict[str, float]
Work = Callable[[], object]


def samples_of(works: dict[str, Work], repeats: int, budget: float = 6.0) -> dict[str, list[float]]:
    """Seconds of each piece of work in every turn, after one turn of warm-up; every second turn goes backwards.

    There are `repeats` turns, or as few as four once they have taken `budget` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    begun = 0.0
    for turn in range(repeats + 1):
        if turn == 1:
            begun = time.perf_counter()
        if turn > 4 and time.perf_counter() - begun > budget:
            break
        for name, work in list(works.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def seconds_of(works: dict[str, Work], repeats: int) -> Figures:
    """The medians of `samples_of`."""
    return {name: statistics.median(each) for name, each in samples_of(works, repeats).items()}


def training_pass(module: nn.Module, forward: Callable[[], Tensor], grad: Tensor, *inputs: Tensor) -> Work:
    """Forward and backward, gradients dropped before."""

    def work() -> None:
        module.zero_grad(set_to_none=True)
        for each in inputs:
            each.grad = None
        forward().backward(grad)

    return work


# --------------------------------------------------------------------------------------------------------- parts


def lstm_part(cell_size: int) -> dict[str, Work]:
    """One LSTM of the demo's shape, or a projected one, beside torch.nn.LSTM with the same sizes."""
    x_TBD = torch.randn(20, 125, 128, requires_grad=True)
    rows, _ = make_rows(np.full(125, 20))
    grad_TBD = torch.randn(20, 125, 128)
    ours, plain = LSTM(128, cell_size, 128), nn.LSTM(128, cell_size, proj_size=128 if cell_size > 128 else 0)
    return {
        "ours": training_pass(ours, lambda: unpack(ours(x_TBD.flatten(0, 1), rows), rows), grad_TBD, x_TBD),
        "torch.nn.LSTM": training_pass(plain, lambda: plain(x_TBD)[0], grad_TBD, x_TBD),
    }


def masked_loop(moe: MoE, x_TD: Tensor) -> Tensor:
    """What one writes first: for each expert a boolean mask, two matrix products and an addition in place."""
    gate = moe.gate(x_TD)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(moe.num_experts):
        mask_TK = gate.expert_TK == expert
        token_M = mask_TK.any(dim=1)
        if token_M.any():
            hidden = (x_TD[token_M] @ moe.experts.weights[0][expert]).relu()
            weight_M = (gate.gates_TK * mask_TK).sum(dim=1)[token_M]
            y_TD[token_M] += weight_M[:, None] * (hidden @ moe.experts.weights[1][expert])
    return y_TD


def moe_part(num_experts: int, tokens: int = 2500, width: int = 128, hidden: int = 256, k: int = 2) -> dict[str, Work]:
    """The whole MoE layer, gate included, beside a dense pair on k x tokens rows and the loop over masks."""
    moe = MoE(width, num_experts, MoEConfig(num_experts=num_experts, k=k, hidden_sizes=[hidden])).train()
    init_parameters(nn.ModuleList([moe]), nn.Linear(1, 1))
    dense = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False))
    x_TD, grad_TD = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    x_RD, grad_RD = torch.randn(k * tokens, width, requires_grad=True), torch.randn(k * tokens, width)
    return {
        "ours": training_pass(moe, lambda: moe(x_TD)[0], grad_TD, x_TD),
        "dense pair of equal FLOPs": training_pass(dense, lambda: dense(x_RD), grad_RD, x_RD),
        "loop over masks": training_pass(moe, lambda: masked_loop(moe, x_TD), grad_TD, x_TD),
    }


def loss_part(tokens: int, vocabulary: int, width: int = 128) -> dict[str, Work]:
    """Softmax layer and smoothed loss, forward and backward, beside the same over the logits of all tokens."""
    softmax = nn.Linear(width, vocabulary, bias=False)
    x_ND = torch.randn(tokens, width, requires_grad=True)
    target_N = torch.randint(vocabulary, (tokens,))
    one = torch.ones(())

    def full() -> Tensor:
        return F.cross_entropy(softmax(x_ND), target_N, reduction="sum", label_smoothing=0.1)

    def ours() -> Tensor:
        return linear_cross_entropy(x_ND, softmax.weight, None, target_N, 0.1)[0]

    return {
        "ours": training_pass(softmax, ours, one, x_ND),
        "F.cross_entropy": training_pass(softmax, full, one, x_ND),
    }


def attention_part(sentences: int = 125, positions: int = 20, width: int = 128) -> dict[str, Work]:
    """Product attention, keys included, beside S17 eq. 22 written as torch.einsum over the same weights."""
    attention = Attention(width, AttentionConfig(function="product", size=width))
    init_parameters(nn.ModuleList([attention]), nn.Linear(1, 1))
    source, _ = make_rows(np.random.default_rng(1).integers(positions // 2, positions + 1, sentences))
    target, _ = make_rows(np.full(sentences, positions))
    query_TBD = torch.randn(positions, sentences, width, requires_grad=True)
    values_ND = torch.randn(source.num_rows, width, requires_grad=True)
    padding_SB = torch.arange(source.num_positions)[:, None] >= source.length_B
    grad_TBD = torch.randn(positions, sentences, width)

    def ours() -> Tensor:
        return attention.attend(query_TBD.flatten(0, 1), values_ND, target, source).view_as(query_TBD)

    def plain() -> Tensor:
        values_SBD = unpack(values_ND, source)
        keys_SBN, hidden_TBN = attention.key(values_SBD).tanh(), attention.query(query_TBD).tanh()
        score_TBS = torch.einsum("tbn,sbn,n->tbs", hidden_TBN, keys_SBN, attention.v_N)
        weights_TBS = score_TBS.masked_fill(padding_SB.T, -torch.inf).softmax(dim=2)
        return torch.einsum("tbs,sbd->tbd", weights_TBS, values_SBD)

    return {
        "ours": training_pass(attention, ours, grad_TBD, query_TBD, values_ND),
        "torch.einsum": training_pass(attention, plain, grad_TBD, query_TBD, values_ND),
    }


PARTS: dict[str, Callable[[], dict[str, Work]]] = {
    "LSTM 128": lambda: lstm_part(128),
    "LSTM 512, projected to 128": lambda: lstm_part(512),
    "MoE layer, 8 experts": lambda: moe_part(8),
    "MoE layer, 64 experts": lambda: moe_part(64),
    "softmax loss, 1,504 pieces": lambda: loss_part(2500, 1504),
    "softmax loss, 32,000 pieces": lambda: loss_part(2500, 32000),
    "attention, product": attention_part,
}


def _resident(key: str) -> float:
    """VmRSS (now) or VmHWM (greatest) of this process in MB. Linux only, like `_peak_of`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def _peak_of(name: str, side: str, sender: Any) -> None:
    """In a process of its own: how far the work raises the resident memory at most, in MB."""
    torch.randn(256, 256).mm(torch.randn(256, 256))
    work = PARTS[name]()[side]
    # 5 sets the greatest size back to the present one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    sender.send(_resident("VmHWM") - before)


def peak_megabytes(name: str, side: str) -> float:
    """Memory of one side of a part, beyond its inputs and weights."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of, args=(name, side, sender))
    process.start()
    sender.close()
    megabytes = float(receiver.recv())
    process.join()
    return megabytes


# -------------------------------------------------------------------------------------------------- whole models


def random_batches(tokens: int, vocabulary: int, count: int) -> list[Batch]:
    """Batches of about `tokens` tokens per side, of random pieces, sentences of like lengths (6 to 20) together."""
    rng = np.random.default_rng(1)
    batches = []
    for length in rng.integers(6, 21, count):
        sentences = tokens // int(length)
        sides = [
            [rng.integers(NUM_SPECIAL, vocabulary, size=length - 1 - less) for less in rng.integers(0, 2, sentences)]
            for _ in range(2)
        ]
        batches.append(make_batch(np.arange(sentences), *sides))
    return batches


def training_speed(models: dict[str, Config], rounds: int = 3) -> dict[str, Figures]:
    """Updates of each model over the same batches, in turns with a matrix product, after one round of warm-up."""
    vocabulary = next(iter(models.values())).corpus.subwords.num_pieces
    batches = random_batches(2500, vocabulary, 8)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    works: dict[str, Work] = {"matrix product": lambda: [a @ b for _ in range(10)]}
    for name, config in models.items():
        model = Seq2Seq(config.model, vocabulary).train()
        updater = Updater(model, make_optimizer(model, config.training), config, World(CPU))
        works[name] = lambda updater=updater: [updater.update([batch], 1, 1e-3) for batch in batches]
    seconds = seconds_of(works, rounds)
    ceiling = 10 * 2 * 1024**3 / seconds["matrix product"] / 1e9
    sides = [(batch.num_source_tokens, batch.num_target_tokens, batch.num_sentences) for batch in batches]
    results = {"matrix product": {"gflops": ceiling}}
    for name, config in models.items():
        flops = sum(model_cost(config.model, vocabulary).training_flops(*side) for side in sides)
        results[name] = {
            "tokens_per_second": sum(source + target for source, target, _ in sides) / seconds[name],
            "gflops": flops / seconds[name] / 1e9,
            "share_of_ceiling": flops / seconds[name] / 1e9 / ceiling,
            "ms_per_update": seconds[name] / len(batches) * 1e3,
        }
    return results


def watching_cost(config: Config, intervals: int = 1) -> Figures:
    """Milliseconds per step of updates and of watching their gates, timed apart in one loop, as training does both.

    Watching is adding up the gates of every update, and a line of metrics every training.log_every: its figures,
    curves, histograms, text and judgement. What the line has of other things is in it, so this is an upper bound.
    """
    vocabulary, moe = config.corpus.subwords.num_pieces, config.model.moe
    batches = random_batches(2500, vocabulary, 8)
    model = Seq2Seq(config.model, vocabulary).train()
    world, watch = World(CPU), GateWatch(moe, 0)
    updater = Updater(model, make_optimizer(model, config.training), config, world)
    every, interval = config.training.log_every, Interval(CPU, moe)
    updating = watching = 0.0
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        places = (Path(folder) / "metrics.jsonl", Path(folder) / "tensorboard")
        with MetricsWriter(places, 0, every * intervals) as out:
            for step in range(1, every * intervals + 1):
                begun = time.perf_counter()
                done = updater.update([batches[step % len(batches)]], step, 1e-3)
                updated = time.perf_counter()
                interval.watch(done.sums, done.gates)
                if step % every == 0:
                    means, gates = interval.read(world)
                    of_gates = {layer: gate.to_dict(moe) for layer, gate in gates.items()}
                    out.write(TrainLine(step, *means, 1e-3, 1.0, 1.0, 1, gates=of_gates))
                    loads = {f"{layer}.load_per_expert": relative_load(gate.count_E) for layer, gate in gates.items()}
                    out.write_histograms(step, "train", loads)
                    out.say("\n".join([*layer_lines(of_gates), *watch.judge(step, every, 5.0, gates)]))
                    interval = Interval(CPU, moe)
                updating, watching = updating + updated - begun, watching + time.perf_counter() - updated
    steps = every * intervals
    return {"ms_per_update": updating / steps * 1e3, "ms_watching": watching / steps * 1e3}


def saving_cost(config: Config, updates: int = 25, rounds: int = 5) -> Figures:
    """Milliseconds that one checkpoint adds to training: updates with one saved meanwhile and without one, in turns."""
    vocabulary = config.corpus.subwords.num_pieces
    batches = random_batches(2500, vocabulary, 5)
    model = Seq2Seq(config.model, vocabulary).train()
    world, optimizer = World(CPU), make_optimizer(model, config.training)
    updater = Updater(model, optimizer, config, world)
    copying: list[float] = []
    with TemporaryDirectory() as folder:
        saver = Saver(Path(folder), "none", 1, world)

        def train(saving: bool) -> None:
            for step in range(1, updates + 1):
                updater.update([batches[step % len(batches)]], step, 1e-3)
                if saving and step == 1:
                    begun = time.perf_counter()
                    saver.save(step, tensors_to_save(model, optimizer), {}, None)
                    copying.append(time.perf_counter() - begun)
            saver.wait()

        times = samples_of({"with": lambda: train(True), "without": lambda: train(False)}, rounds, budget=60.0)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        "ms_per_update": seconds["without"] / updates * 1e3,
        "ms_saving": (seconds["with"] - seconds["without"]) * 1e3,
        "ms_training_waits": statistics.median(copying) * 1e3,
    }


def decoding_speed(config: Config, sentences: int = 256) -> dict[str, Figures]:
    """Sentences of 5 to 19 random pieces through greedy and beam search, with random weights.

    An untrained model hardly ever ends a sentence: every search goes to its length limit. `max_length_ratio` is
    therefore 1, which with 10 pieces more makes translations about twice as long as trained ones.
    """
    vocabulary = config.corpus.subwords.num_pieces
    model = Seq2Seq(config.model, vocabulary).eval()
    rng = np.random.default_rng(2)
    sources = [rng.integers(NUM_SPECIAL, vocabulary, size=length) for length in rng.integers(5, 20, sentences)]
    # The search itself never asks the vocabulary.
    stand_in = SimpleNamespace(size=vocabulary, forbidden_ids=[PAD, UNK, BOS], reserved_ids=lambda kind: range(0))
    subwords = cast(Subwords, stand_in)
    works: dict[str, Work] = {}
    for name, beam_size in (("greedy", 1), ("beam 4", 4)):
        decoding = DecodingConfig(beam_size=beam_size, max_length_ratio=1.0)
        translator = Translator(model, subwords, decoding, CPU)
        works[name] = lambda translator=translator: translator.searcher.search(sources, translator.options)
    seconds = seconds_of(works, repeats=3)
    pieces = {name: sum(len(best.tokens) for (best,) in cast(list[Any], work())) for name, work in works.items()}
    return {
        name: {"sentences_per_second": sentences / each, "pieces_per_sentence": pieces[name] / sentences}
        for name, each in seconds.items()
    }


# -------------------------------------------------------------------------------------------------------- tables


def report_parts(repeats: int) -> dict[str, Figures]:
    """Print the table of parts."""
    results: dict[str, Figures] = {}
    print(f"{'forward + backward, 2,500 tokens':<34}{'ours ms':>9}  {'beside':<27}{'ms':>9}{'ratio':>7}")
    for name, make in PARTS.items():
        torch.manual_seed(1)
        samples = samples_of(make(), repeats)
        seconds = {side: statistics.median(each) for side, each in samples.items()}
        results[name] = {f"{side} ms": each * 1e3 for side, each in seconds.items()}
        for side in list(samples)[1:]:
            ratio = statistics.median(a / b for a, b in zip(samples["ours"], samples[side], strict=True))
            results[name][f"ratio to {side}"] = ratio
            row = f"{name:<34}{seconds['ours'] * 1e3:>9.2f}  {side:<27}{seconds[side] * 1e3:>9.2f}"
            print(f"{row}{ratio:>7.2f}")
    return results


def report_memory() -> dict[str, Figures]:
    """Print the table of peak memory of the softmax loss."""
    results: dict[str, Figures] = {}
    if not Path("/proc/self/clear_refs").exists():
        return results
    print(f"\n{'peak memory':<34}{'ours MB':>9}  {'beside':<27}{'MB':>9}{'ratio':>7}")
    for name in (name for name in PARTS if name.startswith("softmax loss")):
        ours, plain = (peak_megabytes(name, side) for side in ("ours", "F.cross_entropy"))
        results[name] = {"ours MB": ours, "F.cross_entropy MB": plain}
        ratio = ours / max(plain, 1.0)
        print(f"{name:<34}{ours:>9.0f}  {'F.cross_entropy':<27}{plain:>9.0f}{ratio:>7.2f}")
    return results


def report_models() -> dict[str, dict[str, Figures]]:
    """Print the tables of training and decoding."""
    demo = compose_config(["experiment=demo"])
    models = {
        "demo": demo,
        "demo without MoE": compose_config(["experiment=demo", "model.moe.num_experts=0"]),
        "demo in bf16": compose_config(["experiment=demo", "training.precision=bf16"]),
    }
    torch.manual_seed(1)
    training = training_speed(models)
    ceiling = training["matrix product"]["gflops"]
    print(f"\nfloat32 matrix product 1024 x 1024 x 1024: {ceiling:.0f} GFLOP/s")
    print(f"{'training, 2,500 tokens per side':<34}{'tokens/s':>9}{'GFLOP/s':>9}{'share':>8}{'ms':>9}")
    for name in models:
        row = training[name]
        speed = f"{row['tokens_per_second']:>9,.0f}{row['gflops']:>9.1f}{row['share_of_ceiling']:>8.1%}"
        print(f"{name:<34}{speed}{row['ms_per_update']:>9.1f}")
    with_moe, without, in_bf16 = (training[name]["tokens_per_second"] for name in models)
    print(f"{'tokens/s, MoE over no MoE':<34}{with_moe / without:>9.2f}")
    print(f"{'tokens/s, bf16 over fp32':<34}{in_bf16 / with_moe:>9.2f}")
    watched = watching_cost(demo)
    share = watched["ms_watching"] / watched["ms_per_update"]
    print(f"{'watching the gates, of a step':<34}{share:>9.2%}{'':>17}{watched['ms_watching']:>9.2f}")
    saved = saving_cost(demo)
    share = saved["ms_saving"] / (1000 * saved["ms_per_update"])
    note = f"waits {saved['ms_training_waits']:.0f} ms"
    print(f"{'a checkpoint, of 1,000 steps':<34}{share:>9.2%}{note:>17}{saved['ms_saving']:>9.1f}")
    decoding = decoding_speed(demo)
    print(f"\n{'decoding, demo, random weights':<34}{'sentences/s':>12}{'pieces each':>13}")
    for name, row in decoding.items():
        print(f"{name:<34}{row['sentences_per_second']:>12.1f}{row['pieces_per_sentence']:>13.1f}")
    return {"training": training, "watching": {"demo": watched}, "saving": {"demo": saved}, "decoding": decoding}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; --json also writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each part (default 15)")
    options = parser.parse_args(arguments)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "parts": report_parts(options.repeats),
        "memory": report_memory(),
    }
    results |= report_models()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
