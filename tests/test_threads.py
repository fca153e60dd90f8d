"""Groups of rows that threads share."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmt.model.experts import Experts
from nmt.model.kernels import threads
from nmt.model.kernels.threads import share_groups

CPU = torch.device("cpu")
SIZES = [4, 1, 15, 2, 18]


@pytest.fixture(params=[2, 3, 8])
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Number of PyTorch's threads; any work is enough for several."""
    monkeypatch.setattr(threads, "_MIN_PRODUCTS", 0)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 9))
def test_shares_are_consecutive_groups_of_about_equal_rows(sizes: list[int], number: int):
    shares = threads._equal_shares(sizes, number)
    assert [size for share in shares for size in sizes[share]] == sizes
    assert len(shares) <= number
    assert all(0 < sum(sizes[share]) <= sum(sizes) / number + max(sizes) for share in shares)


def test_every_group_is_worked_on_once_with_few_threads_each(number: int):
    shares: list[tuple[slice, int, int]] = []
    share_groups(lambda share: shares.append((share, threading.get_ident(), torch.get_num_threads())), SIZES, 1, CPU)
    assert sorted(group for share, _, _ in shares for group in range(5)[share]) == list(range(5))
    assert len({thread for _, thread, _ in shares}) == len(shares) > 1
    assert {each for _, _, each in shares} == {max(1, number // len(shares))}
    assert torch.get_num_threads() == number


@pytest.mark.parametrize("group", [0, 4])
def test_an_error_in_any_share_is_raised_after_all_have_ended(number: int, group: int):
    ended: list[int] = []

    def work(share: slice) -> None:
        if group in range(5)[share]:
            raise MemoryError(f"group {group}")
        ended.extend(range(5)[share])

    with pytest.raises(MemoryError, match=f"group {group}"):
        share_groups(work, SIZES, 1, CPU)
    others = [share for share in threads._equal_shares(SIZES, number) if group not in range(5)[share]]
    assert sorted(ended) == [group for share in others for group in range(5)[share]]
    assert torch.get_num_threads() == number


def test_little_work_and_that_of_a_gpu_stay_in_one_thread():
    torch.set_num_threads(2)
    try:
        shares: list[slice] = []
        share_groups(shares.append, SIZES, threads._MIN_PRODUCTS - 1, CPU)
        share_groups(shares.append, SIZES[:1], threads._MIN_PRODUCTS, CPU)
        share_groups(shares.append, SIZES, threads._MIN_PRODUCTS, torch.device("cuda"))
        assert shares == [slice(0, 5), slice(0, 1), slice(0, 5)]
        share_groups(shares.append, SIZES, threads._MIN_PRODUCTS, CPU)
        assert len(shares) == 5
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("ends", [[4, 4, 9, 20], [0, 0, 0, 7], [0, 0, 0, 0], [1, 2, 3, 4]])
def test_experts_compute_the_same_in_several_threads(number: int, ends: list[int]):
    experts = Experts(4, 5, [6, 3]).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_RD = torch.randn(ends[-1], 5, dtype=torch.float64, requires_grad=True)
    ends_E, leaves = torch.tensor(ends, dtype=torch.int32), [rows_RD, *experts.weights]
    y_RD = experts(rows_RD, ends_E)
    gradients = torch.autograd.grad(y_RD.sum(), leaves)
    with torch.inference_mode():
        assert torch.equal(experts(rows_RD, ends_E), y_RD)
    torch.set_num_threads(1)
    torch.testing.assert_close(experts(rows_RD, ends_E), y_RD)
    expected = torch.autograd.grad(experts(rows_RD, ends_E).sum(), leaves)
    for gradient, oracle in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, oracle)
