"""The network: wirings against a slow decoder, padding, batches, tying, initial values."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmt.batch import Batch, Rows, make_batch, make_rows
from nmt.config import AttentionConfig, Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.config.model import ATTENTION_FUNCTIONS, BOTTOM_LAYERS, GATINGS, NORMS, WIRINGS
from nmt.model.attention import Attention, Memory
from nmt.model.gating import THRESHOLD_SCALE, balance_loss
from nmt.model.init import init_parameters
from nmt.model.lstm import LSTM
from nmt.model.rows import pack, unpack
from nmt.model.seq2seq import Decoder, DecoderOutput, Encoded, Encoder, Seq2Seq
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater
from tests.conftest import TINY_VOCAB

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]

VARIANTS = list(itertools.product(WIRINGS, BOTTOM_LAYERS, ATTENTION_FUNCTIONS))
GATING = {gating: {"branching": 2, "k": 1} if gating == "hierarchical" else {"k": 2} for gating in GATINGS}
"""The MoE settings that go with each gating: two experts a token in all of them."""


def randomised(config: ModelConfig) -> Seq2Seq:
    """A float64 model without any zero left from the start: gates choose, biases matter."""
    model = Seq2Seq(config, TINY_VOCAB).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def encode(model: Seq2Seq, batch: Batch) -> Encoded:
    return model.encode(batch.source_N, batch.source)[0]


def stepwise(model: Seq2Seq, target_TR: Tensor, memory: Memory) -> list[DecoderOutput]:
    """Outputs of decoding one position at a time."""
    outputs: list[DecoderOutput] = []
    for target_R in target_TR:
        outputs.append(model.step(target_R, memory, outputs[-1].state if outputs else model.start(len(target_R))))
    return outputs


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def assert_steps_make_the_whole(model: Seq2Seq, batch: Batch) -> None:
    encoded = encode(model, batch)
    whole_TBD = unpack(model.decode(batch.target_in_N, batch.target, encoded)[0], batch.target)
    target_TB = unpack(batch.target_in_N[:, None], batch.target).squeeze(2)
    for t, one in enumerate(stepwise(model, target_TB, model.memory(encoded))):
        here_B = batch.target.length_B > t
        close(one.x_RD[here_B], whole_TBD[t, here_B])
        close(one.weights_RS.sum(1), torch.ones(len(here_B), dtype=torch.float64))


@pytest.mark.parametrize(("wiring", "bottom", "function"), VARIANTS)
def test_a_whole_sequence_equals_one_position_at_a_time(
    tiny_config: Configs, tiny_batch: Batches, wiring: str, bottom: str, function: str
):
    model = randomised(tiny_config(wiring=wiring, bottom_layer=bottom, function=function)).eval()
    assert_steps_make_the_whole(model, tiny_batch((4, 5), (2, 3), (6, 5)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_heads_and_norms_decode_one_position_as_the_whole_sequence(
    tiny_config: Configs, tiny_batch: Batches, wiring: str, norm: str
):
    changes = {"size": 6, "heads": 3, "num_decoder_layers": 3, "bidirectional_layers": 2}
    model = randomised(tiny_config(wiring=wiring, norm=norm, **changes)).eval()
    assert_steps_make_the_whole(model, tiny_batch((4, 5), (2, 3), (6, 5)))


@pytest.mark.parametrize("gating", GATING)
def test_every_gating_decodes_one_position_as_the_whole_sequence(
    tiny_config: Configs, tiny_batch: Batches, gating: str
):
    """What a search sees: the choice for a token does not depend on the tokens around it."""
    config = tiny_config(gating=gating, num_experts=8, hidden_sizes=[7, 3], encoder_moe_after=[1], **GATING[gating])
    model, batch = randomised(config).eval(), tiny_batch((4, 5), (2, 5), (6, 5))
    with torch.no_grad():
        encoded = encode(model, batch)
        whole_ND, gates = model.decode(batch.target_in_N, batch.target, encoded)
        target_TB = unpack(batch.target_in_N[:, None], batch.target).squeeze(2)
        outputs = stepwise(model, target_TB, model.memory(encoded))
    close(pack(torch.stack([one.x_RD for one in outputs]), batch.target), whole_ND)
    chosen = gates["decoder.1"]
    assert chosen.num_routed == (chosen.expert_TK < 8).sum()
    if gating == "strictly_balanced":
        assert (chosen.expert_TK == 8).any()  # slots that stay empty are among what is tested


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without gain and bias, as its paper writes it."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()


def slow_decoder(decoder: Decoder, x_TBD: Tensor, memory: Memory, norm: str = "none") -> Tensor:
    """The decoder as the documentation of `AttentionConfig.wiring` words it, position by position."""
    layers, wiring = [decoder.bottom, *decoder.upper], decoder.attention_config.wiring
    states: list = [None] * len(layers)
    previous_BD = torch.zeros_like(x_TBD[0])
    outputs = []
    for x_BD in x_TBD:
        stream = x_BD
        if wiring in ("feedback", "gnmt"):
            context = decoder.attention(previous_BD[None], memory)[0][0]
            stream = torch.cat([stream, context], 1)
        for number, layer in enumerate(layers, start=1):
            below = x_BD if number == 1 else stream
            if number > 1 and norm == "layers":
                stream = layer_norm(stream)
            if number > 1 and wiring in ("gnmt", "gnmt_v2"):
                stream = torch.cat([stream, context], 1)
            states[number - 1] = layer.step(stream, states[number - 1])
            y = states[number - 1][0]
            stream = y + below if number >= decoder.residual_from else y
            if number == 1:
                previous_BD = stream
                if wiring in ("parallel", "gnmt_v2"):
                    context = decoder.attention(stream[None], memory)[0][0]
                if wiring == "parallel":
                    stream = stream + context @ decoder.context.weight.T
            if str(number) in decoder.moe_layers.moe:
                read = stream if norm == "none" else layer_norm(stream)
                stream = stream + decoder.moe_layers.moe[str(number)](read)[0]
        outputs.append(stream)
    return torch.stack(outputs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual_from", [1, 3])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_each_wiring_is_what_its_documentation_says(
    tiny_config: Configs, tiny_batch: Batches, wiring: str, residual_from: int, norm: str
):
    layers = {"num_decoder_layers": 4, "decoder_moe_after": [1, 3], "residual_from": residual_from}
    config = tiny_config(wiring=wiring, norm=norm, **layers)
    model, batch = randomised(config).eval(), tiny_batch((4, 3), (2, 3))
    encoded = encode(model, batch)
    x_ND, _ = model.decode(batch.target_in_N, batch.target, encoded)
    embedded_ND = model.target_embedding.weight[batch.target_in_N] * model.config.hidden_size**0.5
    expected_TBD = slow_decoder(model.decoder, unpack(embedded_ND, batch.target), model.memory(encoded), norm)
    close(x_ND, pack(expected_TBD, batch.target))


def rows_of(*lengths: int) -> Rows:
    return make_rows(np.array(lengths))[0]


def slow_encoder(encoder: Encoder, x_SD: Tensor, norm: str) -> Tensor:
    """Layers over one whole sentence: LSTM, residual where widths agree, MoE with its residual."""
    for number, layer in enumerate([encoder.bottom, *encoder.upper], start=1):
        y_SD = layer(layer_norm(x_SD) if norm == "layers" and number > 1 else x_SD, rows_of(len(x_SD)))
        both = number >= encoder.residual_from and y_SD.shape == x_SD.shape
        x_SD = x_SD + y_SD if both else y_SD
        if str(number) in encoder.moe_layers.moe:
            x_SD = x_SD + encoder.moe_layers.moe[str(number)](x_SD if norm == "none" else layer_norm(x_SD))[0]
    return x_SD


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual_from", [1, 3])
@pytest.mark.parametrize("bottom", BOTTOM_LAYERS)
def test_the_encoder_is_its_stack_of_layers(
    tiny_config: Configs, tiny_batch: Batches, bottom: str, residual_from: int, norm: str
):
    both = 3 if bottom == "bidirectional_half" and norm != "none" else 1
    config = tiny_config(
        bottom_layer=bottom,
        residual_from=residual_from,
        encoder_moe_after=[2, 3],
        norm=norm,
        bidirectional_layers=both,
    )
    model, batch = randomised(config).eval(), tiny_batch((4, 1), (2, 1))
    memory = model.memory(encode(model, batch))
    source_SB = unpack(batch.source_N[:, None], batch.source).squeeze(2)
    for b, length in enumerate(batch.source.length_B.tolist()):
        embedded_SD = model.source_embedding.weight[source_SB[:length, b]] * config.hidden_size**0.5
        close(memory.values_SBD[:length, b], slow_encoder(model.encoder, embedded_SD, norm))
        assert memory.padding_SB[:, b].tolist() == [False] * length + [True] * (5 - length)


@pytest.mark.parametrize(("wiring", "bottom", "function"), VARIANTS)
def test_every_parameter_gets_a_gradient(
    tiny_config: Configs, tiny_batch: Batches, wiring: str, bottom: str, function: str
):
    config = tiny_config(wiring=wiring, bottom_layer=bottom, function=function, output_bias=True, tie_embeddings=False)
    model = Seq2Seq(config, TINY_VOCAB).double()  # as it starts, zero gates included
    out = model(tiny_batch(*[(5, 6)] * 8), label_smoothing=0.1)
    (out.loss + sum(balance_loss(gate.sums, 0.1, 0.1) for gate in out.gates.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("gating", GATING)
def test_every_parameter_of_every_gating_gets_a_gradient(tiny_config: Configs, tiny_batch: Batches, gating: str):
    changes = {"num_experts": 8, "hidden_sizes": [7, 6], "branching": 4 if gating == "hierarchical" else 0}
    model = Seq2Seq(tiny_config(gating=gating, **GATING[gating] | changes), TINY_VOCAB).double()
    out = model(tiny_batch(*[(5, 6)] * 8))
    (out.loss + sum(balance_loss(gate.sums, 0.1, 0.1) + gate.own_loss for gate in out.gates.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("bottom", BOTTOM_LAYERS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_batch_is_the_sum_of_its_sentences(tiny_config: Configs, tiny_batch: Batches, wiring: str, bottom: str):
    """Padding touches neither losses nor gradients; nor does one sentence another."""
    lengths = [(4, 2), (1, 6), (6, 0), (3, 3)]
    config = tiny_config(wiring=wiring, bottom_layer=bottom, tie_embeddings=False, output_bias=True)
    model = randomised(config).eval()
    together = tiny_batch(*lengths)
    out = model(together, label_smoothing=0.1)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = nll = torch.zeros((), dtype=torch.float64)
    for b, (source, target) in enumerate(lengths):
        source_N = unpack(together.source_N[:, None], together.source)[: source + 1, b, 0]
        ids = together.target_in_N, together.target_out_N
        target_in_N, target_out_N = (unpack(each[:, None], together.target)[: target + 1, b, 0] for each in ids)
        rows = rows_of(source + 1), rows_of(target + 1)
        alone = model(
            Batch(together.pairs_B[b : b + 1], source_N, rows[0], target_in_N, target_out_N, rows[1]),
            label_smoothing=0.1,
        )
        alone.loss.backward()
        loss, nll = loss + alone.loss.detach(), nll + alone.nll
    close(out.loss.detach(), loss)
    close(out.nll, nll)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(gradients[name], parameter.grad)


def test_nll_is_the_log_probability_of_the_target(tiny_config: Configs, tiny_batch: Batches):
    model, batch = randomised(tiny_config(output_bias=True)).eval(), tiny_batch((4, 2), (1, 6))
    log_prob_NV = model.logits(model.decode(batch.target_in_N, batch.target, encode(model, batch))[0]).log_softmax(1)
    expected = -log_prob_NV.gather(1, batch.target_out_N[:, None]).sum()
    close(model(batch).nll, expected)


@pytest.mark.parametrize("training", [True, False])
def test_gates_count_real_tokens_only(tiny_config: Configs, tiny_batch: Batches, training: bool):
    config = tiny_config(k=3, encoder_moe_after=[1, 2], decoder_moe_after=[2])
    model, batch = randomised(config).train(training), tiny_batch((4, 2), (1, 6), (6, 0))
    gates = model(batch).gates
    tokens = {"encoder.1": 14, "encoder.2": 14, "decoder.2": 11}
    assert gates.keys() == tokens.keys()
    for name, gate in gates.items():
        assert gate.expert_TK.shape == (tokens[name], 3)
        assert gate.sums.count_E.sum() == 3 * tokens[name]
        assert gate.sums.importance_E.sum().item() == pytest.approx(tokens[name])


@pytest.mark.parametrize(
    ("encoder", "decoder", "unused"),
    [
        ([1], [1], {"decoder.moe_layers.moe.1.experts", "decoder.upper.0"}),
        ([1], [], {"encoder.moe_layers.moe.1.experts", "encoder.upper.0", "decoder.bottom", "decoder.attention"}),
        ([], [2], {"decoder.moe_layers.moe.2.experts"}),
    ],
)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_gates_alone_are_those_of_the_whole_pass_and_nothing_beyond_them_is_computed(
    tiny_config: Configs, tiny_batch: Batches, encoder: list[int], decoder: list[int], unused: set[str], wiring: str
):
    config = tiny_config(encoder_moe_after=encoder, decoder_moe_after=decoder, wiring=wiring)
    model, batch = randomised(config).eval(), tiny_batch((4, 2), (1, 6))
    expected = model(batch).gates
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    gates = model.gates(batch)
    assert gates.keys() == expected.keys()
    for layer, gate in gates.items():
        close(gate.gates_TK, expected[layer].gates_TK)
        close(gate.sums.load_E, expected[layer].sums.load_E)
    assert not ran & unused
    assert "output" not in ran


@pytest.mark.parametrize("wiring", WIRINGS)
def test_hypotheses_are_further_columns(tiny_config: Configs, tiny_batch: Batches, wiring: str):
    """Column k * B + b reads sentence b; a selected state goes on as its columns would."""
    model, batch = randomised(tiny_config(wiring=wiring)).eval(), tiny_batch((4, 2), (1, 2), (2, 2))
    memory = model.memory(encode(model, batch))
    target_TKB = torch.randint(4, TINY_VOCAB, (3, 4, 3))
    together = stepwise(model, target_TKB.flatten(1), memory)
    apart = [stepwise(model, target_TKB[:, k], memory) for k in range(4)]
    for t, position in enumerate(together):
        close(position.x_RD, torch.cat([one[t].x_RD for one in apart]))
        close(position.weights_RS, torch.cat([one[t].weights_RS for one in apart]))
    next_R = torch.randint(4, TINY_VOCAB, (6,))
    columns_R = torch.tensor([9, 1, 2, 3, 1, 8])  # two hypotheses each of sentences 0, 1, 2
    after = model.step(next_R, memory, together[-1].state.select(columns_R))
    prefix_TR = target_TKB.flatten(1)[:, columns_R]
    close(after.x_RD, stepwise(model, torch.cat([prefix_TR, next_R[None]]), memory)[-1].x_RD)


def test_dropout_is_on_every_path_to_the_softmax(tiny_config: Configs, tiny_batch: Batches):
    """When all is dropped nothing is left, not even a residual: every piece is equally likely."""
    batch = tiny_batch((4, 2), (1, 6))
    for wiring in WIRINGS:
        model = randomised(tiny_config(wiring=wiring, dropout=1 - 1e-12))
        assert model(batch).nll.item() == pytest.approx(batch.num_target_tokens * math.log(TINY_VOCAB))
        encoded = encode(model, batch)
        assert not encoded.values_ND.any()
        # With a source to see, so that the context has something to drop, too.
        visible = encoded._replace(values_ND=torch.ones_like(encoded.values_ND))
        assert not model.decode(batch.target_in_N, batch.target, visible)[0].any()
        assert model.eval()(batch).nll.item() != pytest.approx(batch.num_target_tokens * math.log(TINY_VOCAB))


def test_tied_embeddings_are_one_matrix_and_untied_are_three(tiny_config: Configs):
    for tied, matrices in ((True, 1), (False, 3)):
        model = Seq2Seq(tiny_config(tie_embeddings=tied), TINY_VOCAB).double()
        tables = (model.source_embedding.weight, model.target_embedding.weight, model.output.weight)
        assert len({table.data_ptr() for table in tables}) == matrices
        assert sum(p.shape == (TINY_VOCAB, 6) for p in model.parameters()) == matrices


def test_a_model_without_experts_has_no_gates(tiny_config: Configs, tiny_batch: Batches):
    model = Seq2Seq(tiny_config(num_experts=0), TINY_VOCAB)
    assert model(tiny_batch((4, 2))).gates == {}
    assert not [name for name, _ in model.named_parameters() if "moe" in name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("wiring", "bottom", "function"), VARIANTS)
def test_every_parameter_has_an_initial_value(
    tiny_config: Configs, wiring: str, bottom: str, function: str, tied: bool
):
    config = tiny_config(
        wiring=wiring, bottom_layer=bottom, function=function, tie_embeddings=tied, output_bias=not tied
    )
    model = Seq2Seq(config, TINY_VOCAB)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    init_parameters(model, model.output)
    for name, parameter in model.named_parameters():
        assert not parameter.isnan().any(), name


@pytest.mark.parametrize("gating", GATING)
def test_initial_values_are_those_of_the_table(gating: str):
    width, cells, size, hidden_sizes, experts, vocab = 64, 128, 4096, [256, 32, 100], 8, 1000
    config = ModelConfig(
        hidden_size=width,
        cell_size=cells,
        output_bias=True,
        attention=AttentionConfig(function="normalised", size=size),
        moe=MoEConfig(num_experts=experts, hidden_sizes=hidden_sizes, gating=gating, **GATING[gating]),
    )
    model = Seq2Seq(config, vocab)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    init_parameters(model, model.output)

    def assert_std(tensor: Tensor, std: float) -> None:
        # 5 standard errors; 1/sqrt(2n) is a normal's, a uniform's is smaller.
        assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * tensor.numel()))
        assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel())

    assert_std(model.target_embedding.weight, width**-0.5)
    attention = model.decoder.attention
    assert_std(attention.v_N, size**-0.5)
    assert attention.gain.item() == pytest.approx(size**-0.5)
    assert not attention.bias_N.any()
    assert_std(attention.key.weight, math.sqrt(2 / (width + size)))
    assert_std(attention.query.weight, math.sqrt(2 / (width + size)))
    assert_std(model.decoder.context.weight, math.sqrt(1 / width))
    assert not model.output.bias.any()
    for side in (model.encoder, model.decoder):
        for moe in side.moe_layers.moe.values():
            zeros = dict(moe.gate.named_parameters())
            if gating in ("softmax_top_k", "strictly_balanced"):
                assert_std(zeros.pop("w_gate_DE"), width**-0.5)
            if gating == "strictly_balanced":
                log_threshold_E = THRESHOLD_SCALE * zeros.pop("threshold_E")
                assert log_threshold_E.tolist() == pytest.approx([-math.log(experts)] * experts)
            assert len(zeros) == {"noisy_top_k": 2, "hierarchical": 4}.get(gating, 0)
            assert not any(parameter.any() for parameter in zeros.values())
            for w_EIO, inputs, gain in zip(moe.experts.weights, [width, *hidden_sizes], [2, 2, 2, 1], strict=True):
                assert w_EIO.shape[1] == inputs
                assert_std(w_EIO, math.sqrt(gain / inputs))
    lstms = [module.lstm for module in model.modules() if isinstance(module, LSTM)]
    assert len(lstms) == 2 + 2 + 2
    for lstm in lstms:
        bias_4C = lstm.bias_ih_l0 + lstm.bias_hh_l0
        assert bias_4C.view(4, cells).tolist() == [[float(gate == 1)] * cells for gate in range(4)]
        for name, weight in lstm.named_parameters():
            if name.startswith("weight"):
                assert weight.abs().max() <= cells**-0.5
                assert_std(weight, cells**-0.5 / math.sqrt(3))


@pytest.mark.parametrize(
    "gating",
    [each if each == "hierarchical" else pytest.param(each, marks=pytest.mark.slow) for each in GATING],
)
def test_every_gating_learns_to_reverse(tiny_config: Configs, gating: str):
    """Forty words in two micro-batches an update; every parameter takes part."""
    vocabulary, experts = 10, {"num_experts": 8, "hidden_sizes": [8, 6]}
    depth = {"num_encoder_layers": 2, "num_decoder_layers": 1}
    model_config = tiny_config(hidden_size=24, cell_size=24, gating=gating, **depth, **experts, **GATING[gating])
    training = TrainingConfig(label_smoothing=0.0, precision="fp32")
    model = Seq2Seq(model_config, vocabulary)
    config = Config(model=model_config, training=training)
    updater = Updater(model, make_optimizer(model, training), config, World(torch.device("cpu")))
    rng = np.random.default_rng(1)
    sources = [rng.integers(NUM_SPECIAL, vocabulary, size=n) for n in rng.integers(1, 5, size=40)]
    targets = [source[::-1] for source in sources]
    batches = [make_batch(np.arange(20), sources[half], targets[half]) for half in (slice(20), slice(20, 40))]
    tokens = sum(batch.num_target_tokens for batch in batches)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for step in range(1, 71):
        done = updater.update(batches, step, rate=0.02 * min(1, step / 20))
        assert not done.skipped
        losses.append(float(done.nll) / tokens)
    assert losses[0] > 1.5
    assert losses[-1] < 0.5
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start[name]), name
    with torch.no_grad():
        nll = sum(float(model.eval()(batch).nll) for batch in batches)
    assert nll / tokens < 0.5


def test_product_attention_starts_open():
    """Scores of V = 1 would saturate the softmax from the first step."""
    attention = Seq2Seq(ModelConfig(hidden_size=64, cell_size=64), 100).decoder.attention
    assert isinstance(attention, Attention)
    values_SBD, query_TBD = torch.randn(20, 4, 64), torch.randn(10, 4, 64)
    memory = attention.memory(values_SBD.flatten(0, 1), rows_of(20, 20, 20, 20))
    _, weights_TBS = attention(query_TBD, memory)
    assert weights_TBS.max(2).values.mean() < 0.25


def test_the_model_runs_in_bf16_close_to_float32(tiny_config: Configs, tiny_batch: Batches):
    batch = tiny_batch((4, 2), (1, 6), (6, 3))
    for wiring, function in itertools.product(WIRINGS, ATTENTION_FUNCTIONS):
        model = Seq2Seq(tiny_config(wiring=wiring, function=function, num_experts=4, k=4), TINY_VOCAB).eval()
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        assert all(gate.gates_TK.dtype == torch.float32 for gate in out.gates.values())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        torch.testing.assert_close(out.loss, exact.loss, rtol=0.02, atol=0.0)
