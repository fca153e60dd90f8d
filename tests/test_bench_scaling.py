"""scripts/bench/scaling.py: what it refuses and counts; and, slow, a whole run of two processes."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nmt.model.gating import GateSums
from tests.scripts import load_script

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("scripts/bench/scaling.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 0 --small", "'0' is no whole number of at least 1"),
        ("--processes 1,x --small", "'x' is no whole number"),
        ("--processes 3 --small training.device=cpu --global-tokens 999 --experts 8", "8 experts and 3 processes"),
        ("--processes 3 --small training.device=cpu", "--global-tokens 1024 cannot be divided among 3 processes"),
        ("--processes 2 --small training.device=cpu parallel.expert_group_size=4", "an expert group's 4 processes"),
        ("--processes 2 --small model.nope=1", "unknown setting model.nope"),
        ("--processes 2 --small --experts 8 model.moe.k=9", "model.moe.k=9 must lie in 1..num_experts=8"),
        ("--processes 2 --small --output /no/such/folder/x.json", "there is no such folder"),
        ("--nope", "unrecognized arguments: --nope"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: str, message: str, bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error


def test_micro_batches_are_the_same_for_any_number_of_processes(bench: ModuleType) -> None:
    options = bench.read_options(["--small", "--processes", "1,2", "training.device=cpu"])
    first, again, other = (bench.micro_batch(options, 512, 3, number) for number in (1, 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))
    assert not torch.equal(first.source.length_B, other.source.length_B)
    assert first.source.num_positions * first.num_sentences <= 512 < 1.5 * first.num_source_tokens
    assert int(first.source_N.max()) < options.vocabulary


def test_load_is_the_busiest_process_over_the_mean(bench: ModuleType) -> None:
    count_E = torch.tensor([1.0, 2.0, 4.0, 5.0])
    sums = {"encoder.2": GateSums(count_E, count_E, count_E), "decoder.1": GateSums(*[torch.ones(4)] * 3)}
    assert bench.load_of(sums, 2) == pytest.approx(9 / 6)
    assert bench.load_of(sums, 4) == pytest.approx(5 / 3)
    assert bench.load_of({}, 4) == 1.0


def test_only_blocking_collectives_are_watched(bench: ModuleType, group: Any) -> None:
    spans: dict[str, list[Any]] = {}
    before = dist.all_reduce, dist.all_to_all_single
    with bench.watching(CPU, spans):
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(3), async_op=True).wait()
        dist.all_to_all_single(torch.empty(4), torch.ones(4), group=group)
        dist.all_to_all_single(torch.empty(4), torch.ones(4))
        dist.all_to_all_single(torch.empty(4), torch.ones(4), async_op=True).wait()
        dist.all_to_all_single(torch.empty(4), torch.ones(4), async_op=True)
    assert (dist.all_reduce, dist.all_to_all_single) == before
    dist.all_reduce(torch.ones(3))
    assert {kind: len(each) for kind, each in spans.items()} == {"other": 1, "exchange": 3}
    assert bench.seconds_in(spans, "exchange") > 0
    assert bench.seconds_in({}, "exchange") == 0


@pytest.mark.slow
def test_one_and_two_processes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = "--small training.device=cpu --processes 1,2 --experts 0,8"
    brief = "--updates 2 --rounds 1 --steps-equal 5"
    assert bench.main([*what.split(), *brief.split(), "--output", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    out = capsys.readouterr().out
    speed = [record for record in records if record["kind"] == "speed"]
    assert len(speed) == 2 * 2 + 2 * (2 + 3)
    for row in speed:
        alone = row["processes"] == 1
        assert row["tokens_per_second"] > 0
        assert row["load"] >= 1
        assert (row["exchange"] > 0) == (row["experts"] > 0 and not alone)
        assert row["dense"] == 0 or not alone
    (equality,) = (record for record in records if record["kind"] == "equality" and record["processes"] == 2)
    assert equality["difference"] < 1e-5
    assert len({loss for loss in equality["losses"] if math.isfinite(loss)}) == 5
    assert "weak scaling" in out
    assert "strong scaling" in out
