"""Straight-through gates and balancing by biases against loops; what biases bring about.

Letters as in nmt/model/gating.py.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.batch import Batch, make_batch
from nmt.config import Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.model.assemble import assemble
from nmt.model.experts import MoE
from nmt.model.gate_statistics import relative_load
from nmt.model.gating import Gate, HierarchicalGate, make_gate
from nmt.model.kernels.gate import MIN_NOISE_STD, Rule
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.optim import make_optimizer, tensors_to_save
from nmt.training.update import UpdateOutput, Updater
from tests.test_gates import (
    Decision,
    assert_all_close,
    gradients,
    hierarchical_noise,
    largest,
    layer_by_loops,
    moe_config,
    normal_layer,
    randn,
    softmax,
    sum_of_gates,
)
from tests.toy import HARD, saved, train

Configs = Callable[..., ModelConfig]
LEVELS = {
    "hierarchical": (12, 1, 3, 2),
    "hierarchical, one group": (12, 1, 4, 1),
    "hierarchical, two of a group": (12, 2, 3, 2),
}
CHOICES = {"noisy_top_k": (6, 1), "noisy_top_k, three": (6, 3), "softmax_top_k": (6, 1), **LEVELS}
RULES = [
    (choice, biased, straight_through)
    for choice in CHOICES
    for biased, straight_through in ((True, False), (False, True), (True, True))
    if not straight_through or CHOICES[choice][1] == 1
]


def one_level(
    x_D: Tensor,
    w_gate_DN: Tensor,
    w_noise_DN: Tensor | None,
    noise_N: Tensor | None,
    bias_N: Tensor,
    k: int,
    through: bool,
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """(gates, P(x, i) of every i) of one token; `through`: gates of k = 1 are 1, with the gradient of log p."""
    clean = [x_D @ w_D for w_D in w_gate_DN.T]
    noisy, stds = clean, []
    if noise_N is not None and w_noise_DN is not None:
        stds = [F.softplus(x_D @ w_D) + MIN_NOISE_STD for w_D in w_noise_DN.T]
        noisy = [mean + noise * std for mean, noise, std in zip(clean, noise_N, stds, strict=True)]
    chooses = [logit + bias for logit, bias in zip(noisy, bias_N, strict=True)]
    chosen = largest(chooses, k)
    gates = softmax(noisy, chosen)
    if through and k == 1:
        log_p = softmax(chooses, list(range(len(chooses))))[chosen[0]].log()
        gates = {chosen[0]: 1.0 + log_p - log_p.detach()}
    probs = [torch.tensor(float(i in chosen)) for i in range(len(clean))]
    if stds and len(clean) > k:
        for i, std in enumerate(stds):
            others = chooses[:i] + chooses[i + 1 :]
            kth = others[largest(others, k)[-1]]
            probs[i] = 0.5 * (1.0 + torch.erf((clean[i] + bias_N[i] - kth) / std / math.sqrt(2.0)))
    return gates, probs


def by_loops(gate: Any, x_TD: Tensor, seed: int) -> Decision:
    """What a gate with biases (0 if it has none) should decide after this seed."""
    training, through = gate.training, gate.straight_through and gate.training
    bias_E = torch.zeros(gate.num_experts, dtype=torch.float64) if gate.bias_E is None else gate.bias_E
    if not isinstance(gate, HierarchicalGate):
        noise_TE: Any = [None] * len(x_TD)
        w_noise_DE = getattr(gate, "w_noise_DE", None)
        if training and w_noise_DE is not None:
            generator = torch.manual_seed(seed)
            noise_TE = torch.randn(len(x_TD), gate.num_experts, dtype=torch.float64, generator=generator)
        found = [
            one_level(x_D, gate.w_gate_DE, w_noise_DE, noise_E, bias_E, gate.k, through)
            for x_D, noise_E in zip(x_TD, noise_TE, strict=True)
        ]
        gates = [each[0] for each in found]
        load_E = torch.stack([sum((probs[e] for _, probs in found), torch.zeros(())) for e in range(gate.num_experts)])
        return Decision(gates, sum_of_gates(gates, gate.num_experts), load_E, torch.zeros(()))
    size = gate.num_experts // gate.branching
    bias_A = torch.zeros(gate.branching, dtype=torch.float64) if gate.primary_bias_A is None else gate.primary_bias_A
    noise_TA, noise_TPB = hierarchical_noise(gate, len(x_TD), seed) if training else (None, None)
    primary_load, load, members = ([torch.zeros(())] * n for n in (gate.branching, gate.num_experts, gate.branching))
    decided = []
    for t, x_D in enumerate(x_TD):
        noise_A = None if noise_TA is None else noise_TA[t]
        weights = gate.primary_w_gate_DA, gate.primary_w_noise_DA
        groups, probs = one_level(x_D, *weights, noise_A, bias_A, gate.primary_k, through)
        primary_load = [a + b for a, b in zip(primary_load, probs, strict=True)]
        of_token = {}
        for place, (i, value) in enumerate(groups.items()):
            members[i] = members[i] + 1
            own = slice(i * size, (i + 1) * size)
            noise_B = None if noise_TPB is None else noise_TPB[t, place]
            inner, probs = one_level(
                x_D, gate.w_gate_DE[:, own], gate.w_noise_DE[:, own], noise_B, bias_E[own], gate.k, through
            )
            load[own] = [a + b for a, b in zip(load[own], probs, strict=True)]
            of_token |= {i * size + j: value * each for j, each in inner.items()}
        decided.append(of_token)
    load_h = [primary_load[e // size] * load[e] / max(members[e // size], 1) for e in range(gate.num_experts)]
    return Decision(decided, sum_of_gates(decided, gate.num_experts), torch.stack(load_h), torch.zeros(()))


def layer_of(choice: str, **settings: Any) -> MoE:
    return normal_layer(moe_config(choice.partition(",")[0], *CHOICES[choice], **settings))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("choice", "biased", "straight_through"), RULES)
def test_layer_and_every_gradient_equal_a_loop(
    choice: str, biased: bool, straight_through: bool, training: bool
) -> None:
    moe = layer_of(choice, bias_rate=0.1 * biased, straight_through=straight_through).train(training)
    x_TD, y_direction_TD = randn(9, 5), randn(9, 5).detach()
    torch.manual_seed(5)
    y_TD, gate = moe(x_TD)
    expected = by_loops(moe.gate, x_TD, 5)
    expected_TD = layer_by_loops(moe, x_TD, expected.gates)
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-10)
    torch.testing.assert_close(gate.sums.importance_E, expected.importance_E, rtol=0, atol=1e-12)
    torch.testing.assert_close(gate.sums.load().double(), expected.load_E.double(), rtol=0, atol=1e-10)
    assert [sorted(row) for row in gate.expert_TK.tolist()] == [sorted(each) for each in expected.gates]
    leaves = {"x": x_TD, **{name: each for name, each in moe.named_parameters() if each.requires_grad}}
    assert len(leaves) == len(list(moe.parameters())) + 1 - 2 * biased * ("hier" in choice) - biased * (
        "hier" not in choice
    )
    directions_2E = torch.randn(2, moe.num_experts, dtype=torch.float64)
    total = (y_TD * y_direction_TD).sum() + gate.sums.importance_E @ directions_2E[0]
    oracle = (expected_TD * y_direction_TD).sum() + expected.importance_E @ directions_2E[0]
    if training:
        total, oracle = (
            total + gate.sums.load() @ directions_2E[1].to(gate.sums.load()),
            oracle + expected.load_E.double() @ directions_2E[1],
        )
    assert_all_close(gradients(total, leaves), gradients(oracle, leaves))


@pytest.mark.parametrize("choice", [choice for choice, sizes in CHOICES.items() if sizes[1] == 1])
def test_straight_through_changes_no_bit_of_what_a_gate_decides(choice: str) -> None:
    moe = layer_of(choice).float().train()
    x_TD = torch.randn(50, 5)

    def outputs(straight_through: bool) -> list[Tensor]:
        moe.gate.straight_through = straight_through
        torch.manual_seed(3)
        y_TD, gate = moe(x_TD)
        return [y_TD, gate.expert_TK, gate.gates_TK, *gate.sums.parts()]

    assert all(map(torch.equal, outputs(True), outputs(False)))


def test_the_task_teaches_a_gate_with_one_expert_only_straight_through() -> None:
    for straight_through in (False, True):
        config = moe_config("hierarchical", 8, 1, 4, 1, straight_through=straight_through)
        moe = normal_layer(config).train()
        moe(randn(20, 5).detach())[0].square().sum().backward()
        for name in ("w_gate_DE", "w_noise_DE", "primary_w_gate_DA", "primary_w_noise_DA"):
            assert bool(moe.gate.get_parameter(name).grad.any()) == straight_through, name


def test_fused_forms_are_for_the_paper_s_rule() -> None:
    assert Rule().is_fused
    assert not Rule(straight_through=True).is_fused
    assert not Rule(torch.zeros(3)).is_fused


@pytest.mark.parametrize("choice", CHOICES)
def test_padding_is_no_token_of_any_rule(choice: str) -> None:
    moe = layer_of(choice, bias_rate=0.1, straight_through=CHOICES[choice][1] == 1).eval()
    x_TD, real_T = torch.randn(9, 5, dtype=torch.float64), torch.tensor([True, False] * 4 + [True])
    (y_TD, gate), (real_TD, alone) = moe(x_TD, real_T=real_T), moe(x_TD[real_T])
    torch.testing.assert_close(y_TD[real_T], real_TD)
    assert torch.equal(gate.sums.count_E, alone.sums.count_E)
    torch.testing.assert_close(gate.sums.importance_E, alone.sums.importance_E)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bias_rate": -0.1}, "model.moe.bias_rate=-0.1"),
        (
            {"bias_rate": 0.1, "gating": "strictly_balanced"},
            "bias_rate=0.1 is for .*, not for gating=strictly_balanced",
        ),
        ({"straight_through": True}, "straight_through is for k=1 .* not for k=4"),
        (
            {"straight_through": True, "k": 1, "gating": "strictly_balanced"},
            "not for k=1 with gating=strictly_balanced",
        ),
        ({"copies": 0}, "model.moe.copies=0"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MoEConfig(**settings)


# ----------------------------------------------------------------------------------------------------- balancing


def skewed_gate(**settings: Any) -> tuple[Gate, Tensor]:
    """A gate, and tokens that have much in common, so that most of them choose the same experts."""
    torch.manual_seed(2)
    gate = make_gate(16, 8, MoEConfig(8, **settings))
    for name, parameter in gate.named_parameters():
        if "bias" not in name:
            nn.init.normal_(parameter, std=0.25)
    return gate.train(), torch.randn(2000, 16) + torch.randn(16)


@pytest.mark.parametrize(
    "settings",
    [{"k": 2}, {"k": 1}, {"k": 2, "gating": "softmax_top_k"}, {"k": 1, "gating": "hierarchical", "branching": 4}],
    ids=str,
)
def test_biases_bring_the_largest_load_near_the_mean(settings: dict[str, Any]) -> None:
    gate, x_TD = skewed_gate(bias_rate=0.02, **settings)
    largest_load = [float(relative_load(gate(x_TD).sums.count_E).max())]
    for _ in range(300):
        out = gate(x_TD)
        gate.move_biases(out.sums, 0.02)
        largest_load.append(float(relative_load(out.sums.count_E).max()))
    assert largest_load[0] > 1.7
    assert np.mean(largest_load[-20:]) < 1.15
    # Biases take part in evaluation, and gate values do not know them.
    evaluated = gate.eval()(x_TD)
    assert float(relative_load(evaluated.sums.count_E).max()) < 1.4
    if settings == {"k": 2}:
        logits_TK = (x_TD @ gate.w_gate_DE).gather(1, evaluated.expert_TK)
        torch.testing.assert_close(evaluated.gates_TK, logits_TK.softmax(1))


def batches_of(number: int) -> list[Batch]:
    rng = np.random.default_rng(3)
    sides = [[rng.integers(NUM_SPECIAL, 13, size=n) for n in rng.integers(1, 9, 4 * number)] for _ in range(2)]
    return [make_batch(np.arange(4), *(side[4 * i : 4 * i + 4] for side in sides)) for i in range(number)]


def updates(
    config: ModelConfig, steps: int, micro_batches: int, break_at: int = -1
) -> tuple[Seq2Seq, list[UpdateOutput], list[dict[str, Tensor]]]:
    """The model, what each step returned, and the biases before the first step and after each."""
    torch.manual_seed(1)
    settings = Config(model=config, training=TrainingConfig(precision="fp32", device="cpu"))
    model = Seq2Seq(config, 13).train()
    for name, parameter in model.named_parameters():
        if ".gate.w_" in name or ".gate.primary_w" in name:
            nn.init.normal_(parameter, std=0.5)
    optimizer = make_optimizer(model, settings.training)
    updater = Updater(model, optimizer, settings, World(torch.device("cpu")))

    def biases() -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if "bias_" in n and ".gate." in n}

    done, seen = [], [biases()]
    for step in range(steps):
        if step == break_at:
            model.output.weight.data[0, 0] = math.nan
        done.append(updater.update(batches_of(micro_batches), step + 1, 1e-3))
        seen.append(biases())
    assert not any("bias_" in name and ".gate." in name for name in tensors_to_save(model, optimizer)["training"])
    return model, done, seen


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax_top_k", "hierarchical"])
def test_biases_move_by_the_counts_of_whole_steps(
    tiny_config: Configs, monkeypatch: pytest.MonkeyPatch, gating: str, micro_batches: int, balanced: bool
) -> None:
    weights = {} if balanced else {"w_importance": 0.0, "w_load": 0.0}
    levels = {"branching": 3, "primary_k": 2, "k": 1} if gating == "hierarchical" else {}
    config = tiny_config(gating=gating, num_experts=6, bias_rate=0.01, **weights, **levels)
    counted: dict[int, list[list[int]]] = {}
    forward = Gate.forward

    def watched(gate: Gate, *arguments: Any) -> Any:
        out = forward(gate, *arguments)
        counted.setdefault(id(gate), []).append(out.expert_TK.flatten().tolist())
        return out

    monkeypatch.setattr(Gate, "forward", watched)
    model, done, seen = updates(config, 4, micro_batches)
    passes = micro_batches * (2 if balanced and micro_batches > 1 else 1)
    for layer, moe in model.moe_layers().items():
        prefix = next(name for name, each in model.named_modules() if each is moe)
        expected = [0.0] * 6
        of_groups = [0.0] * 3
        for step in range(4):
            chosen = [e for slots in counted[id(moe.gate)][step * passes : (step + 1) * passes] for e in slots]
            counts = [chosen.count(e) for e in range(6)]
            assert len(set(counts)) > 1
            if micro_batches == 1:
                assert done[step].sums[layer].count_E.tolist() == counts
            groups = [counts[2 * a] + counts[2 * a + 1] for a in range(3)]
            for e in range(6):
                mean = sum(counts) / 6 if gating != "hierarchical" else groups[e // 2] / 2
                expected[e] += 0.01 * np.sign(mean - counts[e])
            of_groups = [
                bias + 0.01 * np.sign(sum(groups) / 3 - count) for bias, count in zip(of_groups, groups, strict=True)
            ]
            now = seen[step + 1]
            assert now[f"{prefix}.gate.bias_E"].tolist() == pytest.approx(expected, abs=1e-7)
            if gating == "hierarchical":
                assert now[f"{prefix}.gate.primary_bias_A"].tolist() == pytest.approx(of_groups, abs=1e-7)


def test_a_skipped_step_moves_no_bias(tiny_config: Configs) -> None:
    _, done, seen = updates(tiny_config(bias_rate=0.01), 3, 2, break_at=2)
    assert [float(each.skipped) for each in done] == [0.0, 0.0, 1.0]
    for name in seen[0]:
        assert not torch.equal(seen[2][name], seen[1][name])
        assert torch.equal(seen[3][name], seen[2][name])


def test_biases_have_no_gradient_in_a_model_from_a_checkpoint_either(tiny_config: Configs) -> None:
    config = tiny_config(bias_rate=0.01)
    tensors = {name: parameter.detach() for name, parameter in Seq2Seq(config, 13).named_parameters()}
    for model in (Seq2Seq(config, 13), assemble(config, 13, tensors)):
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == [
            f"{side}.moe_layers.moe.{place}.gate.bias_E" for side, place in (("encoder", 2), ("decoder", 1))
        ]


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["noisy_top_k", "hierarchical"])
def test_a_run_with_biases_resumes_to_the_bit(corpus: Any, gating: str) -> None:
    changes = [*HARD, f"model.moe.gating={gating}", "model.moe.bias_rate=0.01"]
    changes += ["model.moe.branching=2", "model.moe.k=1", "model.moe.straight_through=true"] * (
        gating == "hierarchical"
    )
    whole = saved(train(corpus, "whole", 6, *changes))
    for steps in (2, 5, 6):
        run = train(corpus, "stopped", steps, *changes)
    assert saved(run) == whole
    biases = [
        np.frombuffer(each, np.float32) for name, each in whole["model"].items() if "bias_" in name and "gate" in name
    ]
    assert len(biases) == (4 if gating == "hierarchical" else 2)
    assert any(each.any() for each in biases)
