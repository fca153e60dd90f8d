"""scripts/results/routing.py: how much of a run's routing stays between checkpoints."""

from pathlib import Path

import pytest
import torch

from nmt.run import RunDirectory
from tests.scripts import load_script
from tests.toy import train

script = load_script("scripts/results/routing.py")


def test_experts_count_whatever_slots_they_are_in():
    before_TK, after_TK = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 5]])
    assert script.kept_share(before_TK, before_TK) == 1.0
    assert script.kept_share(before_TK, after_TK) == 0.75
    assert script.kept_share(before_TK, before_TK + 10) == 0.0


@pytest.mark.slow
def test_a_run_has_a_share_for_each_checkpoint(corpus: Path):
    folder = train(
        corpus,
        "settling",
        15,
        "training.validate_every=5",
        "training.checkpoint_every=5",
        "training.keep_checkpoints=9",
    )
    found = script.routing(RunDirectory(folder), 5)
    assert found["layers"]
    for layer in found["layers"].values():
        assert layer["chance"] == 0.5  # two of four experts
        assert list(layer["next"]) == list(layer["last"]) == [5, 10]
        assert all(0 <= share <= 1 for share in (*layer["next"].values(), *layer["last"].values()))
        assert layer["next"][10] == layer["last"][10]
