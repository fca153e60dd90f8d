"""LSTM layers: one call equals many, padding is invisible, sizes are the paper's."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nmt.batch import Rows, make_rows
from nmt.model.lstm import LSTM, BidirectionalLSTM
from nmt.model.rows import pack, turn_round, unpack


def rows_of(*lengths: int) -> Rows:
    return make_rows(np.array(lengths))[0]


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize(("cells", "width"), [(8, 5), (5, 5)])
def test_one_call_equals_one_position_at_a_time(cells: int, width: int):
    lstm, x_TBD, rows = LSTM(3, cells, width).double(), randn(6, 4, 3), rows_of(6, 6, 6, 6)
    y_TBP = unpack(lstm(pack(x_TBD, rows), rows), rows)
    assert y_TBP.shape == (6, 4, width)
    state = None
    for t in range(6):
        state = lstm.step(x_TBD[t], state)
        torch.testing.assert_close(state[0], y_TBP[t])
        assert state[1].shape == (4, cells)


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
    rows = rows_of(4, 4)
    torch.testing.assert_close(lstm(pack(x_TBD, rows), rows), pack(torch.stack(expected), rows))


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


@pytest.mark.parametrize("each", [3, 6])
def test_bidirectional_equals_the_library_s_packed_one(each: int):
    layer, length_B = BidirectionalLSTM(4, 6, each).double(), torch.tensor([5, 2, 4])
    oracle = nn.LSTM(4, 6, proj_size=each if each < 6 else 0, bidirectional=True).double()
    for name, parameter in oracle.named_parameters():
        source = layer.backward_lstm if name.endswith("_reverse") else layer.forward_lstm
        parameter.data.copy_(source.lstm.get_parameter(name.removesuffix("_reverse")))
    x_TBD, rows = randn(5, 3, 4), rows_of(*length_B.tolist())
    packed = pack_padded_sequence(x_TBD, length_B, enforce_sorted=False)
    expected_TB2P, _ = pad_packed_sequence(oracle(packed)[0])
    y_TB2P = unpack(layer(pack(x_TBD, rows), rows), rows)
    torch.testing.assert_close(y_TB2P, expected_TB2P)


def test_sentences_do_not_see_each_other():
    """Batched equals one by one."""
    layer, lengths = BidirectionalLSTM(4, 6, 3).double(), (5, 1, 3)
    rows = rows_of(*lengths)
    x_ND = randn(9, 4)
    x_TBD, y_TB2P = unpack(x_ND, rows), unpack(layer(x_ND, rows), rows)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(y_TB2P[:length, b], layer(x_TBD[:length, b], rows_of(length)))


def test_the_backward_direction_reads_the_reversed_sentence():
    layer, x_TD, rows = BidirectionalLSTM(4, 6, 3).double(), randn(5, 4), rows_of(5)
    y_T2P = layer(x_TD, rows)
    torch.testing.assert_close(y_T2P[:, :3], layer.forward_lstm(x_TD, rows))
    torch.testing.assert_close(y_T2P[:, 3:], layer.backward_lstm(x_TD.flip(0), rows).flip(0))


def test_turning_round_is_differentiated_by_turning_round():
    turn_N = rows_of(4, 1, 3).turn_N
    assert gradcheck(lambda x_ND: turn_round(x_ND, turn_N), (randn(8, 2).requires_grad_(),))
