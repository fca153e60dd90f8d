"""scripts/bench/step.py and profile_step.py: which part of the network a kernel belongs to, and the picture of it."""

import json
import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nmt.model.loss import output_logits
from tests.scripts import load_script

step = load_script("scripts/bench/step.py")
drawing = load_script("scripts/results/profile_step.py")


def as_kernels(events: list[dict], name: str) -> list[dict]:
    """A launch, and a kernel of one millisecond, within each operation of this name in a trace of the CPU."""
    found = []
    for number, event in enumerate(each for each in events if each.get("cat") == "cpu_op" and each["name"] == name):
        same = {"ph": "X", "args": {"correlation": number}}
        middle = event["ts"] + event["dur"] / 2
        found.append(same | {"cat": "cuda_runtime", "name": "launch", "ts": middle, "dur": 0, "tid": event["tid"]})
        found.append(same | {"cat": "kernel", "name": name, "ts": middle + 9, "dur": 1000.0, "tid": 7})
    return found


def test_a_gradients_kernels_belong_to_the_part_that_computed_the_value(tmp_path: Path):
    x, own, weight = (torch.randn(3, 3, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as profiler:
        # One product of this file, whose gradient needs two; one of the softmax layer, likewise.
        output_logits(x @ own, weight, None).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    parts = step.milliseconds_by_part(events + as_kernels(events, "aten::mm"))
    assert {part: ms for part, ms in parts.items() if ms} == {"softmax": 3.0, "other": 3.0}


def test_the_innermost_file_counts():
    frames = ["nmt/training/optim.py(3): a", "nmt/model/kernels/lstm_triton.py(9): b", "torch/nn/lstm.py(1): c"]
    stack = [{"cat": "python_function", "name": name} for name in frames]
    assert step._innermost(stack) == "LSTM"
    assert step._innermost(stack[:1]) == "optimiser"
    assert step._innermost([]) is None


def test_every_kernel_file_belongs_to_a_part():
    folder = Path(__file__).parents[1] / "nmt" / "model" / "kernels"
    for path in folder.glob("[a-z]*.py"):
        if path.stem in ("threads", "packed", "mixing", "top_k", "top_k_triton"):
            continue  # of the CPU, or of a search
        assert step.part_of(f"{path}(1): f"), path


def test_a_bar_is_as_long_as_the_step():
    parts = dict.fromkeys(step.PARTS, 2.0) | {"other": 1.0}
    before = {"commit": "0123456789", "steps": {"a < b": {"ms": 15.0, "parts": parts, "idle": 2.0}, "only": {}}}
    half = {part: ms / 2 for part, ms in parts.items()}
    after = {"commit": "abcdef", "steps": {"a < b": {"ms": 7.5, "parts": half, "idle": 1.0}}}
    svg = drawing.picture(before, after)
    assert "a &lt; b" in svg
    assert "only" not in svg
    widths = dict.fromkeys(re.findall(r'y="(\d+)" width="[\d.]+" height="18"', svg), 0.0)
    for y, width in re.findall(r'y="(\d+)" width="([\d.]+)" height="18"', svg):
        widths[y] += float(width)
    long, short = widths.values()
    assert abs(long - 2 * short) < 1.0


def test_the_picture_is_what_its_figures_give():
    if (drawing.STEPS / "after.json").is_file():
        assert drawing.PICTURE.read_text() == drawing.picture(*drawing.read()), "run scripts/results/profile_step.py"
