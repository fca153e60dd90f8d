"""The cost model against the real network, against torch's own counter, and against the papers' figures."""

import itertools
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import TINY_VOCAB
from torch.utils.flop_counter import FlopCounterMode

from nmt.batch import Batch
from nmt.config import AttentionConfig, ModelConfig, MoEConfig
from nmt.config.model import ATTENTION_FUNCTIONS, BOTTOM_LAYERS, WIRINGS
from nmt.evaluation.compute import Cost, model_cost
from nmt.model.gating import balance_loss
from nmt.model.seq2seq import Seq2Seq

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]


def part_of(name: str) -> str:
    """The part of the cost model that a parameter of the network belongs to."""
    parts = {
        r"(source|target)_embedding": "embeddings",
        r"output": "softmax",
        r"decoder\.attention": "attention",
        r"decoder\.context": "context projection",
        r"encoder\.moe_layers\..*\.experts": "encoder experts",
        r"decoder\.moe_layers\..*\.experts": "decoder experts",
        r"encoder\.moe_layers\..*\.gate": "encoder gates",
        r"decoder\.moe_layers\..*\.gate": "decoder gates",
        r"encoder\.(bottom|upper)": "encoder LSTMs",
        r"decoder\.(bottom|upper)": "decoder LSTMs",
    }
    (part,) = [part for pattern, part in parts.items() if re.match(pattern, name)]
    return part


@pytest.mark.parametrize(("wiring", "bottom"), list(itertools.product(WIRINGS, BOTTOM_LAYERS)))
def test_every_part_has_the_parameters_of_the_real_network(tiny_config: Configs, wiring: str, bottom: str):
    for function, tied, num_experts, more in itertools.product(
        ATTENTION_FUNCTIONS, (True, False), (0, 5), (True, False)
    ):
        config = tiny_config(
            wiring=wiring,
            bottom_layer=bottom,
            function=function,
            tie_embeddings=tied,
            num_experts=num_experts,
            output_bias=more,
            cell_size=8 if more else 6,
            num_decoder_layers=3 if more else 1,
            encoder_moe_after=[2, 3] if more else [],
        )
        with torch.device("meta"):
            model = Seq2Seq(config, TINY_VOCAB)
        counted: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            counted[part_of(name)] += parameter.numel()
        cost = model_cost(config, TINY_VOCAB)
        assert Counter(cost.parameters) == counted, config
        assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_ops_are_the_sum_of_their_parts(tiny_config: Configs):
    cost = model_cost(tiny_config(), TINY_VOCAB)
    parts = [*cost.encoder_ops.values(), *cost.decoder_ops.values()]
    assert all(part > 0 for part in parts)
    assert cost.ops_per_timestep == sum(parts)


def paper_config(num_experts: int = 32) -> ModelConfig:
    """S17 appendix E, as paper.md 1.9 derives it: five LSTMs, the context enters one, three tables."""
    return ModelConfig(
        bottom_layer="forward",
        tie_embeddings=False,
        dropout=0.4,
        attention=AttentionConfig(wiring="feedback"),
        moe=MoEConfig(num_experts=num_experts, output="sigmoid"),
    )


def gnmt_config() -> ModelConfig:
    """W16: 8 + 8 layers of 1024 without projection, residual connections from the third."""
    return ModelConfig(
        hidden_size=1024,
        cell_size=1024,
        num_encoder_layers=8,
        num_decoder_layers=8,
        bottom_layer="bidirectional_full",
        residual_from=3,
        tie_embeddings=False,
        attention=AttentionConfig(function="additive", wiring="gnmt"),
        moe=MoEConfig(num_experts=0),
    )


@pytest.mark.parametrize(("vocab_size", "millions"), [(32000, 85.1), (32768, 85.5)])
def test_the_paper_s_model_takes_85m_ops(vocab_size: int, millions: float):
    cost = model_cost(paper_config(), vocab_size)
    assert round(cost.ops_per_timestep / 1e6, 1) == millions
    lstm, with_context, expert = 9_437_184, 13_631_488, 2_097_152
    assert cost.encoder_ops["encoder LSTMs"] == 3 * lstm
    assert cost.decoder_ops["decoder LSTMs"] == lstm + with_context
    assert cost.encoder_ops["encoder experts"] == cost.decoder_ops["decoder experts"] == 4 * expert
    assert cost.parameters["encoder experts"] == 32 * expert


def test_the_paper_s_baseline_without_experts_takes_about_68m_ops():
    cost = model_cost(paper_config(num_experts=0), 32000)
    assert 67.8 < cost.ops_per_timestep / 1e6 < 68.5


def test_2048_experts_have_8_7_billion_parameters():
    cost = model_cost(paper_config(num_experts=2048), 32000)
    assert round(cost.num_parameters / 1e9, 1) == 8.7


def lstm_biases(config: ModelConfig) -> int:
    directions = 1 if config.bottom_layer == "forward" else 2
    return 8 * config.cell_size * (directions + config.num_encoder_layers - 1 + config.num_decoder_layers)


def test_gnmt_takes_214m_ops_and_has_278m_parameters():
    """The papers' 278M leaves out biases and the attention's own matrices (paper.md 1.9)."""
    config = gnmt_config()
    cost = model_cost(config, 32000)
    assert round(cost.ops_per_timestep / 1e6) == 214
    weights = cost.num_parameters - lstm_biases(config)
    assert round((weights - cost.parameters["attention"]) / 1e6, 2) == 278.66
    assert cost.parameters["attention"] == 2 * 1024 * 512 + 512


@pytest.mark.parametrize(("hidden", "weights"), [(2048, 2_097_152), (1024, 1_048_576), (8192, 8_388_608)])
def test_unit_sizes_of_experts(hidden: int, weights: int):
    def parameters(num_experts: int) -> Cost:
        moe = MoEConfig(num_experts=num_experts, hidden_sizes=[hidden])
        return model_cost(ModelConfig(moe=moe, decoder_moe_after=[]), 32000)

    more, less = parameters(5), parameters(4)
    assert less.parameters["encoder experts"] == 4 * weights
    gate = 2 * 512
    assert more.num_parameters - less.num_parameters == weights + gate
    # More experts cost nothing but their column in the gate: k of them work.
    assert more.ops_per_timestep - less.ops_per_timestep == gate


def measured_flops(model: Seq2Seq, batch: Batch) -> tuple[int, Gates]:
    """Matrix products of one training pass. On a CPU torch's float64 LSTM is made of products it counts."""
    with FlopCounterMode(display=False) as counter:
        out = model(batch, label_smoothing=0.1)
        balance = sum(balance_loss(gate.sums, 0.1, 0.1) + gate.own_loss for gate in out.gates.values())
        (out.loss + balance).backward()
    return counter.get_total_flops(), out.gates


def uncounted_flops(config: ModelConfig, batch: Batch, gates: Gates) -> int:
    """Products that the network does and `training_flops` does not have (or the other way round), one by one."""
    sentences, width = batch.pairs_B.numel(), config.hidden_size
    # Nobody asks for the gradient of an LSTM's initial zero state: one product per LSTM.
    lstms = [size for sizes in lstm_sizes(config).values() for size in sizes]
    difference = -sum(2 * sentences * 4 * cells * outputs for _, cells, outputs in lstms)
    if config.attention.wiring in ("feedback", "gnmt"):
        # Nor for that of the first position's query, which is zero.
        difference -= 2 * sentences * width * config.attention.size
    for name, gate in gates.items():
        # Weighing the experts' outputs by their gates is a product in the forward pass; element-wise in the count.
        difference += 2 * gate.gates_TK.numel() * width
        if config.moe.gating == "hierarchical":
            # The logits of all groups are computed in one product; the paper's count has those of the chosen ones.
            num_experts = config.moe.experts_at(name)
            chosen = config.moe.primary_k * num_experts // config.moe.branching
            difference += 6 * len(gate.gates_TK) * 2 * width * (num_experts - chosen)
    return difference


def assert_flops_are_those_measured(config: ModelConfig, batch: Batch) -> None:
    """Exactly equal after `uncounted_flops`, for sentences without padding."""
    measured, gates = measured_flops(Seq2Seq(config, TINY_VOCAB).double(), batch)
    sizes = batch.num_source_tokens, batch.num_target_tokens, batch.pairs_B.numel()
    counted = model_cost(config, TINY_VOCAB).training_flops(*sizes)
    assert measured == counted + uncounted_flops(config, batch, gates)


@pytest.mark.parametrize("wiring", ["parallel", "gnmt_v2"])
@pytest.mark.parametrize("num_experts", [0, 3, 9])
@pytest.mark.parametrize("bottom", BOTTOM_LAYERS)
def test_training_flops_are_those_measured(
    tiny_config: Configs, tiny_batch: Batches, bottom: str, num_experts: int, wiring: str
):
    config = tiny_config(wiring=wiring, num_experts=num_experts, bottom_layer=bottom, k=3)
    assert_flops_are_those_measured(config, tiny_batch(*[(4, 6)] * 4))


@pytest.mark.parametrize("wiring", ["feedback", "gnmt"])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_training_flops_of_the_feedback_wirings(
    tiny_config: Configs, tiny_batch: Batches, num_experts: int, wiring: str
):
    assert_flops_are_those_measured(tiny_config(wiring=wiring, num_experts=num_experts), tiny_batch(*[(9, 19)] * 4))


@pytest.mark.parametrize("moe", GATES, ids=name_of)
def test_training_flops_of_every_gate_and_of_deep_experts(tiny_config: Configs, tiny_batch: Batches, moe: MoEConfig):
    assert_flops_are_those_measured(replace(tiny_config(), moe=moe), tiny_batch(*[(5, 11)] * 4))


@pytest.mark.parametrize("moe", GATES, ids=name_of)
def test_training_flops_are_within_2_percent_as_they_stand(moe: MoEConfig):
    """At sizes where gates and edges weigh little, nothing needs to be explained: what is left is below 2 %."""
    moe = replace(moe, hidden_sizes=[8 * size for size in moe.hidden_sizes])
    config = ModelConfig(32, 32, dropout=0.0, attention=AttentionConfig(size=32), moe=moe)
    rng = np.random.default_rng(1)
    sides = [[rng.integers(4, 200, size=length) for _ in range(4)] for length in (23, 29)]
    batch = make_batch(np.arange(4), *sides)
    measured, _ = measured_flops(Seq2Seq(config, 200).double(), batch)
    counted = model_cost(config, 200).training_flops(batch.num_source_tokens, batch.num_target_tokens, 4)
    assert measured == pytest.approx(counted, rel=0.02)
