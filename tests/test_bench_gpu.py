"""scripts/bench/gpu.py: its networks and batches exist as described. The figures need a GPU. And their tables."""

import json

import pytest

from nmt.batch import fit
from tests.scripts import load_script

script = load_script("scripts/bench/gpu.py")
speed = load_script("scripts/results/speed.py")


@pytest.mark.parametrize("name", script.CASES)
def test_the_shape_of_a_case_holds_its_updates(name: str):
    case = script.CASES[name]
    config, vocabulary, steps, shape = script.prepare(case, updates=2)
    assert case.against in ("", *script.CASES)
    for step in steps:
        assert len(step) == (1 if case.sentences else config.training.micro_batches)
        for batch in step:
            assert fit(batch, shape).num_target_tokens == batch.num_target_tokens
            assert vocabulary > batch.source_N.max() >= 4
    rows = sum(batch.num_source_tokens + batch.num_target_tokens for step in steps for batch in step)
    if not case.sentences:
        assert 0.85 * 65536 <= rows / len(steps) <= 65536


def test_one_length_and_many():
    lengths = [
        {int(length) for step in script.prepare(script.CASES[name], 2)[2] for length in step[0].source.length_B}
        for name in ("MoE-32, one length", "MoE-32")
    ]
    assert len(lengths[0]) == 1
    assert len(lengths[1]) > 30


def a_bench() -> dict:
    """What the benchmark would write."""
    figures = {"tflops": 200.0, "ms_per_update": 50.0, "idle": 0.01, "padding": 0.05, "memory_gb": 8.0}
    found = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130"}
    found["ceilings"] = {"matmul_tflops": 800.0, "copy_tbs": 3.0}
    for number, name in enumerate(script.CASES, start=1):
        found[name] = figures | {"tokens_per_second": 199_500.0 * number}
    return found | {"MoE layer, E = 64, 8192 tokens": {"ms": 1.2, "bound_ms": 0.6, "dense_pair_ms": 0.9}}


def test_every_case_has_a_row():
    old = json.loads(speed.RESULTS.read_text())
    training, layer, *others = speed.with_bench(old, a_bench(), "abc")["tables"]
    assert others == old["tables"][2:]
    assert [row["training"] for row in training["rows"]] == [speed.LABELS[name] for name in speed.LABELS]
    assert speed.LABELS.keys() == script.CASES.keys()
    against = {row["training"]: row["against"] for row in training["rows"] if "against" in row}
    assert against[speed.LABELS["GNMT v2, batch 128"]] == "1.00 x NVIDIA's code on an H100"
    assert against[speed.LABELS["MoE-32"]] == "1.25 x with 32 experts, all sentences of one length"
    assert layer["rows"] == [{"tokens": 8192, "experts": 64, "ms": 1.2, "bound": 0.6, "ratio": 2.0, "dense": 0.9}]


def test_nvidias_figure_is_that_of_the_card():
    name = "GNMT v2, batch 512"
    found = {name: {"tokens_per_second": 1_004_200.0}}
    assert script.comparison(name, found, "NVIDIA H200").startswith("2.00 x")
    assert script.comparison(name, found, "NVIDIA A100") == ""
