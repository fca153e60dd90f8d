"""An LSTM layer over packed rows against PyTorch's LSTM on one sentence after the other."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nmt.model.kernels import lstm as kernel
from nmt.model.kernels.lstm import group_sentences, has_kernel, lstm, lstms
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton


class Case(NamedTuple):
    lengths: list[int]
    """By falling length."""
    inputs: int
    cells: int
    outputs: int
    padding: int = 0
    """Rows after the real ones."""
    tail: int = 0
    """Positions without rows."""
    spare: int = 0
    """How many sentences more there might have been."""

    def packed(self) -> tuple[Tensor, Tensor]:
        """(begin_L, previous_N)"""
        rows = [(t, j) for t in range(self.lengths[0]) for j, length in enumerate(self.lengths) if length > t]
        place = {row: index for index, row in enumerate(rows)}
        count = len(rows) + self.padding
        previous = [place.get((t - 1, j), count) for t, j in rows] + [count] * self.padding
        begin = [place.get((t, 0), len(rows)) for t in range(self.lengths[0] + self.tail + 1)]
        return torch.tensor(begin, dtype=torch.int32), torch.tensor(previous, dtype=torch.int32)

    def weights(self) -> list[Tensor]:
        module = nn.LSTM(self.inputs, self.cells, proj_size=self.outputs if self.outputs < self.cells else 0)
        return [parameter.detach() for parameter in module.parameters()]

    def sentence_by_sentence(self, x_ND: Tensor, weights: list[Tensor]) -> Tensor:
        """The oracle: PyTorch's LSTM on each sentence; zeros for rows of padding."""
        begin_L, _ = self.packed()
        y_NP = x_ND.new_zeros(len(x_ND), self.outputs)
        for j, length in enumerate(self.lengths):
            rows = begin_L[:length].long() + j
            state = x_ND.new_zeros(1, 1, self.outputs), x_ND.new_zeros(1, 1, self.cells)
            y_TP = torch.lstm(x_ND[rows, None], state, weights, True, 1, 0.0, True, False, False)[0][:, 0]
            y_NP = y_NP.index_copy(0, rows, y_TP)
        return y_NP


SMALL = [
    Case([5, 5, 4, 2, 1], 3, 5, 5),
    Case([9, 8, 8, 8, 3, 3, 1, 1], 3, 7, 4, padding=3, tail=2, spare=4),
    Case([1], 2, 3, 3),
    Case([1, 1, 1], 2, 4, 3, padding=1, tail=5),
    Case([4], 2, 3, 2, spare=1),
]
TILED = [
    Case([5, 5, 4, 2, 1], 8, 32, 32, padding=3, tail=4, spare=2),
    Case([5, 5, 4, 2, 1], 8, 32, 16, padding=2, tail=1),
    Case([3] * 18 + [2] * 17 + [1], 5, 32, 16, spare=50),
    Case([2] * 17, 5, 16, 16),
    Case([1], 8, 32, 16),
    Case([1] * 5, 8, 16, 16, padding=1),
]
"""Cases whose sizes are multiples of the tiles. Some have several tiles of sentences, which end at different times."""


def results(
    function: Callable[[Tensor, list[Tensor]], Tensor], x_ND: Tensor, weights: list[Tensor], grad_NP: Tensor
) -> list[Tensor]:
    """Outputs and the gradients of inputs and weights, as float64 on the CPU."""
    x_ND = x_ND.detach().clone().requires_grad_()
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    y_NP = function(x_ND, weights)
    y_NP.backward(grad_NP)
    found = [y_NP.detach(), x_ND.grad, *(weight.grad for weight in weights)]
    return [torch.zeros(()) if value is None else value.cpu().double() for value in found]


def expected_results(case: Case, x_ND: Tensor, weights: list[Tensor], grad_NP: Tensor) -> list[Tensor]:
    """Those of the oracle in float64."""
    exact = [weight.cpu().double() for weight in weights]
    return results(case.sentence_by_sentence, x_ND.cpu().double(), exact, grad_NP.cpu().double())


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("one_group", [False, True])
def test_the_plain_form_is_one_lstm_per_sentence(case: Case, one_group: bool, monkeypatch: pytest.MonkeyPatch):
    """Also on one padded group of all sentences and positions that might be there, as on a GPU."""
    begin_L, previous_N = case.packed()
    most = len(case.lengths) + case.spare
    if one_group:
        monkeypatch.setattr(kernel, "group_sentences", lambda begin_L: [(0, most, len(begin_L) - 1)])
    x_ND, grad_NP = torch.randn(len(previous_N), case.inputs).double(), torch.randn(len(previous_N), case.outputs)
    weights = [weight.double() for weight in case.weights()]
    found = results(lambda x, own: lstm(x, own, begin_L, previous_N, most), x_ND, weights, grad_NP.double())
    for own, expected in zip(found, expected_results(case, x_ND, weights, grad_NP), strict=True):
        torch.testing.assert_close(own, expected)


def test_lstms_are_separate_and_have_the_type_of_their_weights():
    case = SMALL[1]
    begin_L, previous_N = case.packed()
    x = [torch.randn(len(previous_N), case.inputs) for _ in range(2)]
    weights = [[weight.double() for weight in case.weights()] for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found = lstms(x, weights, begin_L, previous_N, len(case.lengths))
    for y_NP, x_ND, own in zip(found, x, weights, strict=True):
        torch.testing.assert_close(y_NP, case.sentence_by_sentence(x_ND.double(), own))


@pytest.mark.parametrize("lengths", [[7], [30] * 40, [120, *[28] * 30], list(range(60, 0, -1)), [50] + [1] * 900])
def test_groups_hold_every_sentence_once_and_little_padding(lengths: list[int]):
    groups = group_sentences(Case(lengths, 1, 1, 1).packed()[0])
    assert [sentence for first, after, _ in groups for sentence in range(first, after)] == list(range(len(lengths)))
    assert [positions for *_, positions in groups] == [lengths[first] for first, *_ in groups]
    padding = sum(positions * (after - first) for first, after, positions in groups) - sum(lengths)
    assert padding <= 8 * sum(positions for *_, positions in groups)
    assert len(groups) == 1 or len(set(lengths)) > 1


def test_a_cpu_has_no_kernel():
    assert not has_kernel(torch.device("cpu"), torch.bfloat16, 1024, 1024)


@pytest.fixture(params=[False, True], ids=["late", "early"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the fused form, with tiles for small sizes; memory that nothing has written to holds NaN."""
    from nmt.model.kernels import lstm_triton

    tiles = lstm_triton.Tiles(16, 16, 16, 16, 16, 4, 2, 1, early=request.param)
    monkeypatch.setattr(lstm_triton, "tiles", lambda sizes, memory: (tiles, tiles))
    torch.use_deterministic_algorithms(True)
    yield lstm_triton
    torch.use_deterministic_algorithms(False)


def check_fused(fused_lstms: Callable[..., list[Tensor]], case: Case, groups: int = 1) -> None:
    """Compare outputs and gradients of each of `groups` LSTMs side by side with the oracle's."""
    # numpy, in which Triton interprets, has no bf16.
    dtype, tolerance = (torch.bfloat16, 2e-2) if DEVICE == "cuda" else (torch.float32, 1e-5)
    index = [index.to(DEVICE) for index in case.packed()]
    rows, most = len(index[1]), len(case.lengths) + case.spare
    x, grads = (
        [torch.randn(rows, width, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(groups)]
        for width in (case.inputs, case.outputs)
    )
    weights = [[weight.to(DEVICE, dtype).requires_grad_() for weight in case.weights()] for _ in range(groups)]
    outputs = fused_lstms(x, weights, *index, most)
    torch.autograd.backward(outputs, grads)
    for y_NP, x_ND, own, grad_NP in zip(outputs, x, weights, grads, strict=True):
        found = [y_NP, x_ND.grad, *(weight.grad for weight in own)]
        for value, expected in zip(found, expected_results(case, x_ND, own, grad_NP), strict=True):
            assert (value.cpu() - expected).norm() <= tolerance * expected.norm()


@needs_triton
@pytest.mark.parametrize("case", TILED)
def test_the_fused_form_is_one_lstm_per_sentence(case: Case, fused: ModuleType):
    check_fused(fused.fused_lstms, case)


@needs_triton
@pytest.mark.parametrize("case", [TILED[0], TILED[1], TILED[3]])
def test_fused_lstms_run_side_by_side(case: Case, fused: ModuleType):
    check_fused(fused.fused_lstms, case, groups=2)


@needs_triton
@pytest.mark.parametrize("case", [TILED[1], TILED[2]])
def test_sums_are_split_where_there_are_few_tiles(case: Case, fused: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "_PARTS", 16)
    check_fused(fused.fused_lstms, case)


@needs_triton
def test_without_gradients_outputs_are_the_same(fused: ModuleType):
    case = TILED[1]
    index = [index.to(DEVICE) for index in case.packed()]
    x_ND = torch.randn(len(index[1]), case.inputs, device=DEVICE)
    weights = [weight.to(DEVICE).requires_grad_() for weight in case.weights()]
    (kept_NP,) = fused.fused_lstms([x_ND], [weights], *index, len(case.lengths))
    with torch.no_grad():
        (y_NP,) = fused.fused_lstms([x_ND], [weights], *index, len(case.lengths))
    assert torch.equal(y_NP, kept_NP)
    assert not y_NP.requires_grad


def launch_tables(memory: int) -> None:
    """Launch both passes of layers of the sizes in use with the tiles for so much shared memory."""
    from nmt.model.kernels import lstm_triton

    lstm_triton._processors_and_memory = lambda device: (1, memory)
    for case in [Case([2] * 128, 1024, 1024, 1024), Case([1] * 512, 1024, 1024, 1024), Case([1] * 500, 512, 2048, 512)]:
        begin_L, previous_N = case.packed()
        x_ND = torch.zeros(len(previous_N), case.inputs, dtype=torch.bfloat16)
        weights = [weight.bfloat16().requires_grad_() for weight in case.weights()]
        (y_NP,) = lstm_triton.fused_lstms([x_ND], [weights], begin_L, previous_N, len(case.lengths))
        y_NP.backward(torch.zeros_like(y_NP))


def launch_with_much_memory() -> None:
    launch_tables(SHARED_BYTES[80])


def launch_with_little_memory() -> None:
    launch_tables(SHARED_BYTES[86])


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_four_generations():
    compiled = [
        *compile_launches(launch_with_much_memory, 80, 90),
        *compile_launches(launch_with_little_memory, 86, 89),
    ]
    assert len(compiled) == 24
    assert max(each.spilled for each in compiled) < 100
