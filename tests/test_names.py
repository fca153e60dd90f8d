"""Names of layers and parameters, and what settings say of a kind of gate, against the modules themselves."""

from collections.abc import Callable

import pytest
import torch

from nmt.batch import Batch
from nmt.config import LayerName, ModelConfig
from nmt.config.model import GATINGS
from nmt.model.names import expert_dim, expert_matrix, is_expert, layer_prefix
from nmt.model.seq2seq import Seq2Seq
from tests.conftest import TINY_VOCAB

KINDS = {
    "noisy_top_k": {"num_experts": 9, "k": 2},
    "softmax_top_k": {"num_experts": 9, "k": 2},
    "hierarchical": {"num_experts": 9, "branching": 3, "primary_k": 2, "k": 1},
    "strictly_balanced": {"num_experts": 9, "k": 2},
}
Configs = Callable[..., ModelConfig]


def test_every_kind_of_gate_is_here() -> None:
    assert set(KINDS) == set(GATINGS)


@pytest.mark.parametrize("gating", GATINGS)
def test_names_are_those_of_the_modules(tiny_config: Configs, gating: str) -> None:
    config = tiny_config(gating=gating, encoder_moe_after=[3, 1], **KINDS[gating])
    model = Seq2Seq(config, TINY_VOCAB)
    layers = model.moe_layers()
    assert list(layers) == config.moe_layer_names()
    of_layers = {
        f"{layer_prefix(layer)}{name}": (expert_dim(name), parameter)
        for layer, moe in layers.items()
        for name, parameter in moe.named_parameters()
    }
    experts = {id(parameter) for moe in layers.values() for parameter in moe.experts.parameters()}
    for name, parameter in model.named_parameters():
        assert is_expert(name) == (id(parameter) in experts)
        dim, own = of_layers.pop(name, (None, parameter))
        assert own is parameter
        assert dim == (list(parameter.shape).index(config.moe.num_experts) if dim is not None else None)
        assert (dim is None) == (config.moe.num_experts not in parameter.shape)
    assert not of_layers
    for moe in layers.values():
        matrices = dict(moe.named_parameters())
        assert [matrices[expert_matrix(place)] for place in range(2)] == list(moe.experts.weights)


def test_layers_come_as_a_token_meets_them(tiny_config: Configs, tiny_batch: Callable[..., Batch]) -> None:
    model = Seq2Seq(tiny_config(encoder_moe_after=[3, 1], decoder_moe_after=[2, 1]), TINY_VOCAB)
    assert (
        list(model(tiny_batch((3, 2))).gates)
        == list(model.moe_layers())
        == ["encoder.1", "encoder.3", "decoder.1", "decoder.2"]
    )
    names = [LayerName.of(layer) for layer in model.moe_layers()]
    assert names == [("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 2)]
    assert list(map(str, names)) == list(model.moe_layers())


@pytest.mark.parametrize("gating", GATINGS)
def test_what_settings_say_of_a_gate_is_what_it_does(tiny_config: Configs, gating: str) -> None:
    config = tiny_config(gating=gating, **KINDS[gating])
    moe, gate = config.moe, Seq2Seq(config, TINY_VOCAB).moe_layers()["encoder.2"].gate.train()
    torch.nn.init.normal_(gate.w_gate_DE)
    out = gate(torch.randn(200, config.hidden_size))
    filled_TK = out.expert_TK < moe.num_experts
    assert moe.is_noisy == gate.noisy == bool(out.noise_std > 0)
    assert moe.is_noisy == (out.sums.load().grad_fn is not None)
    assert moe.k_is_average == bool(filled_TK.sum(1).unique().numel() > 1)
    assert filled_TK.sum() / 200 == pytest.approx(moe.experts_per_token, rel=0.02)
    groups = moe.groups_at("encoder.2")
    assert [expert for group in groups for expert in group] == list(range(moe.num_experts))
    group_E = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    active_TK = group_E[out.expert_TK.clamp_max(moe.num_experts - 1)]
    most = moe.primary_k if moe.is_hierarchical else 1
    assert max(len(set(row)) for row in active_TK.tolist()) == most
