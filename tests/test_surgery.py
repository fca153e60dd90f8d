"""More and fewer experts: what must not change does not, and what is measured is what loops measure."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nmt.experts.observe
from nmt.batch import Batch
from nmt.config import DecodingConfig, ModelConfig, MoEConfig
from nmt.decoding.translator import Translator
from nmt.experts.grow import grow
from nmt.experts.observe import ExpertUse, output_similarity, use_of
from nmt.experts.shrink import (
    MergePair,
    aligned_units,
    greedy_matching,
    idle,
    least_useful,
    merge,
    prune,
    redundant_pairs,
)
from nmt.experts.surgery import NetworkWeights, TrainedWeight, select_experts
from nmt.model.experts import MoE
from nmt.model.seq2seq import Seq2Seq
from nmt.tokens import BOS, NUM_SPECIAL, PAD, UNK
from nmt.training.optim import state_shapes
from tests.conftest import TINY_VOCAB

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]
HIERARCHICAL = {"gating": "hierarchical", "num_experts": 6, "branching": 3, "primary_k": 2, "k": 1}


def network(config: ModelConfig, dtype: torch.dtype = torch.float64, kind: str = "adam") -> NetworkWeights:
    """Random weights, large enough that experts and gates matter, and random moments of an optimiser of this kind."""

    def weight(name: str, like: Tensor) -> TrainedWeight:
        value = torch.randn_like(like, dtype=dtype) * 0.4
        if not like.requires_grad:
            return TrainedWeight.new(value)
        shapes = state_shapes(name, like.shape, kind)
        moments = {moment: torch.rand(shape, dtype=dtype) for moment, shape in shapes.items() if moment != "step"}
        return TrainedWeight(value, moments, torch.tensor(9.0))

    model = Seq2Seq(config, TINY_VOCAB)
    return NetworkWeights(config, TINY_VOCAB, {name: weight(name, each) for name, each in model.named_parameters()})


def tensors_of(weight: TrainedWeight) -> dict[str, Tensor]:
    """What goes along with the experts."""
    return {"value": weight.value, **weight.moments}


def pairs_of(ours: TrainedWeight, theirs: TrainedWeight) -> list[tuple[Tensor, Tensor]]:
    """The same tensors of both."""
    mine, others = tensors_of(ours), tensors_of(theirs)
    assert mine.keys() == others.keys()
    return [(mine[name], others[name]) for name in mine]


def in_precision(changed: NetworkWeights, dtype: torch.dtype) -> NetworkWeights:
    """New parameters come in float32."""
    weights = {name: weight.changed(lambda tensor: tensor.to(dtype)) for name, weight in changed.weights.items()}
    return replace(changed, weights=weights)


@torch.no_grad()
def log_probs(model: Seq2Seq, batch: Batch) -> Tensor:
    encoded, _ = model.encode(batch.source_N, batch.source)
    return model.logits(model.decode(batch.target_in_N, batch.target, encoded)[0]).log_softmax(-1)


@pytest.fixture
def batch(tiny_batch: Batches) -> Batch:
    return tiny_batch((5, 4), (9, 7), (1, 3), (7, 9), (12, 2))


# ------------------------------------------------------------------------------------------------------ growing

GROWTHS = {
    "none to 6": ({"num_experts": 0}, [6]),
    "none to 4 to 8": ({"num_experts": 0}, [4, 8]),
    "4 to 8": ({}, [8]),
    "4 to 16": ({}, [16]),
    "4 to 8 to 24": ({}, [8, 24]),
    "all of 3 active, to 6 to 12 to 24": ({"num_experts": 3, "k": 3}, [6, 12, 24]),
    "one active": ({"k": 1}, [8, 16]),
    "deep": ({"hidden_sizes": [7, 5, 4]}, [12, 24]),
    "deep from none": ({"num_experts": 0, "hidden_sizes": [7, 5]}, [4]),
    "hierarchical": (HIERARCHICAL, [12, 36]),
    "sigmoid": ({"output": "sigmoid"}, [8, 16]),
    "biases": ({"bias_rate": 0.1}, [8, 24]),
    "biases, one active": ({"bias_rate": 0.1, "k": 1, "straight_through": True}, [8]),
    "biases of groups": (HIERARCHICAL | {"bias_rate": 0.1}, [12, 36]),
    "several layers": ({"encoder_moe_after": [1, 3], "decoder_moe_after": [1, 2]}, [12]),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", GROWTHS)
def test_growing_changes_no_probability(
    tiny_config: Configs, batch: Batch, case: str, dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    changes, sizes = GROWTHS[case]
    before = network(tiny_config(tie_embeddings=tied, **changes), dtype)
    expected = log_probs(before.build(), batch)
    after = before
    for size in sizes:
        after = in_precision(grow(after, size, seed=1), dtype)
        assert all(after.config.moe.experts_at(layer) == size for layer in after.config.moe_layer_names())
        torch.testing.assert_close(log_probs(after.build(), batch), expected, rtol=0, atol=tolerance)


def test_a_search_finds_the_same(tiny_config: Configs) -> None:
    rng = np.random.default_rng(2)
    sources = [rng.integers(NUM_SPECIAL, TINY_VOCAB, size) for size in (3, 8, 5, 1)]
    before = network(tiny_config())
    found = []
    for each in (before, grow(before, 8, 1), grow(grow(before, 8, 1), 16, 2)):
        model = in_precision(each, torch.float64).build()
        subwords: Any = SimpleNamespace(forbidden_ids=[PAD, UNK, BOS], reserved_ids=lambda kind: range(0))
        translator = Translator(model, subwords, DecodingConfig(beam_size=3), torch.device("cpu"))
        found.append([best for (best,) in translator.searcher.search(sources, translator.options)])
    for other in found[1:]:
        assert [each.tokens for each in other] == [each.tokens for each in found[0]]
        assert [each.score for each in other] == pytest.approx([each.score for each in found[0]], abs=1e-9)


def of_copies(weight: TrainedWeight, copies: int, dim: int) -> dict[str, Tensor]:
    """What `copies` copies of each expert should have: all of it, but the first moment in copy 0 only."""
    tensors = {name: tensor.repeat_interleave(copies, dim) for name, tensor in tensors_of(weight).items()}
    if "exp_avg" in tensors:
        index = torch.arange(tensors["exp_avg"].shape[dim])
        tensors["exp_avg"].index_fill_(dim, index[index % copies != 0], 0.0)
    return tensors


@pytest.mark.parametrize("kind", ["adam", "factored"])
def test_copies_keep_weights_and_second_moments_and_the_old_gate_chooses_groups(
    tiny_config: Configs, kind: str
) -> None:
    before = network(tiny_config(), kind=kind)
    after = grow(before, 12, seed=1)
    old, new = before.layer("encoder.2"), after.layer("encoder.2")
    for place in range(2):
        name = f"experts.weights.{place}"
        expected = of_copies(old[name], 3, dim=0)
        assert tensors_of(new[name]).keys() == expected.keys()
        assert all(torch.equal(tensors_of(new[name])[moment], each) for moment, each in expected.items())
        assert new[name].step == 9
    for part in ("gate", "noise"):
        assert new[f"gate.primary_w_{part}_DA"] is old[f"gate.w_{part}_DE"]
        fresh = new[f"gate.w_{part}_DE"]
        assert (fresh.moments, fresh.step) == ({}, 0)
    assert new["gate.w_noise_DE"].value.count_nonzero() == 0
    assert new["gate.w_gate_DE"].value.count_nonzero() == 6 * 12
    others = [name for name in before.weights if "moe" not in name]
    assert len(others) > 10
    assert all(after.weights[name] is before.weights[name] for name in others)


def test_growing_again_keeps_moments_and_wakes_a_copy_of_the_same_expert(tiny_config: Configs, batch: Batch) -> None:
    before = network(tiny_config(**HIERARCHICAL))
    after = grow(before, 24, seed=3)
    old, new = before.layer("decoder.1"), after.layer("decoder.1")
    for name in ("w_gate_DE", "w_noise_DE"):
        expected = of_copies(old[f"gate.{name}"], 4, dim=1)
        for moment, ours in new[f"gate.{name}"].moments.items():
            assert torch.equal(ours, expected[moment])
        assert new[f"gate.{name}"].step == 9
    assert torch.equal(new["gate.w_noise_DE"].value, old["gate.w_noise_DE"].value.repeat_interleave(4, dim=1))
    gates, grown = before.build().gates(batch), after.build().gates(batch)
    copies = set()
    for layer, gate in gates.items():
        assert torch.equal(grown[layer].expert_TK // 4, gate.expert_TK)
        torch.testing.assert_close(grown[layer].gates_TK, gate.gates_TK)
        copies |= set((grown[layer].expert_TK % 4).flatten().tolist())
    assert copies == {0, 1, 2, 3}


def test_different_tokens_meet_different_copies_without_noise(tiny_config: Configs, batch: Batch) -> None:
    gates = grow(network(tiny_config(hidden_size=32, cell_size=32)), 8, seed=1).build().gates(batch)
    for gate in gates.values():
        smaller = gate.sums.count_E.view(4, 2).amin(1).sum() / gate.sums.count_E.sum()
        assert smaller > 0.15


def test_first_experts_start_as_in_a_new_network_but_for_the_last_matrix(tiny_config: Configs) -> None:
    before = network(tiny_config(num_experts=0, hidden_sizes=[64, 64]), torch.float32)
    state = torch.get_rng_state()
    new = grow(before, 5, seed=4).layer("encoder.2")
    assert torch.equal(torch.get_rng_state(), state)
    assert new["experts.weights.0"].value.std() == pytest.approx((2 / 6) ** 0.5, rel=0.1)
    assert new["experts.weights.1"].value.std() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    zeros = ("experts.weights.2", "gate.w_gate_DE", "gate.w_noise_DE")
    assert all(new[name].value.count_nonzero() == 0 for name in zeros)
    assert all((weight.moments, weight.step) == ({}, 0) for weight in new.values())


def test_grown_twice_without_training_all_copies_of_copies_are_met(tiny_config: Configs, batch: Batch) -> None:
    before = network(tiny_config(hidden_size=32, cell_size=32))
    gates = grow(grow(before, 8, seed=1), 16, seed=1).build().gates(batch)
    shares = sum(gate.sums.count_E.view(4, 4).sum(0) for gate in gates.values())
    assert (shares / shares.sum()).min() > 0.05


# ------------------------------------------------------------------------------------------------------ pruning

GATES = {
    "noisy": {"num_experts": 5},
    "hierarchical": HIERARCHICAL | {"num_experts": 9, "k": 2},
    "strictly balanced": {"gating": "strictly_balanced", "num_experts": 5},
    "biases": {"num_experts": 5, "bias_rate": 0.1},
    "hierarchical, biases": HIERARCHICAL | {"num_experts": 9, "bias_rate": 0.1},
}


def layers_with_inputs(model: Seq2Seq, batch: Batch) -> dict[str, tuple[MoE, Tensor]]:
    inputs = {}
    handles = [
        moe.register_forward_pre_hook(lambda moe, args, layer=layer: inputs.update({layer: (moe, args[0].detach())}))
        for layer, moe in model.moe_layers().items()
    ]
    model.gates(batch)
    for handle in handles:
        handle.remove()
    return inputs


def expert_output(moe: MoE, expert: int, x_D: Tensor) -> Tensor:
    for w_EIO in moe.experts.weights[:-1]:
        x_D = (x_D @ w_EIO[expert]).relu()
    return x_D @ moe.experts.weights[-1][expert]


@pytest.mark.parametrize("kind", GATES)
@torch.no_grad()
def test_use_equals_a_loop(tiny_config: Configs, batch: Batch, kind: str) -> None:
    model = network(tiny_config(hidden_sizes=[7, 4], **GATES[kind])).build()
    for moe, x_TD in layers_with_inputs(model, batch).values():
        gate = moe.gate(x_TD)
        expected = torch.zeros(3, moe.num_experts, dtype=torch.float64)
        for x_D, experts, gates in zip(x_TD, gate.expert_TK.tolist(), gate.gates_TK.tolist(), strict=True):
            for expert, value in zip(experts, gates, strict=True):
                if expert < moe.num_experts:
                    size = float(expert_output(moe, expert, x_D).norm())
                    expected[:, expert] += torch.tensor([1.0, value, value * size], dtype=torch.float64)
        for found, wanted in zip(use_of(moe, x_TD, gate), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gates", [{"num_experts": 12}, HIERARCHICAL | {"num_experts": 24}], ids=["flat", "grouped"])
def test_pruning_experts_that_no_token_chooses_changes_nothing(
    tiny_config: Configs, tiny_batch: Batches, gates: dict[str, Any]
) -> None:
    batch = tiny_batch((3, 2), (2, 3))
    before = network(tiny_config(**gates))
    model = before.build()
    removed = {}
    for layer, gate in model.gates(batch).items():
        unused = (gate.sums.count_E == 0).nonzero().flatten().tolist()
        groups = [[expert for expert in unused if expert * 3 // 24 == group] for group in range(3)]
        fewest = min(map(len, groups))
        removed[layer] = unused if "branching" not in gates else [each for group in groups for each in group[:fewest]]
        assert removed[layer]
    after = prune(before, removed)
    assert all(
        after.config.moe.experts_at(layer) == before.config.moe.num_experts - len(gone)
        for layer, gone in removed.items()
    )
    torch.testing.assert_close(log_probs(after.build(), batch), log_probs(model, batch), rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["adam", "factored"])
@pytest.mark.parametrize("kind", GATES)
def test_what_stays_keeps_weights_columns_and_moments(tiny_config: Configs, kind: str, optimizer: str) -> None:
    before = network(tiny_config(**GATES[kind]), kind=optimizer)
    gone = [0, 5, 7] if kind.startswith("hierarchical") else [1, 3]
    after = prune(before, dict.fromkeys(before.config.moe_layer_names(), gone))
    after.build()
    for layer in before.config.moe_layer_names():
        old, new = before.layer(layer), after.layer(layer)
        kept = [expert for expert in range(before.config.moe.num_experts) if expert not in gone]
        assert old.keys() == new.keys()
        for name in old:
            for ours, theirs in pairs_of(new[name], old[name]):
                if "primary" in name:
                    assert torch.equal(ours, theirs)
                else:
                    assert torch.equal(ours, theirs[kept] if "_D" not in name else theirs[:, kept])


def use(*output: float, load: list[float] | None = None) -> ExpertUse:
    output_E = torch.tensor(output, dtype=torch.float64)
    load_E = torch.ones_like(output_E) if load is None else torch.tensor(load, dtype=torch.float64)
    return ExpertUse(load_E, load_E / 2, output_E)


GROUPED = MoEConfig(6, gating="hierarchical", branching=2, primary_k=1, k=1)


def test_the_least_useful_go() -> None:
    flat = MoEConfig(5, k=2)
    assert least_useful(flat, "encoder.2", use(5, 1, 4, 1, 3), 2) == [1, 3]
    assert least_useful(flat, "encoder.2", use(5, 1, 4, 1, 3), 3) == [1, 3, 4]
    # Of equals, the one with fewer tokens.
    assert least_useful(flat, "encoder.2", use(5, 1, 4, 1, 3, load=[9, 3, 9, 2, 9]), 1) == [3]
    assert least_useful(GROUPED, "encoder.2", use(1, 2, 3, 30, 20, 10), 2) == [0, 5]
    assert least_useful(GROUPED, "encoder.2", use(1, 2, 3, 30, 20, 10), 4) == [0, 1, 4, 5]


def test_idle_is_less_than_a_twentieth_of_an_equal_share() -> None:
    load = [100.0, 5.1, 4.9, 0.0, 390.0]
    assert idle(MoEConfig(5, k=2), "encoder.2", use(5, 1, 4, 1, 3, load=load)) == [2, 3]
    assert idle(MoEConfig(5, k=2), "encoder.2", use(5, 1, 4, 1, 3)) == []
    # As many of each group as the one with the fewest.
    assert idle(GROUPED, "encoder.2", use(1, 1, 1, 1, 1, 1, load=[99, 99, 0, 99, 0, 0])) == [2, 5]
    assert idle(GROUPED, "encoder.2", use(1, 1, 1, 1, 1, 1, load=[99, 99, 9, 99, 0, 0])) == []


@pytest.mark.parametrize(
    ("moe", "task", "says"),
    [
        (MoEConfig(5, k=2), lambda moe: least_useful(moe, "encoder.2", use(1, 2, 3, 4, 5), 4), "would leave 1 of 5"),
        (MoEConfig(5, k=2), lambda moe: least_useful(moe, "encoder.2", use(1, 2, 3, 4, 5), 9), "would leave 0 of 5"),
        (GROUPED, lambda moe: least_useful(moe, "encoder.2", use(*range(6)), 3), "a multiple of .*branching=2"),
        (GROUPED, lambda moe: least_useful(moe, "encoder.2", use(*range(6)), 6), "0 of 3 experts of each group"),
        (MoEConfig(3, k=2), lambda moe: idle(moe, "encoder.2", use(1, 2, 3, load=[9, 0, 0])), "would leave 1 of 3"),
        (
            MoEConfig(4, k=1),
            lambda moe: redundant_pairs(moe, "encoder.2", use(*range(4)), torch.eye(4), 3),
            "make at most 2 pairs",
        ),
        (
            GROUPED,
            lambda moe: redundant_pairs(moe, "encoder.2", use(*range(6)), torch.eye(6), 4),
            "make at most 2 pairs",
        ),
    ],
)
def test_what_cannot_shrink(moe: MoEConfig, task: Callable[[MoEConfig], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task(moe)


# ------------------------------------------------------------------------------------------------------ merging


def permuted_copy(
    weights: dict[str, TrainedWeight], first: int, second: int, orders: list[Tensor]
) -> dict[str, TrainedWeight]:
    """Expert `second` becomes `first` with its hidden units in other orders, moments too; so do the gate's columns."""
    width = weights["experts.weights.0"].value.shape[1]
    around = [torch.arange(width), *orders, torch.arange(width)]
    changed = {name: weight.changed(torch.clone) for name, weight in weights.items()}
    for name, weight in changed.items():
        for moment, tensor in tensors_of(weight).items():
            if name.startswith("experts."):
                place = int(name[-1])
                rows, columns = around[place], around[place + 1]
                match moment:
                    case "exp_avg_sq_row":
                        tensor[second] = tensor[first][rows]
                    case "exp_avg_sq_column":
                        tensor[second] = tensor[first][columns]
                    case _:
                        tensor[second] = tensor[first][rows][:, columns]
            elif "primary" not in name:
                tensor[..., second] = tensor[..., first]
    return changed


@pytest.mark.parametrize("optimizer", ["adam", "factored"])
@pytest.mark.parametrize("hidden_sizes", [[1], [9], [9, 6], [5, 7, 8]], ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_an_expert_merged_with_a_permuted_copy_stays_exactly_what_it_was(
    tiny_config: Configs, hidden_sizes: list[int], kind: str, optimizer: str
) -> None:
    before = network(tiny_config(hidden_sizes=hidden_sizes, **GATES[kind]), torch.float32, optimizer)
    orders = [torch.randperm(size) for size in hidden_sizes]
    layers = {layer: permuted_copy(before.layer(layer), 0, 2, orders) for layer in before.config.moe_layer_names()}
    before = before.with_layers(before.config, layers)
    merged = {layer: [MergePair(0, 2, 1.0, 0.3)] for layer in layers}
    if kind.startswith("hierarchical"):
        merged = {
            layer: [MergePair(0, 2, 1.0, 0.3), MergePair(3, 4, 1.0, 0.6), MergePair(7, 8, 1.0, 0.5)] for layer in layers
        }
    after = merge(before, merged)
    after.build()
    gone = {pair.second for pair in merged["encoder.2"]}
    kept = torch.tensor([expert for expert in range(before.config.moe.num_experts) if expert not in gone])
    for layer in layers:
        expected = select_experts(before.layer(layer), kept)
        for name, weight in after.layer(layer).items():
            # The others, which were no copies of each other, did change.
            for ours, theirs in pairs_of(weight, expected[name]):
                assert torch.equal(
                    *(part[0] if name.startswith("experts.") else part[..., 0] for part in (ours, theirs))
                )
            assert weight.step == (0 if "bias" in name else 9)


@pytest.mark.parametrize("kind", ["adam", "factored"])
@torch.no_grad()
def test_a_merged_layer_computes_what_the_averages_say(tiny_config: Configs, batch: Batch, kind: str) -> None:
    """With one hidden unit there is nothing to align."""
    before = network(tiny_config(num_experts=3, k=2, hidden_sizes=[1]), kind=kind)
    model = before.build()
    after = merge(before, {layer: [MergePair(0, 2, 0.0, 0.25)] for layer in before.config.moe_layer_names()})
    merged = after.build().moe_layers()
    for layer, (moe, x_TD) in layers_with_inputs(model, batch).items():
        w_DE = moe.gate.w_gate_DE
        logits = torch.stack([x_TD @ (w_DE[:, 0] * 0.25 + w_DE[:, 2] * 0.75), x_TD @ w_DE[:, 1]], dim=1)
        first, last = moe.experts.weights
        gates_T2 = logits.softmax(1)
        hidden_TH = (x_TD @ (first[0] * 0.25 + first[2] * 0.75)).relu()
        expected = gates_T2[:, :1] * (hidden_TH @ (last[0] * 0.25 + last[2] * 0.75))
        expected += gates_T2[:, 1:] * ((x_TD @ first[1]).relu() @ last[1])
        torch.testing.assert_close(merged[layer](x_TD)[0], expected)
        for name in ("experts.weights.0", "gate.w_noise_DE"):
            for old, new in pairs_of(before.layer(layer)[name], after.layer(layer)[name]):
                old, new = (old, new) if name.startswith("experts") else (old.T, new.T)
                torch.testing.assert_close(new[0], old[0] * 0.25 + old[2] * 0.75)


def test_a_pair_of_copies_changes_only_tokens_that_woke_both(tiny_config: Configs, batch: Batch) -> None:
    before = network(tiny_config(num_experts=6, k=2, hidden_sizes=[9]))
    order = [torch.randperm(9)]
    before = before.with_layers(
        before.config,
        {layer: permuted_copy(before.layer(layer), 1, 4, order) for layer in before.config.moe_layer_names()},
    )
    pairs = {layer: [MergePair(1, 4, 1.0, 0.5)] for layer in before.config.moe_layer_names()}
    after = merge(before, pairs).build().moe_layers()
    for layer, (moe, x_TD) in layers_with_inputs(before.build(), batch).items():
        with torch.no_grad():
            (old_TD, gate), (new_TD, _) = moe(x_TD), after[layer](x_TD)
        both_T = ((gate.expert_TK == 1) | (gate.expert_TK == 4)).sum(1) == 2
        # Copies tie, so a token that woke one of them woke both unless the other was third.
        alone_T = ~both_T & ((gate.expert_TK == 1) | (gate.expert_TK == 4)).any(1)
        same_T = (new_TD - old_TD).norm(dim=1) < 1e-9
        assert both_T.any()
        assert alone_T.any()
        assert torch.equal(same_T, ~both_T)


def test_units_that_read_the_same_are_told_apart_by_what_they_write() -> None:
    same_DH, out_HD, order_H = torch.ones(3, 8), torch.randn(8, 3), torch.randperm(8)
    (found_H,) = aligned_units([same_DH, out_HD], [same_DH, out_HD[order_H]])
    assert torch.equal(order_H[found_H], torch.arange(8))


def test_greedy_matching_equals_a_loop() -> None:
    for size in (1, 2, 5, 30):
        similarity = torch.randn(size, size)
        left, expected = similarity.clone(), [-1] * size
        for _ in range(size):
            row, column = divmod(int(left.argmax()), size)
            expected[row] = column
            left[row], left[:, column] = -torch.inf, -torch.inf
        assert greedy_matching(similarity).tolist() == expected
    assert sorted(greedy_matching(torch.zeros(6, 6)).tolist()) == list(range(6))


@torch.no_grad()
def test_similarity_is_the_cosine_of_outputs(tiny_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.experts.observe, "_COMPARED_ROWS", 12)
    model = network(tiny_config(hidden_sizes=[7, 3]), torch.float32).build()
    moe, x_TD = model.moe_layers()["encoder.2"], torch.randn(11, 6)
    outputs = [torch.stack([expert_output(moe, expert, x_D) for x_D in x_TD]).flatten() for expert in range(4)]
    expected = [[torch.cosine_similarity(a, b, dim=0) for b in outputs] for a in outputs]
    torch.testing.assert_close(output_similarity(moe, x_TD), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    moe.experts.weights[0][1] = 0
    assert output_similarity(moe, x_TD)[1].tolist() == [0, 0, 0, 0]


def test_pairs_with_the_least_to_lose_are_merged_once_and_within_their_group() -> None:
    """m_i m_j / (m_i + m_j) (1 - cos), by hand."""
    similarity = torch.eye(6)
    for first, second, value in ((0, 4, 0.9), (0, 1, 0.8), (1, 2, 0.7), (3, 5, 0.6), (2, 3, 0.5)):
        similarity[first, second] = similarity[second, first] = value
    equal = use(*[1.0] * 6, load=[30, 10, 1, 1, 10, 0])

    def pairs(moe: MoEConfig, count: int, used: ExpertUse = equal) -> list[tuple[int, int, float]]:
        found = redundant_pairs(moe, "encoder.2", used, similarity, count)
        return [(each.first, each.second, each.share) for each in found]

    flat = MoEConfig(6, k=1)
    assert pairs(flat, 1) == [(0, 4, 0.75)]
    assert pairs(flat, 3) == [(0, 4, 0.75), (1, 2, 10 / 11), (3, 5, 1.0)]
    assert pairs(GROUPED, 2) == [(0, 1, 0.75), (3, 5, 1.0)]
    # 0 and 4 are the most alike, but busy: 4 * 4 / 8 * 0.1 is more than 4 * 0.5 / 4.5 * 0.3.
    assert pairs(flat, 1, use(4.0, 4.0, 0.5, 4.0, 4.0, 4.0))[0][:2] == (1, 2)
    # Who adds nothing goes first, to the one that it is most like.
    assert pairs(flat, 1, use(1.0, 1.0, 1.0, 1.0, 1.0, 0.0))[0][:2] == (3, 5)
    assert redundant_pairs(flat, "x", use(*[0.0] * 6, load=[0] * 6), similarity, 1)[0].share == 0.5
