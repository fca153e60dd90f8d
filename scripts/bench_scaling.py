"""How training scales over processes, and where the time of an update goes.

  python scripts/bench_scaling.py                              1, 2, 4, .. processes, up to the GPUs of this host
  python scripts/bench_scaling.py --processes 1,2 --small      on the CPU, tiny sizes
  python scripts/bench_scaling.py --project                    and what more devices would give
  torchrun ... scripts/bench_scaling.py                        the processes that torchrun started, on any hosts

Settings key=value change the model, which is conf/model/moe.yaml (small.yaml with --small). Batches are random pieces
of random lengths; an update is the trainer's own, at learning rate 0, so the load is that of untrained gates.

weak, strong        --tokens a side for every process; --global-tokens a side for all together (one micro-batch each)
tokens_per_second   source and target tokens, without padding, of all processes
efficiency          tokens_per_second a process, over that of the fewest processes that ran (one, if the model fits)
exchange            share of the update inside the all-to-all exchanges of rows and of their numbers, forward and
                    backward (device events; wall time on a CPU). Nothing hides them. Waiting for others is in it
dense               share that summing the gradients of dense parameters adds: an update less the same update without
                    it, timed in turns. What the backward pass hides is not in it; noise may make it negative
other               share inside blocking sums: number of tokens, balance statistics, norm, replicas of experts
load                rows of the busiest process over the mean, worst MoE layer, mean over updates
memory_gb           peak of the process that needs most: allocated on a GPU, resident so far on a CPU (Linux)

Equality: losses of N processes beside those of the fewest, over the same micro-batches, learning, in float32.
"""

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from nmt.batch import NUM_SPECIAL, Batch, make_batch
from nmt.cli import compose_config
from nmt.config import Config, ModelConfig
from nmt.device import pick_device, set_fast_math
from nmt.errors import UserError
from nmt.evaluation.compute import model_cost
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import distribute
from nmt.parallel.mesh import World
from nmt.training.optim import make_optimizer
from nmt.training.update import LayerSums, Updater

Record = dict[str, Any]

# Full sizes, and those of --small.
DEFAULTS = {
    "experts": ([0, 32, 512, 2048], [0, 8]),
    "tokens": (16384, 512),
    "global_tokens": (65536, 1024),
    "vocabulary": (32000, 512),
}
PROJECTED = (8, 16, 64, 256)
EQUALITY_TOKENS, EQUALITY_RATE = 2048, 1e-3
# How much of the compute time can hide the reduction of dense gradients: the backward pass.
BACKWARD = 2 / 3
ASSUMED = """Assumed: tokens and experts of a device stay as measured, so the
experts' compute does; the gate grows with all experts; the link is the same between any two devices and reaches its full
speed; the exchange is hidden by nothing and waits for the busiest process; the sum of dense gradients (a ring) hides
behind the backward pass, 2/3 of the compute; other communication costs what it cost here."""

# Columns of the tables, with their formats.
_SHARES = {"ms_per_update": ".1f", "exchange": ".1%", "dense": ".1%"}
_BOTH = {"tokens_per_second": ",.0f", "efficiency": ".2f"} | _SHARES
SPEED = {"experts": "", "processes": "", "overlap": ""} | _BOTH | {"other": ".1%", "load": ".2f", "memory_gb": ".2f"}
PROJECTION = {"devices": "", "experts": "", "experts_per_device": ""} | _BOTH


# ------------------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (try --help)")


def _whole(bound: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < bound:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {bound}")
        return int(text)

    return read


def _several(bound: int) -> Callable[[str], list[int]]:
    return lambda text: sorted({_whole(bound)(part) for part in text.split(",")})


def read_options(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked. UserError says what is wrong with it."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the model and of training")
    parser.add_argument("--processes", type=_several(1), help="numbers of processes (default 1,2,4,.. GPUs)")
    parser.add_argument("--experts", type=_several(0), help="experts of each MoE layer (default 0,32,512,2048)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--tokens", type=_whole(1), help="tokens a side and process, weak (default 16384)")
    parser.add_argument("--global-tokens", type=_whole(1), help="tokens a side of an update, strong (default 65536)")
    parser.add_argument("--vocabulary", type=_whole(NUM_SPECIAL + 1), help="pieces (default 32000)")
    parser.add_argument("--updates", type=_whole(1), default=6, help="updates in a turn (default 6)")
    parser.add_argument("--rounds", type=_whole(1), default=3, help="timed turns (default 3)")
    parser.add_argument("--steps-equal", type=_whole(0), default=50, help="updates of the equality check (default 50)")
    parser.add_argument("--project", action="store_true", help=f"project to {', '.join(map(str, PROJECTED))} devices")
    parser.add_argument("--gigabytes-per-second", type=float, help="link of a device, one way (default: as measured)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    # Settings may stand anywhere.
    options = parser.parse_intermixed_args(arguments)
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.small])
    if options.processes is None:
        launched, gpus = os.environ.get("WORLD_SIZE"), torch.cuda.device_count()
        options.processes = [int(launched)] if launched else [2**power for power in range(gpus.bit_length())]
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if not options.processes:
        raise UserError("there is no GPU: give --processes, such as 1,2, and --small")
    link, most = options.gigabytes_per_second, max(options.processes)
    if link is not None and not 0 < link < math.inf:
        raise UserError(f"--gigabytes-per-second {link} must be above 0")
    if options.project and most == 1 and link is None:
        raise UserError("--project from one process needs --gigabytes-per-second: there is no link to measure")
    configs = [compose(options, experts) for experts in options.experts]
    device = pick_device(configs[0].training.device, "training.device")
    if device.type == "cpu" and not options.small and "training.device=cpu" not in options.settings:
        raise UserError("there is no GPU: give --small for tiny sizes, or training.device=cpu if full ones are meant")
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", most))
    if device.type == "cuda" and here > gpus:
        raise UserError(f"{here} processes, but {gpus} GPUs are visible: lower --processes")
    for processes in options.processes:
        if options.global_tokens % processes:
            raise UserError(f"--global-tokens {options.global_tokens} cannot be divided among {processes} processes")
        for config in configs:
            group = config.parallel.expert_group_size or processes
            if processes % group:
                raise UserError(f"parallel.expert_group_size={group} does not divide {processes} processes")
            if config.model.moe.num_experts % group:
                raise UserError(f"{config.model.moe.num_experts} experts cannot be spread over {group} processes")


def compose(options: argparse.Namespace, experts: int, overlap: bool = True) -> Config:
    """The configuration of a measurement. UserError if the settings are not understood."""
    model = "small" if options.small else "moe"
    try:
        config = compose_config([f"model={model}", f"model.moe.num_experts={experts}", *options.settings])
    except Exception as error:
        # Hydra's errors have no base in common with those of the settings themselves.
        raise UserError(f"--experts {experts} {' '.join(options.settings)}: {error}") from error
    return replace(config, parallel=replace(config.parallel, overlap=overlap))


# ----------------------------------------------------------------------------------------- what a process measures


def micro_batch(options: argparse.Namespace, tokens: int, step: int, number: int) -> Batch:
    """Micro-batch `number` of update `step`, the same for whichever process it falls to.

    About `tokens` tokens a side; the sentences of one update are of like lengths, as in training.
    """
    middle, longest = (2.5, 20) if options.small else (3.33, 120)
    length = int(np.clip(np.random.default_rng([1, step]).lognormal(middle, 0.5), 6, longest))
    rng = np.random.default_rng([2, step, number])
    sentences = max(tokens // length, 1)
    sides = [
        [
            rng.integers(NUM_SPECIAL, options.vocabulary, size=size)
            for size in rng.integers(length - 3, length, sentences)
        ]
        for _ in range(2)
    ]
    return make_batch(np.arange(sentences), *sides)


def make_updater(world: World, config: Config, vocabulary: int) -> Updater:
    """The trainer's updater of a new model, the same in all processes."""
    torch.manual_seed(config.training.seed)
    # Made on the device: a host would take minutes over billions of random weights.
    with torch.device(world.device):
        model = Seq2Seq(config.model, vocabulary).train()
    distribute(model, world)
    return Updater(model, make_optimizer(model, config.training), config, world)


class Watch:
    """Time this process spends inside blocking collectives, and the bytes of the rows that it exchanges."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {"exchange": [], "other": []}
        self.exchanged_bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the two collectives that training uses, whoever calls them."""
        before = dist.all_to_all_single, dist.all_reduce
        dist.all_to_all_single, dist.all_reduce = map(self._timed, self.spans, before)
        try:
            yield
        finally:
            dist.all_to_all_single, dist.all_reduce = before

    def seconds(self, kind: str) -> float:
        """In all, so far; the device must have finished."""
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in self.spans[kind]) / 1e3
        return sum(end - start for start, end in self.spans[kind])

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, kind: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            # Buckets of dense gradients do not block.
            if named.get("async_op"):
                return collective(*arguments, **named)
            start = self._mark()
            result = collective(*arguments, **named)
            self.spans[kind].append((start, self._mark()))
            if kind == "exchange" and arguments[1].is_floating_point():
                self.exchanged_bytes += arguments[1].numel() * arguments[1].element_size()
            return result

        return timed


def _settle(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.wait_for_all()
    return time.perf_counter()


def _turn(world: World, updater: Updater, batches: list[Batch], sums: list[LayerSums]) -> float:
    """Seconds of one update from each batch, in the slowest process."""
    start = _settle(world)
    for step, batch in enumerate(batches, start=1):
        sums.append(updater.update([batch], step, rate=0.0).sums)
    return world.max_int(round((_settle(world) - start) * 1e9)) / 1e9


def load_of(sums: LayerSums, group_size: int) -> float:
    """Rows of the busiest process over the mean, in the worst layer. Replicas of a process count with it."""
    rows = [each.count_E.view(group_size, -1).sum(1) for each in sums.values()]
    return max((float(each.max() / each.mean()) for each in rows), default=1.0)


def measure(world: World, config: Config, options: argparse.Namespace, scaling: str) -> Record:
    """Time updates with and without the reduction of dense gradients, in turns after a turn of warm-up."""
    tokens = options.tokens if scaling == "weak" else options.global_tokens // world.size
    batches = [micro_batch(options, tokens, step, world.rank) for step in range(options.updates)]
    on_gpu = world.device.type == "cuda"
    batches = [batch.pin_memory() for batch in batches] if on_gpu else batches
    updater = make_updater(world, config, options.vocabulary)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    watch, sums = Watch(world.device), list[LayerSums]()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(options.rounds + 1):
        for reduced in (True, False) if world.size > 1 else (True,):
            if world.size > 1:
                # What no_sync() sets. At rate 0 the weights stay the same everywhere.
                updater.forward.require_backward_grad_sync = reduced  # type: ignore[attr-defined]
            with watch.watching() if turn and reduced else nullcontext():
                taken = _turn(world, updater, batches, sums)
            seconds[reduced] += [taken / len(batches)] if turn else []
    update, updates = statistics.median(seconds[True]), options.rounds * len(batches)
    cost = model_cost(config.model, options.vocabulary)
    sides = [(batch.num_source_tokens, batch.num_target_tokens, batch.pairs_B.numel()) for batch in batches]
    own = {
        "source_tokens": statistics.mean(side[0] for side in sides),
        "target_tokens": statistics.mean(side[1] for side in sides),
        "flops": statistics.mean(cost.training_flops(*side) for side in sides),
        "exchange_seconds": watch.seconds("exchange") / updates,
        "other_seconds": watch.seconds("other") / updates,
        "exchanged_bytes": watch.exchanged_bytes / updates,
    }
    means = world.sum(torch.tensor(list(own.values()), dtype=torch.float64)) / world.size
    memory = torch.cuda.max_memory_allocated(world.device) if on_gpu else _resident_bytes()
    return dict(zip(own, means.tolist(), strict=True)) | {
        "seconds_per_update": update,
        "tokens_per_second": float(means[:2].sum()) * world.size / update,
        "dense_seconds": update - statistics.median(seconds[False] or [update]),
        "load": statistics.mean(load_of(each, world.group_size) for each in sums),
        "memory_gb": world.max_int(memory) / 1e9,
        "group_size": world.group_size,
    }


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def link_speed(world: World) -> float:
    """GB/s that a process sends to the others in an even all-to-all exchange of all."""
    part, repeats, start = 2**26 if world.device.type == "cuda" else 2**20, 10, 0.0
    rows = torch.zeros(part * world.size, dtype=torch.uint8, device=world.device)
    out = torch.empty_like(rows)
    for turn in range(2 + repeats):
        start = _settle(world) if turn == 2 else start
        dist.all_to_all_single(out, rows)
    return repeats * part * (world.size - 1) / (_settle(world) - start) / 1e9


def equality_losses(world: World, config: Config, options: argparse.Namespace) -> list[float]:
    """Loss per target token of every update, over as many micro-batches as all numbers of processes divide."""
    config = replace(config, training=replace(config.training, precision="fp32"))
    number, tokens = math.lcm(*options.processes), min(options.tokens, EQUALITY_TOKENS)
    updater = make_updater(world, config, options.vocabulary)
    sums = []
    for step in range(1, options.steps_equal + 1):
        batches = [micro_batch(options, tokens, step, each) for each in range(world.rank, number, world.size)]
        loss = updater.update(batches, step, EQUALITY_RATE).loss.double()
        sums.append(torch.stack([loss, loss.new_tensor(sum(batch.num_target_tokens for batch in batches))]))
    loss, count = world.sum(torch.stack(sums)).unbind(1)
    return (loss / count).tolist()


def work(options: argparse.Namespace) -> list[Record]:
    """Measure everything as one of the processes that torchrun started; the main one prints JSON lines meanwhile."""
    config = compose(options, options.experts[0])
    world = World.start(config.training.device, config.parallel)
    records: list[Record] = []

    def keep(kind: str, **figures: Any) -> None:
        records.append({"kind": kind, "processes": world.size} | figures)
        if world.is_main:
            print(json.dumps(records[-1]), flush=True)

    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads a process"
    bf16 = config.training.precision == "bf16" or (config.training.precision == "auto" and on_gpu)
    keep("device", name=name, torch=torch.__version__, value_bytes=2 if bf16 else 4)
    if options.steps_equal:
        # Before fast mathematics is turned on. Few experts: in float32 they work one after the other.
        experts = min(filter(None, options.experts), default=0)
        keep("equality", experts=experts, losses=equality_losses(world, compose(options, experts), options))
    set_fast_math(world.device)
    if world.size > 1:
        keep("link", gigabytes_per_second=link_speed(world))
    for experts in options.experts:
        for scaling in ("weak", "strong"):
            for overlap in (True, False) if world.size > 1 else (True,):
                what = {"experts": experts, "scaling": scaling, "overlap": overlap}
                try:
                    keep("speed", **what, **measure(world, compose(options, experts, overlap), options, scaling))
                except torch.OutOfMemoryError as error:
                    # Several processes cannot go on: the others wait for this one.
                    if world.size > 1:
                        raise
                    keep("too large", **what, reason=" ".join(str(error).split()))
                gc.collect()
                torch.cuda.empty_cache()
    world.stop()
    return records


# ----------------------------------------------------------------------------------------- launching and reporting


def launch(processes: int, options: argparse.Namespace, arguments: list[str]) -> list[Record]:
    """What `processes` processes of this host measure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    # The same list for all: it fixes the micro-batches of the equality check.
    command += [*arguments, "--worker", f"--processes={','.join(map(str, options.processes))}"]
    threads = max((os.cpu_count() or 1) // max(options.processes), 1)
    records: list[Record] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": str(threads)} | os.environ
    ) as child:
        for line in child.stdout or ():
            if line.startswith("{"):
                records.append(json.loads(line))
            print(line, end="", file=sys.stderr, flush=True)
    if child.returncode:
        print(f"{processes} processes ended with status {child.returncode}: what they measured counts", file=sys.stderr)
        records.append({"kind": "failed", "processes": processes, "status": child.returncode})
    return records


def _of(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def print_table(columns: dict[str, str], rows: list[Record]) -> None:
    """One column for each figure named, in the format given."""
    print("  ".join(columns))
    for row in rows:
        print("  ".join(f"{row[name]:{form}}".rjust(len(name)) for name, form in columns.items()))


def report_speed(records: list[Record]) -> None:
    """Print the tables of weak and strong scaling, and add the efficiency to their records."""
    for scaling in ("weak", "strong"):
        rows = [row for row in _of(records, "speed") if row["scaling"] == scaling]
        rows.sort(key=lambda row: (row["experts"], row["processes"]))
        for row in rows:
            first = next(each for each in rows if each["experts"] == row["experts"])
            each, reference = (figures["tokens_per_second"] / figures["processes"] for figures in (row, first))
            row["efficiency"] = each / reference
        print(f"\n{scaling} scaling")
        print_table(SPEED, rows)
    for row in _of(records, "too large"):
        print(f"{row['experts']} experts do not fit {row['processes']} process ({row['scaling']}): {row['reason']}")


def report_equality(records: list[Record]) -> None:
    """Print how far the losses of several processes lie from those of the fewest, and add it to their records."""
    first, *others = _of(records, "equality") or [{}]
    for row in others:
        pairs = zip(row["losses"], first["losses"], strict=True)
        row["max_relative_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
        print(
            f"\nequality of {row['processes']} processes and {first['processes']}: {row['experts']} experts, "
            f"{len(row['losses'])} updates, loss {first['losses'][0]:.3f} to {first['losses'][-1]:.3f}, "
            f"largest relative difference {row['max_relative_difference']:.1e}"
        )


def io_ratio(model: ModelConfig) -> float:
    """Multiply-adds of an expert per value that travels to it or back: its hidden size, if it has one (S17 3.2)."""
    sizes = [model.hidden_size, *model.moe.hidden_sizes, model.hidden_size]
    return sum(inputs * outputs for inputs, outputs in pairwise(sizes)) / (2 * model.hidden_size)


def project(row: Record, model: ModelConfig, vocabulary: int, values_per_second: float, devices: int) -> Record:
    """A row of weak scaling carried over to `devices`, each with the row's tokens and experts per process."""
    per_device = row["experts"] // row["group_size"]
    grown = replace(model, moe=replace(model.moe, num_experts=per_device * devices))
    now, then = (model_cost(each, vocabulary) for each in (model, grown))
    tokens = row["source_tokens"], row["target_tokens"]
    growth = then.training_flops(*tokens, row["sentences"]) / now.training_flops(*tokens, row["sentences"])
    expert_ops = tokens[0] * then.encoder_ops.get("encoder experts", 0)
    expert_ops += tokens[1] * then.decoder_ops.get("decoder experts", 0)
    compute, other = compute_seconds(row) * growth, row["other"] * row["ms_per_update"] / 1e3
    away = (devices - 1) / devices
    # Each value that goes forward has a gradient that comes back.
    exchange = 2 * expert_ops / io_ratio(model) * away / values_per_second * row["load"]
    # A ring sends every gradient twice, and gradients are float32.
    values = 2 * (then.num_parameters - then.num_expert_parameters) * 4 / row["value_bytes"]
    dense = max(values * away / values_per_second - BACKWARD * compute, 0.0)
    update = compute + exchange + dense + other
    return {
        "kind": "projection",
        "devices": devices,
        "experts": per_device * devices,
        "experts_per_device": per_device,
        "tokens_per_second": sum(tokens) * devices / update,
        "efficiency": sum(tokens) / update / (row["tokens_per_second"] / row["processes"]),
        "ms_per_update": update * 1e3,
        "exchange": exchange / update,
        "dense": dense / update,
    }


def compute_seconds(row: Record) -> float:
    """An update's time outside communication."""
    return row["ms_per_update"] / 1e3 * (1 - row["exchange"] - max(row["dense"], 0.0) - row["other"])


def report_projection(records: list[Record], options: argparse.Namespace) -> None:
    """Print the tables of projections, and add them to the records."""
    links = _of(records, "link")
    link = options.gigabytes_per_second or links[-1]["gigabytes_per_second"]
    print(f"\nprojection, link of {link:.3g} GB/s a device one way. {ASSUMED}")
    last = {row["experts"]: row for row in _of(records, "speed") if row["scaling"] == "weak" and row["overlap"]}
    for experts, row in last.items():
        model, values_per_second = compose(options, experts).model, link * 1e9 / row["value_bytes"]
        flops = model_cost(model, options.vocabulary).training_flops(
            row["source_tokens"], row["target_tokens"], row["sentences"]
        )
        between = flops / 2 / compute_seconds(row) / values_per_second
        print(f"\nfrom {row['processes']} processes with {experts} experts, {compute_seconds(row) * 1e3:.1f} ms compute;", end="")
        print(f" multiply-adds per value on the link: an expert {io_ratio(model):,.0f}, this device {between:,.0f}")
        rows = [project(row, model, options.vocabulary, values_per_second, devices) for devices in PROJECTED]
        print_table(PROJECTION, rows)
        records += rows


def main(arguments: list[str] | None = None) -> int:
    """The command line above; its exit status: 0, 1 if processes failed, 2 for a wrong argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    launched, is_main = "LOCAL_RANK" in os.environ, os.environ.get("RANK", "0") == "0"
    try:
        options = read_options(arguments)
        if launched:
            records = work(options)
        else:
            records = [record for number in options.processes for record in launch(number, options, arguments)]
    except UserError as error:
        if is_main:
            print(f"bench_scaling: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not is_main or options.worker or not records:
        return 0
    for device in _of(records, "device")[:1]:
        print(f"\n{device['name']}, torch {device['torch']}; weak: {options.tokens:,} tokens a side and process, ", end="")
        print(f"strong: {options.global_tokens:,} a side; {options.vocabulary:,} pieces")
    for each in _of(records, "link"):
        print(f"all-to-all among {each['processes']}: {each['gigabytes_per_second']:.3g} GB/s sent by each process")
    report_speed(records)
    report_equality(records)
    if options.project:
        report_projection(records, options)
    if options.output:
        options.output.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return 1 if _of(records, "failed") else 0


if __name__ == "__main__":
    sys.exit(main())
