"""How training scales over processes, and where the time of an update goes.

  python -m scripts.bench.scaling                              1, 2, 4, .. processes, up to the GPUs of this host
  python -m scripts.bench.scaling --processes 1,2 --small      on the CPU, tiny sizes
  torchrun ... -m scripts.bench.scaling                        the processes that torchrun started, on any hosts

Settings key=value change the model, which is conf/model/moe.yaml (small.yaml with --small), and how it is trained:
parallel.overlap_exchange=true sends tokens in two halves. Batches are random pieces of random lengths, planned as in
training. An update is the trainer's own, recorded where training records it. Its learning rate is 0, so that the load
is that of untrained gates.

weak, strong        --tokens per side and process; --global-tokens per side for all together (one micro-batch each)
tokens_per_second   source and target tokens, without padding, of all processes
efficiency          tokens_per_second per process, over that of the fewest processes that ran (one, if the model fits)
exchange, dense     share that the all-to-all exchanges of rows add, and that summing the gradients of dense parameters
                    adds: an update less the same update without them. What other work hides is not in it
load                rows of the busiest process over the mean, worst MoE layer, mean over updates
predicted           tokens_per_second over what `nmt cost` predicts for these batches on this kind of GPU
ms                  milliseconds of an update
memory_gb           peak of the process that needs most: allocated on a GPU, resident so far on a CPU (Linux)
link                GB/s that each process sends to the others in an even all-to-all exchange
equality            losses of N processes beside those of the fewest: same micro-batches, float64, learning at the rates
                    that training begins with. Learning enlarges differences of rounding; the second figure has how far:
                    the fewest processes again, where each weight begins larger by one rounding
"""

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nmt.batch import Batch, Shape, fit
from nmt.compose import compose_config
from nmt.config import Config, TrainingConfig
from nmt.cost.budget import numbers_of
from nmt.cost.cards import Card, card_called, link_of
from nmt.cost.step import Machines, MicroBatch, step_parts
from nmt.device import pick_device, set_float32_products
from nmt.errors import UserError
from nmt.parallel.expert_parallel import make_model
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.optim import learning_rate, make_optimizer
from nmt.training.recording import can_record
from nmt.training.update import LayerSums, Updater
from scripts.bench.gpu import planned

Record = dict[str, Any]

# Full sizes, and those of --small.
DEFAULTS = {"tokens": (16384, 512), "global_tokens": (65536, 1024), "vocabulary": (32000, 512)}
EXPERTS = ([0, 32, 512, 2048], [0, 8])
EQUALITY_TOKENS = 2048
# Columns of the tables, with their formats.
SPEED = {"experts": "", "processes": "", "tokens_per_second": ",.0f", "efficiency": ".2f", "ms": ".1f"}
SPEED |= {"predicted": ".2f", "exchange": ".1%", "dense": ".1%", "load": ".2f", "memory_gb": ".2f"}


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
    """The command line, checked. UserError names what is wrong with it."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the model and of training")
    parser.add_argument("--processes", type=_several(1), help="numbers of processes (default 1,2,4,.. GPUs)")
    parser.add_argument("--experts", type=_several(0), help="experts of each MoE layer (default 0,32,512,2048)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--tokens", type=_whole(1), help="tokens per side and process, weak (default 16384)")
    parser.add_argument("--global-tokens", type=_whole(1), help="tokens per side of an update, strong (default 65536)")
    parser.add_argument("--vocabulary", type=_whole(NUM_SPECIAL + 1), help="pieces (default 32000)")
    parser.add_argument("--updates", type=_whole(1), default=6, help="updates in a turn (default 6)")
    parser.add_argument("--rounds", type=_whole(1), default=3, help="timed turns (default 3)")
    parser.add_argument("--steps-equal", type=_whole(0), default=50, help="updates of the equality check (default 50)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)  # settings may be anywhere
    for name, values in (DEFAULTS | {"experts": EXPERTS}).items():
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
    most, gpus = max(options.processes), torch.cuda.device_count()
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no such folder")
    configs = [compose(options, experts) for experts in options.experts]
    if pick_device(configs[0].training.device, "training.device").type == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", most)) > gpus:
            raise UserError(f"--processes {most} is more than the {gpus} GPUs of this host")
    elif not options.small and "training.device=cpu" not in options.settings:
        raise UserError("there is no GPU: give --small for tiny sizes, or training.device=cpu if full ones are meant")
    for processes in options.processes:
        if options.global_tokens % processes:
            raise UserError(f"--global-tokens {options.global_tokens} cannot be divided among {processes} processes")
        for config in configs:
            group = config.parallel.expert_group_size or processes
            if processes % group or config.model.moe.num_experts % group:
                what = f"{config.model.moe.num_experts} experts and {processes} processes"
                raise UserError(f"{what} are not both multiples of an expert group's {group} processes")


def compose(options: argparse.Namespace, experts: int) -> Config:
    """The configuration of a measurement. UserError if the settings are not understood."""
    model = "small" if options.small else "moe"
    try:
        return compose_config([f"model={model}", f"model.moe.num_experts={experts}", *options.settings])
    except Exception as error:  # Hydra's errors and those of the settings themselves have no base in common
        raise UserError(f"--experts {experts} {' '.join(options.settings)}: {error}") from error


@cache
def plan(
    small: bool, vocabulary: int, tokens: int, micro_batches: int, updates: int
) -> tuple[list[list[Batch]], Shape]:
    """Updates of micro-batches of `tokens` tokens per side, the same in all processes, and their common shape."""
    training = replace(TrainingConfig(), batch_tokens=tokens, micro_batches=micro_batches)
    middle, longest = (12, 19) if small else (28, 119)
    return planned(training, vocabulary, updates, middle=middle, longest=longest)


def make_updater(world: World, config: Config, vocabulary: int, dtype: torch.dtype = torch.float32) -> Updater:
    """The trainer's updater of a new model, the same in all processes."""
    torch.manual_seed(config.training.seed)
    with world.device:  # billions of random weights take a CPU minutes
        model = make_model(config, vocabulary, world).to(dtype).train()
    return Updater(model, make_optimizer(model, config.training), config, world)


@contextmanager
def without(part: str, updater: Updater) -> Iterator[None]:
    """Context in which an update leaves this part out. At rate 0, the weights stay the same in all processes."""
    exchange, summed = dist.all_to_all_single, updater.summed
    if part == "dense":
        updater.summed = []
        # What no_sync() sets, if the backward pass sums.
        updater.forward.require_backward_grad_sync = False  # type: ignore[attr-defined]
    if part == "exchange":
        dist.all_to_all_single = _keep
    updater.recording = None
    try:
        yield
    finally:
        dist.all_to_all_single, updater.summed = exchange, summed
        updater.forward.require_backward_grad_sync = True  # type: ignore[attr-defined]


def _keep(received: torch.Tensor, sent: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Receive what this process sends, which has as many rows, since it also receives the numbers that it sends."""
    received.copy_(sent)
    return SimpleNamespace(wait=lambda: None)


def settle(world: World) -> float:
    """The time when all processes have finished."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.wait_for_all()
    return time.perf_counter()


def load_of(sums: LayerSums, group_size: int) -> float:
    """Rows of the busiest process over the mean, in the worst layer. Replicas of a process count with it."""
    rows = [each.count_E.view(group_size, -1).sum(1) for each in sums.values()]
    return max((float(each.max() / each.mean()) for each in rows), default=1.0)


def size_of(batch: Batch, shape: Shape) -> MicroBatch:
    """What a micro-batch of this shape is for the model of the time of a step."""
    return MicroBatch(
        batch.num_source_tokens, batch.num_target_tokens, batch.num_sentences, len(shape.source), len(shape.target)
    )


def predicted_ms(record: Record, config: Config, vocabulary: int, card: Card) -> float:
    """Milliseconds of an update of these micro-batches as `nmt cost` predicts them."""
    gpus = record["processes"]
    config = replace(config, training=replace(config.training, micro_batches=gpus))
    group = config.parallel.expert_group_size or gpus
    machines = Machines(card, gpus=gpus, group=group, link_gbs=link_of(card, gpus))
    batch = MicroBatch(*(record[name] for name in MicroBatch._fields))
    return sum(part.ms for part in step_parts(config, vocabulary, batch, numbers_of(config, True), machines))


def measure(world: World, config: Config, options: argparse.Namespace, scaling: str) -> Record:
    """Time updates, and the same ones without the parts that communicate, in turns after one of warm-up."""
    tokens = options.tokens if scaling == "weak" else options.global_tokens // world.size
    steps, shape = plan(options.small, options.vocabulary, tokens, world.size, options.updates)
    batches = [step[world.rank] for step in steps]
    sizes = [size_of(batch, shape if can_record(config, world) else batch.shape) for batch in batches]
    if can_record(config, world):
        batches = [fit(batch, shape) for batch in batches]
    on_gpu = world.device.type == "cuda"
    updater = make_updater(world, config, options.vocabulary)
    if on_gpu:
        batches = [batch.pin_memory() for batch in batches]
        torch.cuda.reset_peak_memory_stats(world.device)
    seconds, loads, peak = dict[str, float](), list[float](), 0
    parts = ["dense"] * (world.size > 1) + ["exchange"] * (world.group_size > 1 and bool(updater.model.moe_layers()))
    for part in ("", *parts):
        with without(part, updater):
            turns = []
            for _ in range(options.rounds + 1):
                start = settle(world)
                done = [updater.update([batch], step, rate=0.0) for step, batch in enumerate(batches)]
                turns.append((settle(world) - start) / len(batches))
                loads += [] if part else [load_of(each.sums, world.group_size) for each in done]
            seconds[part] = median(turns[1:])
        peak = peak or (torch.cuda.max_memory_allocated(world.device) if on_gpu else 1)
    update = seconds[""]
    own = dict(zip(MicroBatch._fields, map(mean, zip(*sizes, strict=True)), strict=True))
    means = world.sum(torch.tensor(list(own.values()), dtype=torch.float64)) / world.size
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(zip(own, means.tolist(), strict=True)) | {
        "tokens_per_second": float(means[:2].sum()) * world.size / update,
        "ms": update * 1e3,
        **{part: 1 - seconds.get(part, update) / update for part in ("exchange", "dense")},
        "load": mean(loads),
        "memory_gb": world.max_int(peak if on_gpu else resident) / 1e9,
    }


def link_speed(world: World) -> float:
    """GB/s that a process sends to the others in an even all-to-all exchange of all."""
    part, repeats, start = 2**26 if world.device.type == "cuda" else 2**20, 10, 0.0
    rows, out = (torch.zeros(part * world.size, dtype=torch.uint8, device=world.device) for _ in range(2))
    for turn in range(2 + repeats):
        start = settle(world) if turn == 2 else start
        dist.all_to_all_single(out, rows)
    return repeats * part * (world.size - 1) / (settle(world) - start) / 1e9


def equality_losses(world: World, config: Config, options: argparse.Namespace, factor: float = 1.0) -> list[float]:
    """Loss per target token of every update, over as many micro-batches as all numbers of processes divide.

    All weights are first multiplied by this factor.
    """
    config = replace(config, training=replace(config.training, precision="fp32"))
    number, tokens = math.lcm(*options.processes), min(options.tokens, EQUALITY_TOKENS)
    updater = make_updater(world, config, options.vocabulary, torch.float64)
    with torch.no_grad():
        for parameter in updater.model.parameters():
            parameter.mul_(factor)
    sums = []
    steps, _ = plan(options.small, options.vocabulary, tokens, number, options.steps_equal)
    for step, micro_batches in enumerate(steps):
        batches = micro_batches[world.rank :: world.size]
        loss = updater.update(batches, step, learning_rate(config.training, step + 1)).loss.double()
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
    name = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads per process"
    keep("device", name=name, torch=torch.__version__)
    if options.steps_equal:
        # Before fast mathematics is turned on. Few experts: in float32 they work one after the other.
        experts = min(filter(None, options.experts), default=0)
        few = compose(options, experts)
        keep("equality", experts=experts, losses=equality_losses(world, few, options))
        if world.size == min(options.processes):
            moved = equality_losses(world, few, options, factor=1 + torch.finfo(torch.float64).eps)
            keep("moved", experts=experts, losses=moved)
    set_float32_products(world.device, "auto")
    if world.size > 1:
        keep("link", gigabytes_per_second=link_speed(world))
    for experts in options.experts:
        for scaling in ("weak", "strong"):
            figures = measure(world, compose(options, experts), options, scaling)
            keep("speed", experts=experts, scaling=scaling, **figures)
            gc.collect()
            torch.cuda.empty_cache()
    world.stop()
    return records


def launch(options: argparse.Namespace, arguments: list[str]) -> list[Record]:
    """What each number of processes measured on this host; what came before a failure counts (out of memory, say)."""
    # The same list for all: it fixes the micro-batches of the equality check.
    numbers = f"--processes={','.join(map(str, options.processes))}"
    arguments = ["-m", "scripts.bench.scaling", *arguments, "--worker", numbers]
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // max(options.processes), 1))}
    torchrun, records = [sys.executable, "-m", "torch.distributed.run", "--standalone"], list[Record]()
    for number in options.processes:
        command = [*torchrun, f"--nproc-per-node={number}", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threads | os.environ) as child:
            for line in child.stdout or ():
                print(line, end="", file=sys.stderr, flush=True)
                records += [json.loads(line)] if line.startswith("{") else []
        if child.returncode:
            print(f"{number} processes ended with status {child.returncode}", file=sys.stderr)
            records.append({"kind": "failed", "processes": number, "status": child.returncode})
    return records


def _of(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def print_table(columns: dict[str, str], rows: list[Record]) -> None:
    """One column for each figure named, in the format given."""
    print("  ".join(f"{name:>6}" for name in columns))
    for row in rows:
        cells = ((name, f"{row[name]:{form}}" if name in row else "-") for name, form in columns.items())
        print("  ".join(cell.rjust(max(len(name), 6)) for name, cell in cells))


def report(records: list[Record], options: argparse.Namespace) -> None:
    """Print tables of speed, and how far losses lie from those of the fewest processes; add both to the records."""
    for device in _of(records, "device")[:1]:
        print(f"{device['name']}, torch {device['torch']}")
    print(f"tokens per side: {options.tokens:,} per process (weak), {options.global_tokens:,} in all (strong)")
    for scaling in ("weak", "strong"):
        rows = [row for row in _of(records, "speed") if row["scaling"] == scaling]
        rows.sort(key=lambda row: (row["experts"], row["processes"]))
        card = card_called(_of(records, "device")[0]["name"])
        for row in rows:
            if card:
                ms = predicted_ms(row, compose(options, row["experts"]), options.vocabulary, card)
                row["predicted"] = ms / row["ms"]
            first = next(each for each in rows if each["experts"] == row["experts"])
            each, reference = (figures["tokens_per_second"] / figures["processes"] for figures in (row, first))
            row["efficiency"] = each / reference
        print(f"\n{scaling} scaling")
        print_table(SPEED, rows)
    print()
    for row in _of(records, "link"):
        print(f"link: {row['gigabytes_per_second']:.3g} GB/s from each of {row['processes']} processes, all-to-all")
    first, *others = [*_of(records, "equality"), *_of(records, "moved")] or [{}]
    for row in others:
        differences = [abs(a - b) / abs(b) for a, b in zip(row["losses"], first["losses"], strict=True)]
        row["difference"], row["first_ten"] = max(differences), max(differences[:10])
        what = f"{row['processes']} processes" + ", weights larger by one rounding," * (row["kind"] == "moved")
        loss = f"loss {first['losses'][0]:.3f} to {first['losses'][-1]:.3f} in {len(differences)} updates"
        print(f"equality: {what} beside {first['processes']}, {row['experts']} experts, {loss}:")
        print(f"          largest relative difference of a loss {row['difference']:.1e}", end="")
        print(f", of the first ten {row['first_ten']:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """The command line above; its exit status: 0, 1 if processes failed, 2 for a wrong argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        options = read_options(arguments)
        records = work(options) if "LOCAL_RANK" in os.environ else launch(options, arguments)
    except UserError as error:
        print(f"bench_scaling: {' '.join(str(error).split())}\n" * is_main, end="", file=sys.stderr)
        return 2
    if is_main and not options.worker:
        report(records, options)
        if options.output:
            options.output.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return 1 if _of(records, "failed") else 0


if __name__ == "__main__":
    sys.exit(main())
