"""Fused twins against their plain forms. They run on a GPU only; what they compute is tested through the plain ones."""

import pytest
import torch

from nmt.model.kernels.cross_entropy import plain_softmax_gradient, softmax_gradient

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="fused kernels run on a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("vocabulary", [7, 1504, 2048, 32001])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_fused_softmax_gradient_is_the_plain_one(vocabulary: int, smoothing: float):
    logits_MV = (3 * torch.randn(33, vocabulary, device="cuda")).bfloat16()
    target_M = torch.randint(vocabulary, (33,), device="cuda")
    expected = plain_softmax_gradient(logits_MV.clone(), target_M, smoothing)
    found = softmax_gradient(logits_MV.clone(), target_M, smoothing)
    for plain, fused in zip(expected, found, strict=True):
        difference = (plain.float() - fused.float()).norm() / plain.float().norm()
        assert difference < 1e-2 if plain.dtype == torch.bfloat16 else difference < 1e-5
