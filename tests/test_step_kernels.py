"""The kernels of one position of a search, fused against plain."""

import pytest
import torch

from nmt.model.kernels.attention import plain_padded_attend
from nmt.model.kernels.lstm_cell import plain_cell_step
from nmt.model.kernels.top_k import plain_best
from nmt.tokens import EOS
from tests.kernels import DEVICE, compile_launches, needs_triton


@needs_triton
@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(3, 5000, 6), (2, 130, 10), (2, 9, 20), (1, 4096, 1)])
@pytest.mark.parametrize(("levels", "biased"), [(0, False), (5, False), (0, True)])
def test_the_fused_selection_is_the_plain_one(rows: int, vocabulary: int, k: int, levels: int, biased: bool):
    """With few levels, most logits have equals, and the lower index comes first in both."""
    from nmt.model.kernels.top_k_triton import fused_best

    logits_RV = torch.randn(rows, vocabulary)
    if levels:
        logits_RV = (logits_RV * levels).round() / levels
    allowed_V = torch.rand(vocabulary) < 0.9
    allowed_V[: EOS + 1] = torch.tensor([False, False, False, True])
    ends_R = torch.arange(rows) % 2 == 0
    logits_RV[:, EOS] = 9.0
    logits_RV[:, 0] = 20.0
    k = min(k, vocabulary, int(allowed_V.sum()) - 1)
    forbidden_F = (~allowed_V).nonzero().squeeze(1)
    bias_V = torch.randn(vocabulary) if biased else None
    whole_RV = logits_RV.clone() if bias_V is None else logits_RV + bias_V
    expected = plain_best(whole_RV, k, forbidden_F, ends_R, EOS)
    bias_V = None if bias_V is None else bias_V.to(DEVICE)
    found = fused_best(logits_RV.to(DEVICE), k, forbidden_F.to(DEVICE), ends_R.to(DEVICE), EOS, bias_V)
    assert torch.equal(found[0].cpu(), expected.values_RK)
    assert torch.equal(found[1].cpu(), expected.indexes_RK)
    torch.testing.assert_close(found[2].cpu(), expected.normaliser_R)
    assert (expected.indexes_RK[0] == EOS).any()


@needs_triton
@pytest.mark.parametrize("function", ["product", "additive"])
@pytest.mark.parametrize("few", [1, 100])
@pytest.mark.parametrize(
    ("queries", "sentences", "positions", "size", "width"), [(3, 2, 7, 24, 40), (1, 3, 33, 300, 20)]
)
def test_the_fused_attention_of_a_step_is_the_plain_one(
    function: str, queries: int, sentences: int, positions: int, size: int, width: int, few: int, monkeypatch
):
    from nmt.model.kernels import attention_step_triton
    from nmt.model.kernels.attention_step_triton import fused_attend_step

    monkeypatch.setattr(attention_step_triton, "_FEW", few)
    query_TBA, keys_SBA = torch.randn(queries, sentences, size), torch.randn(positions, sentences, size)
    values_SBD, v_A = torch.randn(positions, sentences, width), torch.randn(size)
    padding_SB = torch.arange(positions)[:, None] >= torch.tensor([positions, 1, 3])[:sentences]
    given = query_TBA, keys_SBA, values_SBD, padding_SB, v_A
    expected = plain_padded_attend(*given, function)
    keys_SBA[padding_SB], values_SBD[padding_SB] = torch.nan, torch.nan
    found = fused_attend_step(*(each.to(DEVICE) for each in given), function)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own.cpu(), wanted, rtol=1e-4, atol=1e-5)


@needs_triton
def test_the_fused_cell_of_a_step_is_the_plain_one():
    from nmt.model.kernels.lstm_cell_triton import fused_cell_step

    given = torch.randn(5, 4 * 24), torch.randn(5, 4 * 24), torch.randn(5, 24)
    for own, wanted in zip(fused_cell_step(*(each.to(DEVICE) for each in given)), plain_cell_step(*given), strict=True):
        torch.testing.assert_close(own.cpu(), wanted)


def launch_all() -> None:
    from nmt.model.kernels.attention_step_triton import fused_attend_step
    from nmt.model.kernels.lstm_cell_triton import fused_cell_step
    from nmt.model.kernels.top_k_triton import fused_best

    for vocabulary, beam in ((32000, 5), (8000, 16)):
        logits_RV, forbidden_F = torch.zeros(2, vocabulary), torch.arange(3)
        fused_best(logits_RV, 2 * beam, forbidden_F, torch.ones(2, dtype=torch.bool), EOS)
    for positions in (17, 512):
        keys_SBA = torch.zeros(positions, 2, 1024, dtype=torch.bfloat16)
        padding_SB = torch.zeros(positions, 2, dtype=torch.bool)
        for function in ("product", "additive"):
            fused_attend_step(keys_SBA[:3], keys_SBA, keys_SBA, padding_SB, keys_SBA[0, 0], function)
    sums_BG = torch.zeros(2, 4096, dtype=torch.bfloat16)
    fused_cell_step(sums_BG, sums_BG, torch.zeros(2, 1024))


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_all_cards():
    kernels = compile_launches(launch_all)
    assert {kernel.kernel for kernel in kernels} == {"_blocks", "_best", "_attend", "_step"}
    assert [kernel for kernel in kernels if kernel.spilled > 256] == []
