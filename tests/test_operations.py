"""The cost model against the real network, against torch's own counter, and against the papers' figures."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nmt.batch import Batch, make_batch
from nmt.compose import compose_config
from nmt.config import AttentionConfig, ModelConfig, MoEConfig
from nmt.config.model import ATTENTION_FUNCTIONS, BOTTOM_LAYERS, GATINGS, WIRINGS
from nmt.cost.operations import LayerCount, lstm_cost, lstm_sizes, model_cost, moe_cost
from nmt.model.gating import balance_loss
from nmt.model.seq2seq import Gates, Seq2Seq
from tests.conftest import TINY_VOCAB
from tests.own_conf import COMPLETE

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


def hierarchical(num_experts: int, branching: int, hidden: int = 2048) -> MoEConfig:
    """Two of the `branching` groups, and two experts of each, work for a token."""
    return MoEConfig(num_experts, hidden_sizes=[hidden], gating="hierarchical", branching=branching, primary_k=2, k=2)


# Every gate, with one hidden layer and with several.
GATES = [
    MoEConfig(8, k=4, hidden_sizes=[7], gating="noisy_top_k"),
    MoEConfig(8, k=4, hidden_sizes=[7, 5, 9], gating="noisy_top_k"),
    MoEConfig(8, k=3, hidden_sizes=[7], gating="softmax_top_k"),
    MoEConfig(4, k=2, hidden_sizes=[7, 3], gating="strictly_balanced"),
    MoEConfig(12, k=2, hidden_sizes=[7], gating="hierarchical", branching=4, primary_k=2),
    MoEConfig(12, k=3, hidden_sizes=[4, 4], gating="hierarchical", branching=3, primary_k=1),
    MoEConfig(9, k=4, hidden_sizes=[7], gating="noisy_top_k", bias_rate=0.001),
    MoEConfig(15, k=1, hidden_sizes=[7], gating="hierarchical", branching=3, primary_k=2, bias_rate=0.001),
]


def name_of(moe: MoEConfig) -> str:
    """Of a case, for pytest."""
    return f"{moe.gating}-{moe.num_experts}-{'-'.join(map(str, moe.hidden_sizes))}"


def assert_every_part_is_right(config: ModelConfig, vocab_size: int) -> None:
    """The counted parameters are those of the real network, part by part. No memory is taken."""
    with torch.device("meta"):
        model = Seq2Seq(config, vocab_size)
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counted[part_of(name)] += parameter.numel()
    cost = model_cost(config, vocab_size)
    assert Counter(cost.parameters) == counted, config
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())


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
        assert_every_part_is_right(config, TINY_VOCAB)


@pytest.mark.parametrize("both", [2, 3])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_and_layers_in_both_directions_have_the_parameters_of_the_real_network(
    tiny_config: Configs, heads: int, both: int
):
    for cells in (6, 8):
        config = tiny_config(size=6, heads=heads, bidirectional_layers=both, cell_size=cells, norm="layers")
        assert_every_part_is_right(config, TINY_VOCAB)


def test_every_gate_is_among_the_cases():
    assert {moe.gating for moe in GATES} == set(GATINGS)


@pytest.mark.parametrize("moe", GATES, ids=name_of)
def test_every_gate_and_deep_experts_have_the_parameters_of_the_real_network(tiny_config: Configs, moe: MoEConfig):
    assert_every_part_is_right(replace(tiny_config(), moe=moe), TINY_VOCAB)
    # Two layers a side, one of which was pruned.
    other = 2 * moe.branching * moe.k if moe.gating == "hierarchical" else moe.num_experts - 1
    moe = replace(moe, num_experts_at={"encoder.3": other})
    assert_every_part_is_right(replace(tiny_config(encoder_moe_after=[1, 3], decoder_moe_after=[2]), moe=moe), 20)


@pytest.mark.parametrize("name", COMPLETE)
def test_every_experiment_has_the_parameters_of_its_network(name: str):
    config = compose_config([f"experiment={name}"])
    assert_every_part_is_right(config.model, config.corpus.subwords.num_pieces)


def test_ops_are_the_sum_of_their_parts(tiny_config: Configs):
    cost = model_cost(tiny_config(), TINY_VOCAB)
    parts = [*cost.encoder_ops.values(), *cost.decoder_ops.values()]
    assert all(part > 0 for part in parts)
    assert cost.ops_per_timestep == sum(parts)


def paper_config(moe: MoEConfig) -> ModelConfig:
    """S17 appendix E: five LSTMs, the context enters one of them, three tables, attention of size 512."""
    attention = AttentionConfig(wiring="feedback")
    return ModelConfig(bottom_layer="forward", tie_embeddings=False, attention=attention, moe=moe)


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
    cost = model_cost(paper_config(MoEConfig(32)), vocab_size)
    assert round(cost.ops_per_timestep / 1e6, 1) == millions
    lstm, with_context, expert = 9_437_184, 13_631_488, 2_097_152
    assert cost.encoder_ops["encoder LSTMs"] == 3 * lstm
    assert cost.decoder_ops["decoder LSTMs"] == lstm + with_context
    assert cost.encoder_ops["encoder experts"] == cost.decoder_ops["decoder experts"] == 4 * expert
    assert cost.parameters["encoder experts"] == 32 * expert


@pytest.mark.parametrize(("num_experts", "branching"), [(512, 16), (512, 32), (2048, 32), (2048, 64)])
def test_the_paper_s_hierarchical_models_take_85m_ops(num_experts: int, branching: int):
    """The paper does not tell the branching for translation; 2048 experts in only 16 groups would make it 86M."""
    cost = model_cost(paper_config(hierarchical(num_experts, branching)), 32000)
    assert round(cost.ops_per_timestep / 1e6) == 85
    if num_experts == 2048:
        assert round(cost.num_parameters / 1e9, 1) == 8.7


def test_a_flat_gate_of_2048_experts_costs_5_percent_more():
    """The paper's 85M are not those of a flat gate: its two matrices alone would make it 89M."""
    cost = model_cost(paper_config(MoEConfig(2048)), 32000)
    assert round(cost.ops_per_timestep / 1e6, 1) == 89.3
    assert round(cost.num_parameters / 1e9, 1) == 8.7


def test_the_multilingual_model_takes_102m_ops():
    """512 experts of 8192 hidden units, k = 2, flat and noisy. The paper's 102M has one matrix of the gates (or none).

    With both, as the paper counts its language models, it would print 103M.
    """
    noisy = MoEConfig(512, k=2, hidden_sizes=[8192])
    softmax = replace(noisy, gating="softmax_top_k")
    millions = {moe.gating: model_cost(paper_config(moe), 32000).ops_per_timestep / 1e6 for moe in (noisy, softmax)}
    assert round(millions["softmax_top_k"]) == 102
    assert round(millions["softmax_top_k"] - 2 * 512 * 512 / 1e6) == 102
    assert round(millions["noisy_top_k"], 1) == 102.9
    assert round(model_cost(paper_config(noisy), 32000).num_parameters / 1e9, 1) == 8.7


def test_the_paper_s_baseline_without_experts_takes_about_68m_ops():
    cost = model_cost(paper_config(MoEConfig(0)), 32000)
    assert 67.8 < cost.ops_per_timestep / 1e6 < 68.5


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


def prints_as(value: float, printed: str) -> bool:
    """Whether `value` has the printed digits, rounded (halves up) or cut off."""
    scale = 10 ** len(printed.partition(".")[2])
    return round(float(printed) * scale) in (math.floor(value * scale), math.floor(value * scale + 0.5))


def language_model(moe: MoEConfig | None, lstm: tuple[int, int, int], num_lstms: int) -> tuple[float, float]:
    """(ops, parameters without embedding and softmax) of S17 appendix C.1's stack, in millions; no biases."""
    layers = [lstm_cost(*lstm, biases=False)] * num_lstms
    layers += moe_cost(lstm[2], moe, moe.num_experts) if moe else ()
    return sum(layer.ops for layer in layers) / 1e6, sum(layer.parameters for layer in layers) / 1e6


WIDE = MoEConfig(1, k=1, hidden_sizes=[4096])
DEEP = MoEConfig(1, k=1, hidden_sizes=[1024, 1024, 1024, 1024])
LSTM_512 = (512, 512, 512)

# Name, experts, LSTM, LSTMs, ops, parameters: S17 Table 7, whose first level has 16 groups (32 in its last two rows, of
# which the last fits no 16), and Table 8, where it has 32 to 256. LSTM-512-512, which projects 512 to 512, is left out.
LANGUAGE_MODELS = [
    ("LSTM-1024-512", None, (512, 1024, 512), 1, "4.7", "4.7"),
    ("LSTM-2048-512", None, (512, 2048, 512), 1, "9.4", "9.4"),
    ("2xLSTM-8192-1024", None, (1024, 8192, 1024), 2, "151.0", "151.0"),
    ("4xLSTM-512", None, LSTM_512, 4, "8.4", "8.4"),
    ("MoE-1-Wide", WIDE, LSTM_512, 2, "8.4", "8.4"),
    ("MoE-1-Deep", DEEP, LSTM_512, 2, "8.4", "8.4"),
    ("MoE-4", MoEConfig(4, hidden_sizes=[1024]), LSTM_512, 2, "8.4", "8.4"),
    ("MoE-32", MoEConfig(32, hidden_sizes=[1024]), LSTM_512, 2, "8.4", "37.8"),
    # 8.651: the one row whose digit is cut off instead of rounded.
    ("MoE-256", MoEConfig(256, hidden_sizes=[1024]), LSTM_512, 2, "8.6", "272.9"),
    ("MoE-256-h", hierarchical(256, 16, 1024), LSTM_512, 2, "8.4", "272.9"),
    ("MoE-1024-h", hierarchical(1024, 16, 1024), LSTM_512, 2, "8.5", "1079.0"),
    ("MoE-4096-h", hierarchical(4096, 16, 1024), LSTM_512, 2, "8.9", "4303.4"),
    ("MoE-34M", hierarchical(1024, 32, 2048), (1024, 1024, 1024), 2, "33.8", "4313.9"),
    ("MoE-143M", hierarchical(256, 32, 8192), (1024, 4096, 1024), 2, "142.7", "4371.1"),
    ("Table 8, 256-h", hierarchical(256, 32, 1024), LSTM_512, 2, "8.4", "272.9"),
    ("Table 8, 1024-h", hierarchical(1024, 32, 1024), LSTM_512, 2, "8.5", "1079.0"),
    ("Table 8, 4096-h", hierarchical(4096, 64, 1024), LSTM_512, 2, "8.6", "4303.4"),
    ("Table 8, 16384-h", hierarchical(16384, 128, 1024), LSTM_512, 2, "8.8", "17201.0"),
    ("Table 8, 65536-h", hierarchical(65536, 256, 1024), LSTM_512, 2, "9.2", "68791.0"),
    ("Table 8, 131072-h", hierarchical(131072, 256, 1024), LSTM_512, 2, "9.7", "137577.6"),
]


@pytest.mark.parametrize(("name", "moe", "lstm", "lstms", "ops", "parameters"), LANGUAGE_MODELS)
def test_rows_of_the_paper_s_tables_7_and_8(
    name: str, moe: MoEConfig | None, lstm: tuple[int, int, int], lstms: int, ops: str, parameters: str
):
    counted = language_model(moe, lstm, lstms)
    assert prints_as(counted[0], ops), f"{name}: {counted[0]} ops"
    assert prints_as(counted[1], parameters), f"{name}: {counted[1]} parameters"


def test_biases_of_experts_or_another_branching_would_show_in_the_tables():
    _, parameters = language_model(hierarchical(4096, 16, 1024), LSTM_512, 2)
    assert not prints_as(parameters + 4096 * (1024 + 512) / 1e6, "4303.4")
    _, parameters = language_model(hierarchical(256, 16, 8192), (1024, 4096, 1024), 2)
    assert not prints_as(parameters, "4371.1")
    ops, _ = language_model(hierarchical(16384, 16, 1024), LSTM_512, 2)
    assert not prints_as(ops, "8.8")


@pytest.mark.parametrize(("hidden", "weights"), [(2048, 2_097_152), (1024, 1_048_576), (8192, 8_388_608)])
def test_unit_sizes_of_experts(hidden: int, weights: int):
    more, less = (moe_cost(512, MoEConfig(hidden_sizes=[hidden]), num_experts) for num_experts in (5, 4))
    gate = 2 * 512
    assert less == (LayerCount(4 * weights, 4 * weights), LayerCount(4 * gate, 4 * gate))
    # More experts cost nothing but their column in the gate: k of them work.
    assert more == (LayerCount(5 * weights, 4 * weights), LayerCount(5 * gate, 5 * gate))


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
        if config.moe.gating == "hierarchical":
            # Importance and load are summed by group, in a product with a matrix of zeros and ones.
            slots = len(gate.gates_TK) * config.moe.primary_k
            difference += 2 * 2 * slots * config.moe.experts_at(name)
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
