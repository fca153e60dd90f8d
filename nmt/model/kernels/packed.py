"""Products of a CPU with weights that are laid out for them once, when a model is loaded; for passes without gradient.

Two kinds of numbers:

- bf16. oneDNN multiplies them in the matrix units of processors that have them (AMX).
- 8-bit integers, times a factor per output. The inputs of a product are rounded to 8 bits too, times a factor per row:
  so a row has the same results in any company. PyTorch calls this dynamic quantisation, with a factor for all rows.

PyTorch's LSTM would lay out weights in bf16 anew at every position of a search.

Letters: R rows, I inputs, O outputs; N rows of a packed batch, B sentences, D input width, P output width, C cells.
"""

import warnings

import torch
from torch import Tensor, nn

from nmt.batch import Rows
from nmt.model.kernels.lstm_cell import cell_step

# Rows that the layout in bf16 is made for; other numbers of rows are possible.
_ROWS = 256


class PackedWeight:
    """The matrix and the bias of a product, in `dtype`: int8 or bfloat16."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        """Copy the weights into the layout of products."""
        self.outputs = len(weight_OI)
        self._bf16 = dtype == torch.bfloat16
        weight_OI = weight_OI.detach()
        self._bias_O = None if bias_O is None else bias_O.detach().to(dtype if self._bf16 else torch.float32)
        if self._bf16:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype).contiguous(), _ROWS)
        else:
            self._weight = _quantised(weight_OI.float())

    def product(self, x_RI: Tensor) -> Tensor:
        """Return x W^T + b, (R, O): for bf16, in bf16; for int8, in float32."""
        if self._bf16:
            multiply = torch.ops.mkldnn._linear_pointwise
            out_RO: Tensor = multiply(x_RI.bfloat16(), self._weight, self._bias_O, "none", [], "")
            return out_RO
        return self._quantised_product(x_RI.float())

    def _quantised_product(self, x_RI: Tensor) -> Tensor:
        """Return x W^T + b, computed with each row divided by its largest number."""
        rows, tiny = len(x_RI), torch.finfo(torch.float32).tiny
        largest_R1 = x_RI.abs().amax(1, keepdim=True).clamp_min_(tiny)
        # PyTorch rounds by the range of the whole matrix. One more row, with 1 and -1, makes that the same always.
        scaled_MI = x_RI.new_zeros(rows + 1, x_RI.shape[1])
        torch.div(x_RI, largest_R1, out=scaled_MI[:rows])
        scaled_MI[rows, 0], scaled_MI[rows, -1] = 1.0, -1.0
        out_RO: Tensor = torch.ops.quantized.linear_dynamic(scaled_MI, self._weight, not _has_vnni())[:rows]
        return out_RO.mul_(largest_R1) if self._bias_O is None else torch.addcmul(self._bias_O, out_RO, largest_R1)

    def exact_product(self, x_RI: Tensor) -> Tensor:
        """Return x W^T + b in float32, for bf16 as exact as if sums of products had not been rounded to bf16."""
        out_RO = self.product(x_RI)
        if not self._bf16:
            return out_RO
        # oneDNN adds sums of products to the tensor given before it rounds: this is the error of the first rounding.
        multiply = torch.ops.mkldnn._linear_pointwise.binary
        error_RO: Tensor = multiply(x_RI.bfloat16(), -out_RO, self._weight, self._bias_O, "add")
        return out_RO.float().add_(error_RO)


def _has_vnni() -> bool:
    """Return whether the processor adds products of 8-bit integers in 32 bits; else inputs have 7 bits."""
    return bool(torch.cpu._is_vnni_supported())


def _quantised(weight_OI: Tensor) -> torch.ScriptObject:
    """Return the weights for PyTorch's product with dynamic quantisation, with a factor for each output."""
    factor_O = weight_OI.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    before = torch.backends.quantized.engine
    if _has_vnni() and "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"  # the faster one for more than a few rows
    try:
        with warnings.catch_warnings():
            # PyTorch announces that its quantised tensors will move to another library.
            warnings.simplefilter("ignore", UserWarning)
            zero_O = torch.zeros(len(weight_OI), dtype=torch.int64)
            quantised_OI = torch.quantize_per_channel(weight_OI, factor_O, zero_O, 0, torch.qint8)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantised_OI, None)
        return packed
    finally:
        torch.backends.quantized.engine = before


class PackedLinear(nn.Module):
    """A linear layer that computes with packed weights, and has its parameters for those who ask for them."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = PackedWeight(linear.weight, linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., I) -> (..., O)."""
        return self._packed.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)


class PackedLSTM:
    """An LSTM layer with packed weights, for one position or for whole sentences. Cells are float32."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        """Pack w_ih, w_hh, b_ih, b_hh and, if outputs are projected, w_hr: PyTorch's order."""
        w_ih, w_hh, b_ih, b_hh, *projection = weights
        self.for_sentences = dtype == torch.int8
        """Whether whole sentences take less time with these weights than with PyTorch's LSTM."""
        self._input = PackedWeight(w_ih, b_ih + b_hh, dtype)
        self._recurrent = PackedWeight(w_hh, None, dtype)
        self._projection = PackedWeight(projection[0], None, dtype) if projection else None

    def step(self, x_BD: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (output_BP, cell_BC) after one position, given those before it."""
        return self._after(self._input.product(x_BD), state)

    def run(self, x_ND: Tensor, rows: Rows, state: tuple[Tensor, Tensor]) -> Tensor:
        """Return y_NP for whole sentences, given the state of each before its first position.

        The rows of a position are consecutive, those of the longest sentences first, so that nothing is padded.
        """
        outputs = []
        for gates_BG in self._input.product(x_ND).split(rows.alive):
            count = len(gates_BG)
            state = self._after(gates_BG, (state[0][:count], state[1][:count]))
            outputs.append(state[0])
        return torch.cat(outputs)

    def _after(self, input_BG: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        output_BC, cell_BC = cell_step(input_BG, self._recurrent.product(state[0]), state[1])
        return (self._projection.product(output_BC) if self._projection else output_BC), cell_BC
