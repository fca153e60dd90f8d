"""LSTM layers of the encoder and the decoder.

The same call works for a whole sequence and for a single position: forward(x, state) -> (y, state). On a GPU, it uses
cuDNN's LSTM, time-major and unpacked. Padding follows each sentence, so it cannot affect the forward direction's real
positions. The backward direction reverses each sentence within its own length.

Letters: T positions, B sentences, D input width, P output width, C cells.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.backends.cudnn.rnn import get_cudnn_mode

from nmt.model.rows import turn_round

# Under autocast, weights are copied in any case; it costs little that cuDNN also packs them into one chunk.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
# PyTorch warns of this for every model with projections on a CPU. For this reason, conf/model/small.yaml has none.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

LSTMState = tuple[Tensor, Tensor]
"""(output_1BP, cell_1BC) after the last position."""


class LSTM(nn.Module):
    """A one-direction LSTM of C cells, with its output projected to P if C > P (S17 C.1, appendix E: 2048 to 512).

    The projected output is the recurrent input. Deviation: PyTorch's LSTM has two bias vectors; the paper shows none.
    """

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        proj_size = output_size if output_size < cell_size else 0
        self.lstm = nn.LSTM(input_size, cell_size, proj_size=proj_size)

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

    def forward(
        self, x_TBD: Tensor, state: LSTMState | None = None, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Return (y_TBP, state after the last position); `state=None` means zeros.

        A caller that goes position by position passes `weights()`, so that weights are cast only once.
        """
        weights = weights or self.weights()
        # Autocast would run cuDNN in float16 even if its type is bf16, and would add its output in float32.
        with torch.autocast(x_TBD.device.type, enabled=False):
            x_TBD = x_TBD.to(weights[0].dtype)
            if state is None:
                outputs = self.lstm.proj_size or self.lstm.hidden_size
                batch = x_TBD.shape[1]
                state = x_TBD.new_zeros(1, batch, outputs), x_TBD.new_zeros(1, batch, self.lstm.hidden_size)
            y_TBP, output_1BP, cell_1BC = torch.lstm(x_TBD, state, weights, True, 1, 0.0, self.training, False, False)
        return y_TBP, (output_1BP, cell_1BC)


class BidirectionalLSTM(nn.Module):
    """Two LSTMs over the whole sentence, one per direction, with concatenated outputs (GNMT section 3.2)."""

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        self.forward_lstm = LSTM(input_size, cell_size, output_size)
        self.backward_lstm = LSTM(input_size, cell_size, output_size)

    def forward(self, x_TBD: Tensor, length_B: Tensor) -> Tensor:
        """Return y_TB2P; sentences have `length_B` real positions. Values at padding positions are unspecified."""
        turn_TB = reversed_positions(length_B, x_TBD.shape[0])
        ahead_TBP, _ = self.forward_lstm(x_TBD)
        back_TBP, _ = self.backward_lstm(turn_round(x_TBD, turn_TB))
        return torch.cat([ahead_TBP, turn_round(back_TBP, turn_TB)], dim=2)


def reversed_positions(length_B: Tensor, num_positions: int) -> Tensor:
    """Return index_TB with index[t, b] = length[b] - 1 - t within the sentence, else t. It is its own inverse."""
    position_T1 = torch.arange(num_positions, device=length_B.device)[:, None]
    return torch.where(position_T1 < length_B, length_B - 1 - position_T1, position_T1)
