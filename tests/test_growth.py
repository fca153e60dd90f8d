"""Growth that pays: gates that learn, copies that differ, and what of them starts anew. Exactness: test_surgery.py."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from nmt.batch import Batch
from nmt.config import ModelConfig
from nmt.errors import UserError
from nmt.experts.grow import grow
from nmt.experts.shrink import prune
from tests.test_surgery import HIERARCHICAL, network, pairs_of

Configs = Callable[..., ModelConfig]


@pytest.fixture
def batch(tiny_batch: Callable[..., Batch]) -> Batch:
    return tiny_batch((5, 4), (9, 7), (1, 3), (7, 9), (12, 2))


@pytest.mark.parametrize(("changes", "sizes"), [({}, [12]), (HIERARCHICAL, [12, 36])], ids=["flat", "twice"])
def test_earlier_experts_are_multiples_of_the_number_of_copies(
    tiny_config: Configs, changes: dict[str, Any], sizes: list[int]
) -> None:
    """So the earlier experts are experts[::C], and a setting says what C is."""
    before = network(tiny_config(**changes))
    for size in sizes:
        after = grow(before, size, seed=1)
        copies = size // before.config.moe.num_experts
        assert after.config.moe.copies == copies > 1
        for layer in after.config.moe_layer_names():
            for name, old in before.layer(layer).items():
                if name.startswith("experts."):
                    new = after.layer(layer)[name]
                    assert all(torch.equal(ours[::copies], theirs) for ours, theirs in pairs_of(new, old))
                    assert all(torch.equal(new.value[c::copies], old.value) for c in range(copies))
        before = after
    gone = dict.fromkeys(before.config.moe_layer_names(), [1, 13, 25][: before.config.moe.branching])
    if changes:
        assert prune(before, gone).config.moe.copies == 1


@pytest.mark.parametrize("biased", [False, True])
def test_the_gate_of_a_grown_network_learns_from_the_task(tiny_config: Configs, batch: Batch, biased: bool) -> None:
    """The primary gate too, where it chooses one group. Without the straight-through factor, nothing would."""
    before = network(tiny_config(k=1, bias_rate=0.1 * biased), torch.float32)
    for straight_through in (True, False):
        grown = grow(before, 8, seed=1)
        assert grown.config.moe.straight_through
        grown = replace(
            grown, config=replace(grown.config, moe=replace(grown.config.moe, straight_through=straight_through))
        )
        model = grown.build().train()
        model(batch).loss.backward()
        for moe in model.moe_layers().values():
            for name, parameter in moe.gate.named_parameters():
                if parameter.requires_grad:
                    assert bool(parameter.grad.any()) == straight_through, name


def test_first_experts_learn_after_the_first_step_and_gates_after_the_second(
    tiny_config: Configs, batch: Batch
) -> None:
    weights = {"w_importance": 0.0, "w_load": 0.0}
    grown = grow(network(tiny_config(num_experts=0, **weights), torch.float32), 4, seed=1)
    model = grown.build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    moved: list[set[str]] = []
    for _ in range(3):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
        moved.append({name for name, each in model.named_parameters() if not torch.equal(each, before[name])})
    of_layers = {name for name in before if ".moe_layers." in name}
    assert {name for name in moved[0] if name in of_layers} == {name for name in of_layers if "weights.1" in name}
    assert of_layers <= moved[1]
    assert of_layers <= moved[2]


# ------------------------------------------------------------------------------------------------------ redrawing


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
@pytest.mark.parametrize("changes", [{}, HIERARCHICAL], ids=["flat", "again"])
def test_a_share_of_the_hidden_units_of_new_copies_is_drawn_again(
    tiny_config: Configs, changes: dict[str, Any], share: float
) -> None:
    before = network(tiny_config(**changes | {"hidden_sizes": [40, 24, 60]}))
    count = before.config.moe.num_experts
    plain, redrawn = grow(before, 3 * count, seed=1), grow(before, 3 * count, seed=1, redraw=share)
    assert redrawn.config == plain.config
    for layer in plain.config.moe_layer_names():
        old, new = plain.layer(layer), redrawn.layer(layer)
        # Nothing but the matrices, whose moments stay too.
        for name in old:
            parts = pairs_of(old[name], new[name])
            assert all(torch.equal(*pair) for pair in parts[name.startswith("experts.") :])
        matrices = [f"experts.weights.{place}" for place in range(4)]
        chosen: list[list[set[int]]] = []
        for expert in range(3 * count):
            differs = [old[name].value[expert] != new[name].value[expert] for name in matrices]
            if expert % 3 == 0:
                assert not any(each.any() for each in differs)
                continue
            columns = [{h for h in range(each.shape[1]) if each[:, h].all()} for each in differs[:-1]]
            rows = [{h for h in range(each.shape[0]) if each[h].all()} for each in differs[1:]]
            assert columns == rows or share == 1.0
            sizes = [40, 24, 60]
            assert [len(each) for each in rows] == [round(share * size) for size in sizes]
            for place, each in enumerate(differs):
                inputs = rows[place - 1] if place else set()
                outputs = columns[place] if place < 3 else set()
                expected = torch.zeros_like(each)
                expected[sorted(inputs)] = True
                expected[:, sorted(outputs)] = True
                assert torch.equal(each, expected)
            chosen.append(rows)
        # Each copy has units of its own.
        assert share == 1.0 or all(first != second for first, second in pairwise(chosen))


def test_redrawn_weights_have_the_mean_and_deviation_of_the_matrix(tiny_config: Configs) -> None:
    before = network(tiny_config(hidden_size=64, cell_size=64, hidden_sizes=[200], num_experts=2, k=1))
    for weights in (before.layer(layer) for layer in before.config.moe_layer_names()):
        for place in range(2):
            value = weights[f"experts.weights.{place}"].value
            value[1] = value[1] * 3.0 + 7.0
    after = grow(before, 4, seed=5, redraw=0.5)
    for layer in before.config.moe_layer_names():
        for place in range(2):
            name = f"experts.weights.{place}"
            old, new = before.layer(layer)[name].value, after.layer(layer)[name].value
            for expert in range(2):
                copy = new[2 * expert + 1]
                drawn = copy[copy != old[expert]]
                assert len(drawn) == 100 * 64
                assert float(drawn.mean()) == pytest.approx(
                    float(old[expert].mean()), abs=4 * float(old[expert].std()) / 80
                )
                assert float(drawn.std()) == pytest.approx(float(old[expert].std()), rel=0.05)


def test_what_cannot_be_redrawn(tiny_config: Configs) -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"--redraw .*from 0 to 1"):
            grow(network(tiny_config()), 8, seed=1, redraw=share)
    with pytest.raises(UserError, match="the network has no experts"):
        grow(network(tiny_config(num_experts=0)), 8, seed=1, redraw=0.5)
