"""The three attention functions against their formulas, one query and one source position at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import Rows, make_rows
from nmt.config import AttentionConfig
from nmt.config.model import ATTENTION_FUNCTIONS
from nmt.model.attention import Attention
from nmt.model.rows import pack, unpack

WIDTH, SIZE = 4, 5
LENGTHS = torch.tensor([6, 1, 3])


def build(function: str, size: int = SIZE, heads: int = 1) -> Attention:
    attention = Attention(WIDTH, AttentionConfig(function=function, size=size, heads=heads)).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


def encoded() -> tuple[Tensor, Rows]:
    """(values_ND, rows) of three sentences."""
    return torch.randn(10, WIDTH, dtype=torch.float64), make_rows(LENGTHS.numpy())[0]


def score(attention: Attention, x_D: Tensor, y_D: Tensor) -> float:
    """A(x, y) as S17 eq. 21-22 and GNMT v2 write it."""
    total, v = 0.0, attention.v_N.tolist()
    for n in range(SIZE):
        key = sum(x_D[d].item() * attention.key.weight[n, d].item() for d in range(WIDTH))
        query = sum(y_D[d].item() * attention.query.weight[n, d].item() for d in range(WIDTH))
        match attention.function:
            case "product":
                total += v[n] * math.tanh(key) * math.tanh(query)
            case "additive":
                total += v[n] * math.tanh(key + query)
            case "normalised":
                unit = v[n] / math.sqrt(sum(value * value for value in v))
                total += attention.gain.item() * unit * math.tanh(key + query + attention.bias_N[n].item())
    return total


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_context_and_weights_are_the_formula(function: str):
    attention, (values_ND, rows) = build(function), encoded()
    query_TBD = torch.randn(2, len(LENGTHS), WIDTH, dtype=torch.float64)
    memory = attention.memory(values_ND, rows)
    context_TBD, weights_TBS = attention(query_TBD, memory)
    values_SBD = memory.values_SBD
    for t in range(2):
        for b, length in enumerate(LENGTHS.tolist()):
            exps = [math.exp(score(attention, values_SBD[s, b], query_TBD[t, b])) for s in range(length)]
            expected = [e / sum(exps) for e in exps] + [0.0] * (6 - length)
            assert weights_TBS[t, b].tolist() == pytest.approx(expected, abs=1e-12)
            context_D = sum(weight * values_SBD[s, b] for s, weight in enumerate(expected))
            torch.testing.assert_close(context_TBD[t, b], context_D)


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_weights_sum_to_one_and_vanish_at_padding(function: str):
    attention, (values_ND, rows) = build(function), encoded()
    query_TBD = 10 * torch.randn(7, len(LENGTHS), WIDTH, dtype=torch.float64)
    _, weights_TBS = attention(query_TBD, attention.memory(values_ND, rows))
    padding_SB = torch.arange(6)[:, None] >= LENGTHS
    torch.testing.assert_close(weights_TBS.sum(2), torch.ones(7, len(LENGTHS)).double())
    assert (weights_TBS[:, padding_SB.T] == 0).all()
    assert (weights_TBS[:, ~padding_SB.T] > 0).all()


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_whole_sentences_attend_as_one_position_does(function: str):
    attention, (values_ND, rows) = build(function), encoded()
    target, _ = make_rows(np.array([2, 7, 1]))
    query_MD = torch.randn(10, WIDTH, dtype=torch.float64)
    context_TBD, _ = attention(unpack(query_MD, target), attention.memory(values_ND, rows))
    torch.testing.assert_close(attention.attend(query_MD, values_ND, target, rows), pack(context_TBD, target))


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_a_selected_memory_is_the_memory_of_those_sentences(function: str):
    """Sentences repeated in the memory answer as the same queries do to the memory held once."""
    attention, (values_ND, rows) = build(function), encoded()
    memory = attention.memory(values_ND, rows)
    query_KBD = torch.randn(4, len(LENGTHS), WIDTH, dtype=torch.float64)
    context_KBD, weights_KBS = attention(query_KBD, memory)
    copied = memory.select(torch.arange(len(LENGTHS)).repeat(4))
    context_1RD, weights_1RS = attention(query_KBD.reshape(1, -1, WIDTH), copied)
    torch.testing.assert_close(context_KBD.reshape(1, -1, WIDTH), context_1RD)
    torch.testing.assert_close(weights_KBS.reshape(1, -1, 6), weights_1RS)
    some = memory.select(torch.tensor([2, 0]))
    torch.testing.assert_close(attention(query_KBD[:, [2, 0]], some)[0], context_KBD[:, [2, 0]])


def test_each_head_is_an_attention_over_its_part_of_everything():
    attention, (values_ND, rows) = build("product", size=6, heads=2), encoded()
    query_TBD = torch.randn(3, len(LENGTHS), WIDTH, dtype=torch.float64)
    context_TBD, weights_TBS = attention(query_TBD, attention.memory(values_ND, rows))
    weights = []
    for head, own in enumerate([slice(0, 3), slice(3, 6)]):
        alone = build("product", size=3)
        alone.key.weight.data = attention.key.weight.data[own]
        alone.query.weight.data = attention.query.weight.data[own]
        alone.v_N.data = attention.v_N.data[own]
        memory = alone.memory(values_ND, rows)
        part_D = slice(head * WIDTH // 2, (head + 1) * WIDTH // 2)
        memory = memory._replace(values_SBD=memory.values_SBD @ attention.value.weight[part_D].T)
        expected_TBD, of_head_TBS = alone(query_TBD, memory)
        torch.testing.assert_close(context_TBD[:, :, part_D], expected_TBD)
        weights.append(of_head_TBS)
    torch.testing.assert_close(weights_TBS, torch.stack(weights).mean(0))


def test_heads_of_whole_sentences_attend_as_those_of_one_position_do():
    attention, (values_ND, rows) = build("product", size=6, heads=2), encoded()
    target, _ = make_rows(np.array([2, 7, 1]))
    query_MD = torch.randn(10, WIDTH, dtype=torch.float64)
    context_TBD, _ = attention(unpack(query_MD, target), attention.memory(values_ND, rows))
    torch.testing.assert_close(attention.attend(query_MD, values_ND, target, rows), pack(context_TBD, target))
