"""LSTM layers: one call equals many, padding is invisible, sizes are the paper's."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nmt.model.lstm import LSTM, BidirectionalLSTM, reversed_positions
from nmt.model.rows import turn_round


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize(("cells", "width"), [(8, 5), (5, 5)])
def test_one_call_equals_one_position_at_a_time(cells: int, width: int):
    lstm, x_TBD = LSTM(3, cells, width).double(), randn(6, 4, 3)
    y_TBP, (output_1BP, cell_1BC) = lstm(x_TBD)
    assert y_TBP.shape == (6, 4, width)
    state = None
    for t in range(6):
        y_1BP, state = lstm(x_TBD[t : t + 1], state)
        torch.testing.assert_close(y_1BP[0], y_TBP[t])
    torch.testing.assert_close(state[0], output_1BP)
    torch.testing.assert_close(state[1], cell_1BC)
    assert cell_1BC.shape == (1, 4, cells)


def test_the_cell_is_the_textbook_one_with_a_recurrent_projection():
    """LSTMP: c' = f c + i g; y = W_p (o tanh c'), and y is what recurs."""
    lstm, x_TBD = LSTM(3, 8, 5).double(), randn(4, 2, 3)
    w = lstm.lstm
    y_BP, c_BC = torch.zeros(2, 5).double(), torch.zeros(2, 8).double()
    expected = []
    for x_BD in x_TBD:
        gates = x_BD @ w.weight_ih_l0.T + y_BP @ w.weight_hh_l0.T + w.bias_ih_l0 + w.bias_hh_l0
        i, f, g, o = gates.chunk(4, dim=1)
        c_BC = f.sigmoid() * c_BC + i.sigmoid() * g.tanh()
        y_BP = (o.sigmoid() * c_BC.tanh()) @ w.weight_hr_l0.T
        expected.append(y_BP)
    torch.testing.assert_close(lstm(x_TBD)[0], torch.stack(expected))


@pytest.mark.parametrize(("input_size", "weights"), [(512, 9_437_184), (1024, 13_631_488)])
def test_weights_of_the_paper_s_lstm(input_size: int, weights: int):
    with torch.device("meta"):
        lstm = LSTM(input_size, 2048, 512)
    sizes = {name: parameter.numel() for name, parameter in lstm.named_parameters()}
    assert sum(size for name, size in sizes.items() if "bias" not in name) == weights
    assert sum(size for name, size in sizes.items() if "bias" in name) == 8 * 2048


def test_equal_sizes_mean_no_projection():
    assert LSTM(3, 8, 8).lstm.proj_size == 0
    assert LSTM(3, 8, 7).lstm.proj_size == 7


def test_reversed_positions_turn_each_sentence_and_are_their_own_inverse():
    length_B = torch.tensor([4, 1, 3])
    index_TB = reversed_positions(length_B, 5)
    assert index_TB.T.tolist() == [[3, 2, 1, 0, 4], [0, 1, 2, 3, 4], [2, 1, 0, 3, 4]]
    identity_TB = torch.arange(5)[:, None].expand(5, 3)
    assert torch.equal(index_TB.gather(0, index_TB), identity_TB)


@pytest.mark.parametrize("each", [3, 6])
def test_bidirectional_equals_the_library_s_packed_one(each: int):
    layer, length_B = BidirectionalLSTM(4, 6, each).double(), torch.tensor([5, 2, 4])
    oracle = nn.LSTM(4, 6, proj_size=each if each < 6 else 0, bidirectional=True).double()
    for name, parameter in oracle.named_parameters():
        source = layer.backward_lstm if name.endswith("_reverse") else layer.forward_lstm
        parameter.data.copy_(source.lstm.get_parameter(name.removesuffix("_reverse")))
    x_TBD = randn(5, 3, 4)
    packed = pack_padded_sequence(x_TBD, length_B, enforce_sorted=False)
    expected_TB2P, _ = pad_packed_sequence(oracle(packed)[0])
    y_TB2P = layer(x_TBD, length_B)
    for b, length in enumerate(length_B.tolist()):
        torch.testing.assert_close(y_TB2P[:length, b], expected_TB2P[:length, b])


def test_padding_is_invisible_at_real_positions():
    """Batched equals one by one, whatever stands in the padding: even NaN."""
    layer, length_B = BidirectionalLSTM(4, 6, 3).double(), torch.tensor([5, 1, 3])
    x_TBD = randn(5, 3, 4)
    for b, length in enumerate(length_B.tolist()):
        x_TBD[length:, b] = torch.nan
    y_TB2P = layer(x_TBD, length_B)
    for b, length in enumerate(length_B.tolist()):
        alone_T12P = layer(x_TBD[:length, b : b + 1], length_B[b : b + 1])
        torch.testing.assert_close(y_TB2P[:length, b], alone_T12P[:, 0])


def test_the_backward_direction_reads_the_reversed_sentence():
    layer, x_TBD = BidirectionalLSTM(4, 6, 3).double(), randn(5, 2, 4)
    y_TB2P = layer(x_TBD, torch.tensor([5, 5]))
    torch.testing.assert_close(y_TB2P[:, :, :3], layer.forward_lstm(x_TBD)[0])
    torch.testing.assert_close(y_TB2P[:, :, 3:], layer.backward_lstm(x_TBD.flip(0))[0].flip(0))


def test_turning_round_is_differentiated_by_turning_round():
    turn_TB = reversed_positions(torch.tensor([4, 1, 3]), 5)
    assert gradcheck(lambda x_TBD: turn_round(x_TBD, turn_TB), (randn(5, 3, 2).requires_grad_(),))
