"""Packed weights against the products that they replace, and a search with them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import make_rows
from nmt.config import DecodingConfig, ModelConfig
from nmt.decoding.searcher import Searcher
from nmt.decoding.translation import Options
from nmt.device import search_dtype
from nmt.errors import UserError
from nmt.model.kernels.packed import PackedLSTM, PackedWeight
from nmt.model.lstm import LSTM
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import WorkingWeights, with_packed_weights
from nmt.tokens import EOS, NUM_SPECIAL

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 on this processor")
TYPES = [pytest.param(torch.bfloat16, marks=needs_bf16), torch.int8]
ERROR = {torch.bfloat16: 0.004, torch.int8: 0.02}
"""Relative error of a product of random numbers."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_packed_product_is_the_product_to_its_precision(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(rows)
    x_RI, weight_OI, bias_O = torch.randn(rows, 96), torch.randn(40, 96), torch.randn(40)
    weight_OI[3] *= 100.0  # one output's weights do not blur those of the others
    exact_RO = x_RI @ weight_OI.T + (bias_O if bias else 0.0)
    packed = PackedWeight(weight_OI, bias_O if bias else None, dtype)
    found_RO = packed.product(x_RI)
    assert found_RO.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    others = [output for output in range(40) if output != 3]
    assert relative_error(found_RO[:, others], exact_RO[:, others]) < ERROR[dtype]
    assert relative_error(found_RO[:, 3], exact_RO[:, 3]) < 4 * ERROR[dtype]


@needs_bf16
def test_exact_products_of_bf16_are_not_rounded_to_bf16() -> None:
    """With inputs and weights that bf16 can hold, only the rounding of results is left as an error."""
    torch.manual_seed(1)
    x_RI, weight_OI, bias_O = (torch.randn(*size).bfloat16() for size in ((50, 512), (300, 512), (300,)))
    exact_RO = x_RI.double() @ weight_OI.double().T + bias_O.double()
    packed = PackedWeight(weight_OI, bias_O, torch.bfloat16)
    found_RO = packed.exact_product(x_RI)
    assert found_RO.dtype == torch.float32
    rounded = float((packed.product(x_RI).double() - exact_RO).abs().max())
    assert float((found_RO.double() - exact_RO).abs().max()) < rounded / 100


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_row_has_the_same_product_in_any_company(bias: bool) -> None:
    torch.manual_seed(5)
    x_RI, weight_OI, bias_O = torch.randn(70, 96), torch.randn(40, 96), torch.randn(40)
    x_RI[3], x_RI[5] = 1000.0 * x_RI[3], 0.0
    packed = PackedWeight(weight_OI, bias_O if bias else None, torch.int8)
    whole_RO = packed.product(x_RI)
    for rows in ([0], [5], [1, 2], list(range(6, 50))):
        assert torch.equal(packed.product(x_RI[rows]), whole_RO[rows])
    assert relative_error(whole_RO[0], x_RI[0] @ weight_OI.T + (bias_O if bias else 0.0)) < 3 * ERROR[torch.int8]


def test_weights_of_zeros_give_the_bias() -> None:
    bias_O = torch.randn(8)
    found_RO = PackedWeight(torch.zeros(8, 16), bias_O, torch.int8).product(torch.randn(3, 16))
    torch.testing.assert_close(found_RO, bias_O.expand(3, 8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cells", [64, 160])
def test_a_packed_layer_over_sentences_is_its_steps_and_close_to_the_layer(dtype: torch.dtype, cells: int) -> None:
    torch.manual_seed(2)
    layer = LSTM(48, cells, 64).eval()
    packed = PackedLSTM([parameter.detach() for parameter in layer.lstm.parameters()], dtype)
    rows, _ = make_rows(np.array([5, 3, 3, 1]))
    x_ND = torch.randn(rows.num_rows, 48)
    state = torch.zeros(4, 64, dtype=torch.float32), torch.zeros(4, cells)
    with torch.no_grad():
        exact_NP = layer(x_ND, rows)
        found_NP = packed.run(x_ND, rows, state)
        assert relative_error(found_NP, exact_NP) < 3 * ERROR[dtype]
        # The first position, whose rows are the first ones.
        first_BP, _ = packed.step(x_ND[:4], state)
    assert relative_error(first_BP, exact_NP[:4]) < 3 * ERROR[dtype]


@pytest.fixture
def model() -> Seq2Seq:
    torch.manual_seed(3)
    config = ModelConfig(hidden_size=32, cell_size=32, num_encoder_layers=2, num_decoder_layers=2)
    config.moe.num_experts = 0
    return Seq2Seq(config, 60).eval()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_with_packed_weights_finds_scores_like_those_of_the_model(
    model: Seq2Seq, dtype: torch.dtype, beam_size: int
) -> None:
    products = torch.float32 if dtype == torch.int8 else dtype
    packed = with_packed_weights(WorkingWeights(model, CPU, products).model, dtype)
    rng = np.random.default_rng(4)
    sources = [rng.integers(NUM_SPECIAL, 60, size=length) for length in (3, 9, 6)]
    options = Options.of(DecodingConfig(beam_size=beam_size))
    found, exact = (Searcher([each], CPU, [EOS + 1]).search(sources, options) for each in (packed, model))
    for mine, theirs in zip(found, exact, strict=True):
        assert mine[0].score == pytest.approx(theirs[0].score, rel=0.05)


def test_the_masters_are_not_packed(model: Seq2Seq) -> None:
    """They may be trained further."""
    packed = with_packed_weights(model, torch.int8)
    assert packed.packed_output is not None
    assert model.packed_output is None
    assert not any(isinstance(module, LSTM) and module.packed for module in model.modules())
    # They share the memory of the parameters that are used as they are.
    assert packed.target_embedding.weight.data_ptr() == model.target_embedding.weight.data_ptr()


def test_what_a_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"decoding\.quantize=int8 works on a CPU only"):
        search_dtype(torch.device("cuda", 0), DecodingConfig(quantize="int8"))
    with pytest.raises(ValueError, match="leave one of them out"):
        DecodingConfig(quantize="int8", precision="bf16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="this processor cannot compute in bf16"):
        search_dtype(CPU, DecodingConfig(precision="bf16"))


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_where_the_processor_has_matrix_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    assert search_dtype(CPU, DecodingConfig()) == (torch.bfloat16 if units else torch.float32)
    assert search_dtype(CPU, DecodingConfig(precision="fp32")) == torch.float32
    assert search_dtype(CPU, DecodingConfig(quantize="int8")) == torch.float32
    assert search_dtype(torch.device("cuda", 0), DecodingConfig()) == torch.bfloat16
