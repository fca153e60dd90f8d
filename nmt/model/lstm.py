"""LSTM layers as the encoder and the decoder stack them.

One call serves a whole sequence and a single position: forward(x, state) -> (y, state). On a GPU this is cuDNN's LSTM,
time-major and unpacked: padding stands after each sentence, where a forward LSTM cannot see it, and the backward
direction turns each sentence round by its own length.

Letters: T positions, B sentences, D input width, P output width, C cells.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.backends.cudnn.rnn import get_cudnn_mode

from nmt.model.rows import turn_round

# Casting float32 weights makes new ones in any case; that cuDNN packs them together as well costs little.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
# Said once of every model with projections on a CPU; it is why conf/model/small.yaml has none.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

LSTMState = tuple[Tensor, Tensor]
"""(output_1BP, cell_1BC) after the last position."""


class LSTM(nn.Module):
    """A one-direction LSTM of C cells whose output, projected to P when C > P, is what recurs (S17 C.1, appendix E:
    2048 cells projected to 512). Deviation: with the two bias vectors of PyTorch's LSTM; the paper shows none."""

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        proj_size = output_size if output_size < cell_size else 0
        self.lstm = nn.LSTM(input_size, cell_size, proj_size=proj_size)

    def lay_out(self) -> None:
        """Put the weights into one piece of a GPU's memory, as cuDNN wants them: else it does so in every call."""
        weights: list[Tensor] = list(self.lstm.parameters())
        if weights[0].is_cuda:
            lstm = self.lstm
            sizes = lstm.hidden_size, lstm.proj_size
            with torch.no_grad():
                # `flatten_parameters` does the same, but leaves bf16 alone.
                torch._cudnn_rnn_flatten_weight(
                    weights, len(weights), lstm.input_size, get_cudnn_mode("LSTM"), *sizes, 1, False, False
                )

    def weights(self) -> list[Tensor]:
        """The parameters in the type that products are computed in now: under autocast its own, else theirs."""
        parameters: list[Tensor] = list(self.lstm.parameters())
        device = parameters[0].device.type
        if not torch.is_autocast_enabled(device):
            return parameters
        return [parameter.to(torch.get_autocast_dtype(device)) for parameter in parameters]

    def forward(
        self, x_TBD: Tensor, state: LSTMState | None = None, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, LSTMState]:
        """(y_TBP, state after the last position); `state=None` starts from zeros.

        Whoever calls it for one position after the other gives its `weights()`, or they would be cast every time.
        """
        weights = weights or self.weights()
        # autocast would run cuDNN in float16 whatever its own type is, and every sum with its output in float32.
        with torch.autocast(x_TBD.device.type, enabled=False):
            x_TBD = x_TBD.to(weights[0].dtype)
            if state is None:
                outputs = self.lstm.proj_size or self.lstm.hidden_size
                batch = x_TBD.shape[1]
                state = x_TBD.new_zeros(1, batch, outputs), x_TBD.new_zeros(1, batch, self.lstm.hidden_size)
            y_TBP, output_1BP, cell_1BC = torch.lstm(x_TBD, state, weights, True, 1, 0.0, self.training, False, False)
        return y_TBP, (output_1BP, cell_1BC)


class BidirectionalLSTM(nn.Module):
    """Two LSTMs over each whole sentence, one in each direction, outputs side by side (GNMT section 3.2)."""

    def __init__(self, input_size: int, cell_size: int, output_size: int) -> None:
        super().__init__()
        self.forward_lstm = LSTM(input_size, cell_size, output_size)
        self.backward_lstm = LSTM(input_size, cell_size, output_size)

    def forward(self, x_TBD: Tensor, length_B: Tensor) -> Tensor:
        """y_TB2P; `length_B` real positions of each sentence. Padding positions come out unspecified."""
        turn_TB = reversed_positions(length_B, x_TBD.shape[0])
        ahead_TBP, _ = self.forward_lstm(x_TBD)
        back_TBP, _ = self.backward_lstm(turn_round(x_TBD, turn_TB))
        return torch.cat([ahead_TBP, turn_round(back_TBP, turn_TB)], dim=2)


def reversed_positions(length_B: Tensor, num_positions: int) -> Tensor:
    """index_TB with index[t, b] = length[b] - 1 - t within the sentence and t beyond it; its own inverse."""
    position_T1 = torch.arange(num_positions, device=length_B.device)[:, None]
    return torch.where(position_T1 < length_B, length_B - 1 - position_T1, position_T1)
