"""Time of one training step on a GPU, by part of the network: python -m scripts.bench.step FILE.json

A step's kernels are added up by the file of nmt/ that launched them. A kernel of the backward pass belongs to the
operation whose gradient it computes. The step is timed without the profiler, as the trainer takes it; what no kernel
fills is idle. Kernels cannot be attributed in a recorded step, so that the profiler sees steps that are not recorded.
scripts/results/profile_step.py draws the figures of two commits side by side.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nmt.device import set_float32_products
from scripts.bench.gpu import CASES, Case, busy_milliseconds, fitted, free_memory, make_updater, prepare, run_updates

Event = dict[str, Any]
"""An event of a trace: `cat`egory, `name`, `ts` and `dur` in microseconds, `tid`, `args`."""

PARTS = {
    "softmax": r"/(loss|cross_entropy)\w*\.py",
    "optimiser": r"/(optim|expert_step)\w*\.py",
    "attention": r"/attention\w*\.py",
    "LSTM": r"/lstm\w*\.py",
    "gate": r"/(gat|row|route|dispatch)\w*\.py",
    "experts": r"/(expert|grouped)\w*\.py",
}
"""Parts of a step, and the files that compute them. The innermost file counts; all else is "other"."""
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_BACKWARD = "autograd::engine::evaluate_function: "


def part_of(frame: str) -> str | None:
    """The part to which a Python frame such as "nmt/model/lstm.py(73): forward" belongs."""
    if "nmt/" not in frame:
        return None
    return next((part for part, pattern in PARTS.items() if re.search(pattern, frame)), None)


def milliseconds_by_part(events: Iterable[Event]) -> dict[str, float]:
    """Time of all kernels and copies of a trace, by part."""
    events = [event for event in events if event.get("ph") == "X"]
    device = [event for event in events if event["cat"] in _ON_DEVICE]
    host = [event for event in events if event["cat"] in ("cpu_op", "python_function", *_LAUNCHES)]
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in host:
        threads[event["tid"]].append(event)
    part_of_launch: dict[int, str | None] = {}
    part_of_forward: dict[int, str | None] = {}
    sequence_of_launch: dict[int, int] = {}
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_events: list[Event] = []
        for event in thread:
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            if event["cat"] in _LAUNCHES:
                launch = event["args"].get("correlation")
                part_of_launch[launch] = _innermost(open_events)
                sequences = [each["args"]["Sequence number"] for each in open_events if _is_backward(each)]
                if sequences:
                    sequence_of_launch[launch] = sequences[-1]
                continue
            sequence = event["args"].get("Sequence number")
            in_backward = any(_is_backward(each) for each in (*open_events, event))
            if event["cat"] == "cpu_op" and sequence is not None and not in_backward:
                # Operations that need no gradient share the number of the next one that does.
                part_of_forward[sequence] = _innermost(open_events)
            open_events.append(event)
    sums: dict[str, float] = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in device:
        launch = event["args"].get("correlation")
        part = part_of_launch.get(launch) or part_of_forward.get(sequence_of_launch.get(launch, -1))
        sums[part or "other"] += event["dur"] / 1e3
    return sums


def _is_backward(event: Event) -> bool:
    return event["name"].startswith(_BACKWARD) and "Sequence number" in event["args"]


def _innermost(open_events: list[Event]) -> str | None:
    parts = (part_of(event["name"]) for event in reversed(open_events) if event["cat"] == "python_function")
    return next((part for part in parts if part), None)


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step, of its parts, and idle: means over three steps."""
    config, vocabulary, steps, shape = prepare(case, updates=3)
    updater = make_updater(config, vocabulary, device)
    run_updates(updater, steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], with_stack=True) as profiler:
        run_updates(updater, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    parts = {part: sum_ms / len(steps) for part, sum_ms in milliseconds_by_part(events).items()}
    steps = fitted(steps, shape)
    run_updates(updater, steps)
    ms = min(run_updates(updater, steps) for _ in range(5)) * 1e3 / len(steps)
    busy = min(busy_milliseconds(lambda: run_updates(updater, steps)) / len(steps), ms)
    # Recorded and other steps may differ a little; the parts of a recorded one are unknown, but their sum is not.
    scale = busy / sum(parts.values())
    return {
        "ms": round(ms, 2),
        "parts": {part: round(value * scale, 2) for part, value in parts.items()},
        "idle": round(ms - busy, 2),
        "scale": round(scale, 3),
    }


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the figures, as JSON")
    parser.add_argument("--commit", default="", help="named in the file")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    set_float32_products(device, "auto")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"commit": options.commit, "steps": {}}
    for name in ("GNMT v2, batch 128", "GNMT v2, batch 512", "no MoE", "MoE-32", "MoE-512"):
        free_memory()
        figures = found["steps"][name] = measure(CASES[name], device)
        shown = ", ".join(f"{part} {value:.2f}" for part, value in figures["parts"].items())
        print(f"{name}: {figures['ms']:.1f} ms; {shown}; idle {figures['idle']:.2f}; x {figures['scale']}", flush=True)
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
