"""The largest logits of each row against a stable sort, with its rule for equal ones."""

import pytest
import torch
from torch import Tensor

from nmt.model.kernels.top_k import log_sum_exp, top_k


def sorted_rows(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The oracle: (values, indexes) by sorting whole rows, the lower index first among equals."""
    values_RV, index_RV = logits_RV.sort(dim=1, descending=True, stable=True)
    return values_RV[:, :k], index_RV[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (5, 8), (7, 2), (100, 2), (1003, 10), (1504, 1), (8000, 10)])
def test_it_selects_what_a_sort_of_whole_rows_puts_first(vocabulary: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocabulary + k)
    logits_RV = torch.randn(33, vocabulary).to(dtype)
    top = top_k(logits_RV, k)
    for found, wanted in zip(top, sorted_rows(logits_RV, k), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("vocabulary", [30, 700, 8003])
def test_among_equal_logits_the_lower_index_comes_first(vocabulary: int) -> None:
    """Logits of few values: ties everywhere, among the selected, at the last place and across blocks."""
    torch.manual_seed(vocabulary)
    logits_RV = torch.randint(0, 4, (50, vocabulary)).float()
    logits_RV[3] = 1.0
    for k in (1, 2, 7):
        top = top_k(logits_RV, k)
        for found, wanted in zip(top, sorted_rows(logits_RV, k), strict=True):
            assert torch.equal(found, wanted)


def test_a_tie_with_the_first_logit_that_is_not_selected_counts() -> None:
    logits_RV = torch.zeros(1, 40000)
    logits_RV[0, [800, 5, 1005]] = torch.tensor([2.0, 1.0, 1.0])
    assert top_k(logits_RV, 2).indexes_RK.tolist() == [[800, 5]]


@pytest.mark.parametrize("vocabulary", [12, 20000])
def test_minus_infinity_fills_places_only_when_nothing_else_is_left(vocabulary: int) -> None:
    logits_RV = torch.full((3, vocabulary), -torch.inf)
    logits_RV[0, [7, 2]] = torch.tensor([1.0, 3.0])
    logits_RV[1, 11] = -5.0
    top = top_k(logits_RV, 4)
    never = -torch.inf
    assert top.values_RK.tolist() == [[3.0, 1.0, never, never], [-5.0, never, never, never], [never] * 4]
    assert top.indexes_RK[0, :2].tolist() == [2, 7]
    assert top.indexes_RK[1, 0] == 11
    assert int(top.indexes_RK.min()) >= 0
    assert int(top.indexes_RK.max()) < vocabulary


@pytest.mark.parametrize("vocabulary", [20, 20000])
def test_not_a_number_is_not_hidden(vocabulary: int) -> None:
    """A search recognises a damaged model by scores that are not finite."""
    logits_RV = torch.randn(2, vocabulary)
    logits_RV[1, 13] = torch.nan
    assert top_k(logits_RV, 3).values_RK.isnan().any(1).tolist() == [False, True]
    assert log_sum_exp(logits_RV).isnan().tolist() == [False, True]


def test_a_row_is_selected_alike_in_any_company() -> None:
    torch.manual_seed(3)
    logits_RV = torch.randint(0, 50, (64, 1504)).float()
    whole = top_k(logits_RV, 5)
    for row in range(0, 64, 7):
        alone = top_k(logits_RV[row : row + 1], 5)
        assert torch.equal(alone.indexes_RK[0], whole.indexes_RK[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_probabilities_add_up_to_one(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    logits_RV = (5.0 * torch.randn(6, 1504)).to(dtype)
    normaliser_R = log_sum_exp(logits_RV)
    assert normaliser_R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    total_R = (logits_RV.double() - normaliser_R[:, None].double()).exp().sum(1)
    torch.testing.assert_close(total_R, torch.ones(6, dtype=torch.float64), rtol=1e-5, atol=0.0)
