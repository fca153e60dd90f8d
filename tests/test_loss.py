"""The piecewise softmax cross-entropy against torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nmt.model import loss as loss_module
from nmt.model.loss import linear_cross_entropy, token_log_probs

TOKENS, WIDTH, VOCAB = 13, 5, 11


def problem(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    x_ND = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if bias else None
    return x_ND, weight_VD, bias_V, torch.randint(VOCAB, (TOKENS,))


@pytest.fixture(params=[1, 4, 10**6])
def _piece_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one token, of four (the last one short), of all."""
    monkeypatch.setattr(loss_module, "_PIECE_ELEMENTS", request.param * VOCAB)


@pytest.mark.usefixtures("_piece_tokens")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_values_and_gradients_equal_torch_s(smoothing: float, bias: bool):
    x_ND, weight_VD, bias_V, target_N = problem(bias)
    loss, nll = linear_cross_entropy(x_ND, weight_VD, bias_V, target_N, smoothing)
    logits_NV = F.linear(x_ND, weight_VD, bias_V)
    oracle = F.cross_entropy(logits_NV, target_N, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(nll, F.cross_entropy(logits_NV, target_N, reduction="sum"))
    assert not nll.requires_grad
    leaves = [leaf for leaf in (x_ND, weight_VD, bias_V) if leaf is not None]
    # The factor stands for what follows the loss: division by the number of tokens.
    gradients = torch.autograd.grad(0.37 * loss, leaves)
    for gradient, expected in zip(gradients, torch.autograd.grad(0.37 * oracle, leaves), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("_piece_tokens")
@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_of_tokens_equal_torch_s(bias: bool):
    x_ND, weight_VD, bias_V, target_N = problem(bias)
    oracle_NV = F.linear(x_ND, weight_VD, bias_V).log_softmax(1)
    found_N = token_log_probs(x_ND, weight_VD, bias_V, target_N)
    torch.testing.assert_close(found_N, oracle_NV[torch.arange(TOKENS), target_N])


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_each_gradient_is_right_when_the_others_are_not_wanted(trained: int):
    """Fine-tuning may freeze any of them."""
    x_ND, weight_VD, bias_V, target_N = problem(bias=True)
    inputs = [leaf.detach() for leaf in (x_ND, weight_VD, bias_V)]
    inputs[trained].requires_grad_()
    loss, _ = linear_cross_entropy(*inputs, target_N, 0.1)
    oracle = F.cross_entropy(F.linear(*inputs), target_N, label_smoothing=0.1, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs[trained])
    torch.testing.assert_close(gradient, torch.autograd.grad(oracle, inputs[trained])[0])


def test_without_gradients_only_the_logits_are_worked_out():
    x_ND, weight_VD, bias_V, target_N = problem(bias=True)
    expected = linear_cross_entropy(x_ND, weight_VD, bias_V, target_N, 0.1)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, FlopCounterMode(display=False) as counter:
            loss, nll = linear_cross_entropy(x_ND, weight_VD, bias_V, target_N, 0.1)
        assert not loss.requires_grad
        torch.testing.assert_close((loss, nll), tuple(value.detach() for value in expected))
        assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCAB


class LargestLogits(TorchDispatchMode):
    """Records the most rows of logits that any operation returned."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_logits_exist_one_piece_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_module, "_PIECE_ELEMENTS", 6 * VOCAB + 1)
    x_ND, weight_VD, _, target_N = problem(bias=False)
    with LargestLogits() as largest:
        linear_cross_entropy(x_ND, weight_VD, None, target_N, 0.1)[0].backward()
    assert largest.rows == 6


def test_half_precision_inputs_have_a_float32_loss():
    x_ND, weight_VD, bias_V, target_N = problem(bias=True)
    half = x_ND.detach().bfloat16().requires_grad_()
    weight, bias = weight_VD.detach().float().requires_grad_(), bias_V.detach().float().requires_grad_()
    loss, nll = linear_cross_entropy(half, weight, bias, target_N, 0.1)
    assert loss.dtype == nll.dtype == torch.float32
    oracle = F.cross_entropy(F.linear(half.float(), weight, bias), target_N, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, oracle, rtol=0.02, atol=0.0)
    gradients = torch.autograd.grad(loss, (half, weight, bias))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for gradient, expected in zip(gradients, torch.autograd.grad(oracle, (half, weight, bias)), strict=True):
        torch.testing.assert_close(gradient.float(), expected.float(), rtol=0.05, atol=0.1)
