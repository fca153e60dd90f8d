"""The fused products of the experts against their plain forms, on a GPU or in Triton's interpreter.

The plain forms are tested against loops in test_experts.py. The interpreter has no products of bf16.
"""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from nmt.config import MoEConfig
from nmt.device import set_float32_products
from nmt.model.experts import LocalDispatcher, MoE
from nmt.model.kernels import experts
from nmt.model.kernels.experts import Groups, group_rows, plain_matmul, plain_outer
from nmt.model.kernels.row_sums import plain_sum_rows_backward
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton
from tests.test_experts import EMPTY_SLOTS, GROUPS, gate_output

pytestmark = needs_triton

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New tensors hold NaN, so that whatever a kernel does not write shows; float32 products are exact."""
    set_float32_products(torch.device(DEVICE), "fp32")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that even few rows fill."""
    from nmt.model.kernels import experts_triton
    from nmt.model.kernels.experts_triton import Tile

    # Of different sizes, so that no side can stand for another.
    tiles = experts_triton._Tiles(Tile(16, 32, 16, 4, 2), Tile(32, 16, 16, 4, 2))
    monkeypatch.setattr(experts_triton, "_tiles_of", lambda *_: tiles)


@pytest.fixture
def fused(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts use the fused products wherever they run."""
    monkeypatch.setattr(experts, "_is_fused", lambda *_: True)


def both_groups(ends: list[int], num_rows: int, dtype: torch.dtype) -> tuple[Groups, Groups]:
    """Groups of the plain and of the fused form."""
    from nmt.model.kernels.experts_triton import list_tiles

    ends_E = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    plain = group_rows(ends_E.cpu(), num_rows, torch.float64)
    return plain, Groups(ends_E, num_rows, {}, list_tiles(ends_E, num_rows, dtype))


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


# Ends, rows of no expert, inputs, outputs.
CASES = [
    *((ends, 0, 8, 24) for ends in GROUPS[-3:]),
    ([37], 0, 40, 5),
    ([0, 20, 53, 53, 60], 19, 17, 33),
    ([3, 36, 36], 1, 64, 48),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ends", "extra", "inputs", "outputs"), CASES)
def test_the_fused_products_are_the_plain_ones(
    small_tiles: None, ends: list[int], inputs: int, outputs: int, extra: int, dtype: torch.dtype
):
    from nmt.model.kernels.experts_triton import fused_matmul, fused_outer

    num_rows = ends[-1] + extra
    plain, tiled = both_groups(ends, num_rows, dtype)
    sizes = (num_rows, inputs), (num_rows, outputs), (len(ends), inputs, outputs), (5, inputs)
    a_RI, b_RO, w_EIO, x_MI = (torch.randn(size, device=DEVICE).to(dtype) for size in sizes)
    token_R = torch.randint(5, (num_rows,), device=DEVICE)
    relu_output_RI = torch.randn_like(a_RI).relu()
    # Rows of no expert may hold anything.
    a_RI[ends[-1] :] = b_RO[ends[-1] :] = torch.nan

    def exact(tensor: Tensor) -> Tensor:
        return tensor.cpu().double()

    for rows, token in ((a_RI, None), (x_MI, token_R)):
        a, w, b, of = exact(rows), exact(w_EIO), exact(b_RO), None if token is None else token.cpu()
        # With a ReLU in one of the two cases.
        found_RO = fused_matmul(rows, w_EIO, tiled, token, token is not None)
        assert_near(found_RO, plain_matmul(a, w, plain, of, token is not None), dtype)
        assert_near(fused_outer(rows, b_RO, tiled, token), plain_outer(a, b, plain, of), dtype)
    w_EOI = w_EIO.transpose(1, 2)
    found_RI = fused_matmul(b_RO, w_EOI, tiled, relu_output_RO=relu_output_RI)
    exact_RI = plain_matmul(exact(b_RO), exact(w_EOI), plain, relu_output_RO=exact(relu_output_RI))
    assert_near(found_RI, exact_RI, dtype)


def test_a_gradient_of_weights_is_written_in_their_type(small_tiles: None):
    from nmt.model.kernels.experts_triton import fused_outer

    plain, tiled = both_groups([4, 9], 9, torch.float16)
    a_RI, b_RO = torch.randn(9, 16, device=DEVICE).half(), torch.randn(9, 32, device=DEVICE).half()
    exact_EIO = plain_outer(a_RI.cpu().double(), b_RO.cpu().double(), plain)
    assert_near(fused_outer(a_RI, b_RO, tiled, None, torch.float32), exact_EIO, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_and_its_gradient_keep_nan(small_tiles: None, dtype: torch.dtype):
    """A step that diverged must be seen, whatever the kernels."""
    from nmt.model.kernels.experts_triton import fused_matmul

    _, tiled = both_groups([2], 2, dtype)
    rows_RI = torch.tensor([[torch.nan] * 16, [1.0] * 16], device=DEVICE, dtype=dtype)
    w_EIO = torch.ones(1, 16, 16, device=DEVICE, dtype=dtype)
    assert fused_matmul(rows_RI, w_EIO, tiled, relu=True).isnan().all(1).tolist() == [True, False]
    found_RI = fused_matmul(rows_RI, w_EIO, tiled, relu_output_RO=torch.ones_like(rows_RI))
    assert found_RI.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("num_experts", [1, 5, 40])
def test_tiles_cover_all_rows_once(num_experts: int, monkeypatch: pytest.MonkeyPatch):
    """Also those of more experts and tiles than the kernel has lanes, and those of no expert."""
    from nmt.model.kernels import experts_triton
    from nmt.model.kernels.experts_triton import _tiles_of, list_tiles

    monkeypatch.setattr(experts_triton, "_LANES", 16)
    count_E = torch.randint(3, (num_experts,)) * torch.randint(90, (num_experts,))
    ends_E = count_E.cumsum(0).int()
    num_rows = int(ends_E[-1]) + 1200
    tile_rows = _tiles_of(num_rows, num_experts, torch.float32, torch.device(DEVICE)).matmul.rows
    found = [tuple(tile) for tile in list_tiles(ends_E.to(DEVICE), num_rows, torch.float32).tolist()]
    wanted, begin = [], 0
    for group, end in enumerate([*ends_E.tolist(), num_rows]):
        wanted += [(group, first) for first in range(begin, end, tile_rows)]
        begin = end
    assert found[: len(wanted)] == wanted
    assert {expert for expert, _ in found[len(wanted) :]} <= {-1}


@pytest.mark.parametrize("known", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("choices", [*EMPTY_SLOTS, [[0, 1], [2, 3], [1, 0], [1, 3], [1, 2]]])
def test_the_layer_and_all_its_gradients_are_those_of_the_plain_products(
    request: pytest.FixtureRequest, choices: list[list[int]], known: bool
):
    torch.manual_seed(3)
    moe = MoE(20, 4, MoEConfig(4, k=2, hidden_sizes=[40, 24]))
    for w_EIO in moe.experts.parameters():
        torch.nn.init.normal_(w_EIO, std=0.3)
    expert_TK = torch.tensor(choices)
    gates_TK = torch.rand(expert_TK.shape).masked_fill(expert_TK == 4, 0.0)
    x_TD, direction_TD = torch.randn(2, len(choices), 20)
    results = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        if dtype == torch.float32:
            request.getfixturevalue("fused")
        layer, x, gates = moe.to(device, dtype), x_TD.to(device, dtype), gates_TK.to(device, dtype)
        gate = gate_output(expert_TK.to(device), gates.requires_grad_(), 4)
        gate = gate if known else gate._replace(num_routed=None)
        y_TD = LocalDispatcher().run(layer.experts, x.requires_grad_(), gate)
        leaves = x, gates, *layer.experts.weights
        results.append([y_TD, *torch.autograd.grad(y_TD, leaves, direction_TD.to(device, dtype))])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [8, 100, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filled", [0, 1, 10, 12])
def test_the_fused_gradient_of_a_sum_of_rows_is_the_plain_one(filled: int, dtype: torch.dtype, width: int):
    from nmt.model.kernels.row_sums_triton import fused_sum_rows_backward

    order_R = torch.randperm(12, device=DEVICE)[: filled or 12].contiguous()
    weight_TK = torch.rand(4, 3, device=DEVICE)
    grad_TD, rows_RD = (torch.randn(size, width, device=DEVICE).to(dtype) for size in (4, len(order_R)))
    found_RD, found_TK = fused_sum_rows_backward(grad_TD, rows_RD, weight_TK, order_R // 3, order_R)
    tensors = (tensor.double() for tensor in (grad_TD, rows_RD, weight_TK))
    exact_RD, exact_TK = plain_sum_rows_backward(*tensors, order_R // 3, order_R)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found_RD.double(), exact_RD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_TK.double(), exact_TK, rtol=1e-4, atol=1e-4)


def launch(dtype: torch.dtype, tiles: str) -> None:
    """Launch the kernels of a layer with all that they can do, for one of the sets of tiles."""
    from nmt.model.kernels import experts_triton
    from nmt.model.kernels.row_sums_triton import fused_sum_rows_backward

    experts_triton._tiles_of = lambda *_: getattr(experts_triton, tiles)
    ends_E = torch.tensor([80, 128], dtype=torch.int32)
    groups = Groups(ends_E, 128, {}, experts_triton.list_tiles(ends_E, 128, dtype))
    x_TD, token_R = torch.empty(32, 512, dtype=dtype), torch.empty(128, dtype=torch.int64)
    h_RI, y_RD = torch.empty(128, 2048, dtype=dtype), torch.empty(128, 512, dtype=dtype)
    w_EDI, w_EID = torch.empty(2, 512, 2048, dtype=dtype), torch.empty(2, 2048, 512, dtype=dtype)
    experts_triton.fused_matmul(x_TD, w_EDI, groups, token_R, relu=True)
    experts_triton.fused_matmul(y_RD, w_EID.transpose(1, 2), groups, relu_output_RO=h_RI)
    experts_triton.fused_outer(x_TD, h_RI, groups, token_R)
    experts_triton.fused_outer(h_RI, y_RD, groups)
    fused_sum_rows_backward(x_TD, y_RD, torch.empty(32, 4), token_R, token_R)


def launch_for_every_card() -> None:
    launch(torch.bfloat16, "_AMPERE_MANY_ROWS")
    launch(torch.bfloat16, "_AMPERE_FEW_ROWS")
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        launch(torch.float32, "_FLOAT32")


def launch_for_hopper() -> None:
    for tiles in ("_HOPPER_MANY_ROWS", "_HOPPER_SOME_ROWS", "_HOPPER_FEW_ROWS"):
        launch(torch.bfloat16, tiles)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launches", "capabilities"), [(launch_for_every_card, SHARED_BYTES), (launch_for_hopper, [90])]
)
def test_the_kernels_compile_for_every_supported_card(launches: Callable[[], None], capabilities: Iterable[int]):
    compiled = compile_launches(launches, *capabilities)
    assert {each.capability for each in compiled} == set(capabilities)
    assert {each.kernel for each in compiled} == {"_list_tiles", "_matmul", "_outer", "_sum_rows_backward"}
    # The tiles that are the fastest for float32 leave a few registers too little, outside the loop over the sum.
    assert [each for each in compiled if each.spilled > 40] == []
