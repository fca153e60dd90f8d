"""LSTM layers of the encoder and the decoder.

A layer runs over the whole sentences of a packed batch (`forward`), or over one position (`step`), as a search does.

Letters: N rows, B sentences, L positions, D input width, P output width, C cells.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.backends.cudnn.rnn import get_cudnn_mode

from nmt.batch import Rows
from nmt.model.kernels.lstm import lstm, lstm_step
from nmt.model.kernels.packed import PackedLSTM
from nmt.model.rows import turn_round
from nmt.model.side_by_side import side_by_side

# Under autocast, weights are copied in any case; it costs little that cuDNN also packs them into one chunk.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
# PyTorch warns of this for every model with projections on a CPU. For this reason, conf/model/small.yaml has none.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

LSTMState = tuple[Tensor, Tensor]
"""(output_BP, cell_BC) after a position. In passes without gradient, cells of bf16 weights are float32 on a GPU, and so
are those of packed weights on a CPU."""


class LSTM(nn.Module):
    """A one-direction LSTM of C cells, with its output projected to P if C > P (S17 C.1, appendix E: 2048 to 512).

    The projected output is the recurrent input. Deviation: PyTorch's LSTM has two bias vectors; the paper shows none.
    """

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        proj_size = output_size if output_size < cell_size else 0
        self.lstm = nn.LSTM(input_size, cell_size, proj_size=proj_size)
        self.packed: PackedLSTM | None = None
        """The weights again, laid out for products on a CPU (`with_packed_weights`); for passes without gradient."""

    def lay_out(self) -> None:
        """Move the weights into one contiguous chunk of GPU memory. Otherwise cuDNN would do so in every call."""
        weights: list[Tensor] = list(self.lstm.parameters())
        if weights[0].is_cuda:
            lstm = self.lstm
            sizes = lstm.hidden_size, lstm.proj_size
            with torch.no_grad():
                # `flatten_parameters` does the same, but ignores bf16.
                torch._cudnn_rnn_flatten_weight(
                    weights, len(weights), lstm.input_size, get_cudnn_mode("LSTM"), *sizes, 1, False, False
                )

    def weights(self) -> list[Tensor]:
        """Return the parameters in the type of products: autocast's type if it is on, else their own."""
        parameters: list[Tensor] = list(self.lstm.parameters())
        device = parameters[0].device.type
        if not torch.is_autocast_enabled(device):
            return parameters
        return [parameter.to(torch.get_autocast_dtype(device)) for parameter in parameters]

    def forward(self, x_ND: Tensor, rows: Rows) -> Tensor:
        """Return y_NP for whole sentences, which start from a state of zeros."""
        if self.packed and self.packed.for_sentences and rows.num_rows:
            return self.packed.run(x_ND, rows, self.start(rows.alive[0]))
        return lstm(x_ND, self.weights, rows)

    def start(self, columns: int) -> LSTMState:
        """Return the state before the first position, zeros, for passes without gradient."""
        weight = next(self.lstm.parameters())
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(dtype, torch.float32) if weight.is_cuda or self.packed else dtype
        output_BP = weight.new_zeros(columns, self.lstm.proj_size or self.lstm.hidden_size, dtype=dtype)
        return output_BP, weight.new_zeros(columns, self.lstm.hidden_size, dtype=exact)

    def step(self, x_BD: Tensor, state: LSTMState | None, weights: list[Tensor] | None = None) -> LSTMState:
        """Return the state after one position, whose first part is the output; `state=None` means zeros.

        A caller that goes position by position passes `weights()`, so that weights are cast only once.
        """
        if self.packed:
            return self.packed.step(x_BD, state or self.start(len(x_BD)))
        weights = weights or self.weights()
        # Autocast would run cuDNN in float16 even if its type is bf16, and would add its output in float32.
        with torch.autocast(x_BD.device.type, enabled=False):
            if state is not None and x_BD.is_cuda and not torch.is_grad_enabled():
                return lstm_step(x_BD.to(weights[0].dtype), state, weights)
            x_1BD = x_BD[None].to(weights[0].dtype)
            if state is None:
                outputs = self.lstm.proj_size or self.lstm.hidden_size
                state = x_1BD.new_zeros(len(x_BD), outputs), x_1BD.new_zeros(len(x_BD), self.lstm.hidden_size)
            before = state[0][None], state[1][None]
            y_1BP, _, cell_1BC = torch.lstm(x_1BD, before, weights, True, 1, 0.0, self.training, False, False)
        return y_1BP[0], cell_1BC[0]


class BidirectionalLSTM(nn.Module):
    """Two LSTMs over the whole sentence, one per direction, with concatenated outputs (GNMT section 3.2)."""

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        self.forward_lstm = LSTM(input_size, cell_size, output_size)
        self.backward_lstm = LSTM(input_size, cell_size, output_size)

    def forward(self, x_ND: Tensor, rows: Rows) -> Tensor:
        """Return y_N2P. The backward direction reads each sentence from its own end."""
        turned_ND = turn_round(x_ND, rows.turn_N)
        ahead_NP, back_NP = side_by_side(
            lambda: self.forward_lstm(x_ND, rows), lambda: self.backward_lstm(turned_ND, rows)
        )
        return torch.cat([ahead_NP, turn_round(back_NP, rows.turn_N)], dim=1)
