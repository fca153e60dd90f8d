"""R-Drop: two passes over a batch, their losses and how far apart they are, against torch's own functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nmt.batch import Batch, fit
from nmt.config import ModelConfig, TrainingConfig
from nmt.config.model import GATINGS, WIRINGS
from nmt.model import loss as loss_module
from nmt.model.loss import r_drop_cross_entropy
from nmt.model.one_pass import Gates
from nmt.model.seq2seq import Seq2Seq
from tests.conftest import TINY_VOCAB

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]

TOKENS, WIDTH, VOCAB = 13, 5, 11
SMOOTHING, ALPHA = 0.1, 3.0


def oracle(passes: list[Tensor], target_N: Tensor, smoothing: float, alpha: float) -> Tensor:
    """The loss of two passes' logits by operations that autograd knows."""
    losses = [F.cross_entropy(each, target_N, label_smoothing=smoothing, reduction="sum") for each in passes]
    log_p, log_q = (each.log_softmax(1) for each in passes)
    apart = [F.kl_div(b, a, log_target=True, reduction="sum") for a, b in ((log_p, log_q), (log_q, log_p))]
    return sum(losses) / 2 + alpha / 4 * sum(apart)


# ------------------------------------------------------------------------------------------------------ the loss


def problem(bias: bool) -> tuple[list[Tensor], Tensor]:
    """Two inputs of the softmax layer, its weight and its bias, if any; the targets."""
    sizes = [(TOKENS, WIDTH), (TOKENS, WIDTH), (VOCAB, WIDTH), *([(VOCAB,)] if bias else [])]
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes], torch.randint(
        VOCAB, (TOKENS,)
    )


def logits_of(leaves: list[Tensor]) -> list[Tensor]:
    return [F.linear(x_ND, *leaves[2:]) for x_ND in leaves[:2]]


def losses(leaves: list[Tensor], target_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    bias_V = leaves[3] if len(leaves) > 3 else None
    return r_drop_cross_entropy(*leaves[:3], bias_V, target_N, *rest)


@pytest.mark.parametrize("piece_tokens", [1, 8, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("smoothing", "alpha"), [(0.0, 1.0), (0.1, 5.0), (0.7, 0.3)])
def test_values_and_gradients_equal_torch_s(
    smoothing: float, alpha: float, bias: bool, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_PIECE_ELEMENTS", piece_tokens * VOCAB)
    leaves, target_N = problem(bias)
    loss, nll = losses(leaves, target_N, smoothing, alpha)
    expected = oracle(logits_of(leaves), target_N, smoothing, alpha)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, oracle(logits_of(leaves), target_N, 0.0, 0.0))
    assert not nll.requires_grad
    # The factor stands for what follows the loss: division by the number of tokens.
    gradients = torch.autograd.grad(0.37 * loss, leaves)
    for gradient, each in zip(gradients, torch.autograd.grad(0.37 * expected, leaves), strict=True):
        torch.testing.assert_close(gradient, each)


def test_padding_has_no_part() -> None:
    leaves, target_N = problem(bias=True)
    real_N = torch.rand(TOKENS) < 0.6
    found = losses(leaves, target_N, SMOOTHING, ALPHA, real_N)
    own = [*(x_ND[real_N] for x_ND in leaves[:2]), *leaves[2:]]
    expected = losses(own, target_N[real_N], SMOOTHING, ALPHA)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found[0], leaves)
    for gradient, each in zip(gradients, torch.autograd.grad(expected[0], leaves), strict=True):
        torch.testing.assert_close(gradient, each)
    assert not any(gradient[~real_N].any() for gradient in gradients[:2])


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_is_right_when_the_others_are_not_wanted(wanted: int) -> None:
    leaves, target_N = problem(bias=True)
    inputs = [leaf.detach() for leaf in leaves]
    inputs[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(losses(inputs, target_N, SMOOTHING, ALPHA)[0], inputs[wanted])
    expected = oracle(logits_of(inputs), target_N, SMOOTHING, ALPHA)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, inputs[wanted])[0])


def test_without_gradients_only_the_logits_are_computed() -> None:
    leaves, target_N = problem(bias=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        losses(leaves, target_N, SMOOTHING, ALPHA)
    assert counter.get_total_flops() == 2 * 2 * TOKENS * WIDTH * VOCAB


def test_half_precision_has_a_float32_loss() -> None:
    leaves, target_N = problem(bias=True)
    halves = [*(x_ND.detach().bfloat16() for x_ND in leaves[:2]), *(leaf.detach().float() for leaf in leaves[2:])]
    for each in halves:
        each.requires_grad_()
    loss, nll = losses(halves, target_N, SMOOTHING, ALPHA)
    assert loss.dtype == nll.dtype == torch.float32
    expected = oracle(
        [logits.bfloat16().float() for logits in logits_of([each.float() for each in halves])],
        target_N,
        SMOOTHING,
        ALPHA,
    )
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
    gradients = torch.autograd.grad(loss, halves)
    assert [gradient.dtype for gradient in gradients] == [each.dtype for each in halves]
    for gradient, each in zip(gradients, torch.autograd.grad(expected, halves), strict=True):
        torch.testing.assert_close(gradient.float(), each.float(), rtol=0.05, atol=0.2)


# --------------------------------------------------------------------------------------------------- the network

GATING: dict[str, dict[str, Any]] = {gating: {"gating": gating, "k": 2} for gating in GATINGS}
GATING["hierarchical"] |= {"branching": 2, "k": 1}
EVERY_DROPOUT = {"dropout": 0.3, "word_dropout": 0.2, "output_masking": 0.2, "expert_dropout": 0.2}


def model_of(config: ModelConfig) -> Seq2Seq:
    model = Seq2Seq(config, TINY_VOCAB).double().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def seeded(work: Callable[[], Any]) -> Any:
    torch.manual_seed(9)
    return work()


def by_two_passes(model: Seq2Seq, batch: Batch) -> tuple[Tensor, list[Gates]]:
    """The loss, from the decoder's outputs in two ordinary passes, and the gates of both."""
    found: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda *given: found.append(given[2]))
    gates = [model(batch).gates for _ in range(2)]
    hook.remove()
    logits = [F.linear(x_ND, model.output.weight, model.output.bias) for x_ND in found]
    return oracle(logits, batch.target_out_N, SMOOTHING, ALPHA), gates


@pytest.mark.parametrize("gating", GATING)
def test_loss_gradients_and_gates_are_those_of_two_passes(
    tiny_config: Configs, tiny_batch: Batches, gating: str
) -> None:
    model = model_of(tiny_config(**GATING[gating], **EVERY_DROPOUT, output_bias=True))
    batch = tiny_batch((4, 5), (2, 3), (6, 5))
    output = seeded(partial(model, batch, SMOOTHING, r_drop=ALPHA))
    expected, (first, second) = seeded(partial(by_two_passes, model, batch))
    torch.testing.assert_close(output.loss, expected)
    for layer, gate in output.gates.items():
        torch.testing.assert_close(gate.sums, first[layer].sums.plus(second[layer].sums))
        assert not torch.equal(first[layer].sums.importance_E, second[layer].sums.importance_E)
        torch.testing.assert_close(gate.own_loss, (first[layer].own_loss + second[layer].own_loss) / 2)
        assert torch.equal(gate.gates_TK, first[layer].gates_TK)
    own = sum(gate.sums.importance_E.sum() + gate.own_loss for gate in output.gates.values())
    others = sum(
        gates[layer].sums.importance_E.sum() + gates[layer].own_loss / 2 for gates in (first, second) for layer in gates
    )
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(output.loss + own, parameters, allow_unused=True)
    for gradient, each in zip(
        gradients, torch.autograd.grad(expected + others, parameters, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(("encoder", "decoder"), [([1], [1]), ([2], []), ([], [2]), ([], [])])
def test_gates_alone_see_the_same_draws(
    tiny_config: Configs, tiny_batch: Batches, encoder: list[int], decoder: list[int], wiring: str
) -> None:
    config = tiny_config(encoder_moe_after=encoder, decoder_moe_after=decoder, wiring=wiring, **EVERY_DROPOUT)
    model, batch = model_of(config), tiny_batch((4, 2), (1, 6))
    expected = seeded(partial(model, batch, r_drop=ALPHA)).gates
    gates = seeded(partial(model.gates, batch, r_drop=ALPHA))
    assert gates.keys() == expected.keys()
    for layer, gate in gates.items():
        torch.testing.assert_close(gate.sums, expected[layer].sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("training", "alpha"), [(False, ALPHA), (True, 0.0)])
def test_outside_training_and_at_0_there_is_one_pass(
    tiny_config: Configs, tiny_batch: Batches, training: bool, alpha: float
) -> None:
    model, batch = model_of(tiny_config(**EVERY_DROPOUT)).train(training), tiny_batch((4, 2), (1, 6))
    one, plain = (seeded(partial(model, batch, SMOOTHING, **given)) for given in ({"r_drop": alpha}, {}))
    assert torch.equal(one.loss, plain.loss)
    assert torch.equal(one.nll, plain.nll)
    gates = seeded(partial(model.gates, batch, r_drop=alpha))
    for layer, gate in plain.gates.items():
        for found in (gates[layer], one.gates[layer]):
            assert torch.equal(found.sums.importance_E, gate.sums.importance_E)


def test_rows_of_padding_have_no_part_in_the_loss(tiny_config: Configs, tiny_batch: Batches) -> None:
    model, batch = model_of(tiny_config(**EVERY_DROPOUT)), tiny_batch((4, 2), (1, 6))
    fitted = fit(batch, batch.shape.with_room(2))
    assert fitted.source.real_N is not None
    assert fitted.target.real_N is not None
    other = fitted._replace(
        source_N=fitted.source_N.where(fitted.source.real_N, 7),
        target_in_N=fitted.target_in_N.where(fitted.target.real_N, 8),
        target_out_N=fitted.target_out_N.where(fitted.target.real_N, 9),
    )
    assert not torch.equal(other.source_N, fitted.source_N)
    outputs = [seeded(partial(model, each, SMOOTHING, r_drop=ALPHA)) for each in (fitted, other)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    gradients = [torch.autograd.grad(output.loss, model.output.weight)[0] for output in outputs]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [-1.0, 1001.0])
def test_alpha_has_bounds(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^training\.r_drop={value} must be at"):
        TrainingConfig(r_drop=value)
