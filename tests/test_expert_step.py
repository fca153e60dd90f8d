"""The optimiser step of experts in all its forms: float64 formula, plain, fused; rounding; what stays as it is."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nmt.model.kernels import expert_step
from nmt.model.kernels.expert_step import (
    ExpertWeights,
    Step,
    plain_adam_step,
    plain_factored_step,
    plain_sums_of_squares,
    round_stochastically,
)
from tests.kernels import DEVICE, compile_launches, needs_triton

BF16 = torch.bfloat16
RATE, SCALE, BETA1, BETA2, EPSILON = 0.03, 1.7, 0.9, 0.98, 1e-3
UNTOUCHED = 1
SHAPES = [(3, 5, 7), (2, 70, 300), (3, 64, 16)]
KINDS = ["factored", "adam"]
WEIGHTS = ["float32", "master", "rounded"]


class Case(NamedTuple):
    """All that a step reads and writes."""

    weights: ExpertWeights
    g_EIO: Tensor
    moments: list[Tensor]
    count: Tensor


def new_case(kind: str, weights: str, shape: tuple[int, int, int], steps: int = 3, device: str = DEVICE) -> Case:
    """A case after so many steps, in which expert UNTOUCHED has no gradient."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=generator)
    g_EIO = torch.randn(shape, generator=generator)
    g_EIO *= 10.0 ** torch.randint(-2, 2, (*shape[:2], 1), generator=generator)
    g_EIO[UNTOUCHED] = 0.0
    sizes = [shape[:2], shape[::2]] if kind == "factored" else [shape, shape]
    moments = [torch.rand(size, generator=generator) for size in sizes]
    master = values.clone().to(device) if weights == "master" else None
    w_EIO = values.to(device, torch.float32 if weights == "float32" else BF16)
    type_of_gradient = torch.float32 if weights == "float32" else BF16
    held = ExpertWeights(w_EIO, master, first=40, stream=123456789)
    count = torch.tensor(float(steps), device=device)
    return Case(held, g_EIO.to(device, type_of_gradient), [each.to(device) for each in moments], count)


def new_step(skipped: bool = False, rate: float = RATE, device: str = DEVICE) -> Step:
    tensors = (torch.tensor(value, device=device) for value in (rate, SCALE, float(skipped)))
    return Step(*tensors, BETA1, BETA2, EPSILON)


def take_step(kind: str, form: str, case: Case, step: Step) -> None:
    if form == "plain":
        sums, factored, adam = plain_sums_of_squares, plain_factored_step, plain_adam_step
    else:
        from nmt.model.kernels import expert_step_triton as fused

        sums, factored, adam = fused.fused_sums_of_squares, fused.fused_factored_step, fused.fused_adam_step
    if kind == "factored":
        factored(case.weights, case.g_EIO, sums(case.g_EIO), *case.moments, case.count, step)
    else:
        adam(case.weights, case.g_EIO, *case.moments, case.count, step)


def expected(kind: str, case: Case) -> tuple[Tensor, list[Tensor]]:
    """(weights before rounding, moments) after a step, in float64."""
    value = case.weights.w_EIO if case.weights.master_EIO is None else case.weights.master_EIO
    w, g, (one, two), t = value.double(), case.g_EIO.double() / SCALE, case.moments, case.count.double() + 1
    if kind == "factored":
        r, c = (BETA2 * old.double() + (1 - BETA2) * (g**2).mean(dim) for old, dim in ((one, 2), (two, 1)))
        v = r[:, :, None] * c[:, None] / r.mean(1)[:, None, None] / (1 - BETA2**t)
        w = w - RATE * g / (v.sqrt() + EPSILON)
        w[UNTOUCHED] = value[UNTOUCHED].double()
        return w, [r, c]
    m, v = BETA1 * one.double() + (1 - BETA1) * g, BETA2 * two.double() + (1 - BETA2) * g**2
    return w - RATE * (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPSILON), [m, v]


def tensors_of(case: Case) -> list[Tensor]:
    master = [] if case.weights.master_EIO is None else [case.weights.master_EIO]
    return [case.weights.w_EIO, *master, *case.moments]


def bits_of(case: Case) -> list[list[Any]]:
    return [tensor.flatten().view(torch.int16).tolist() for tensor in tensors_of(case)]


forms = pytest.mark.parametrize("form", ["plain", pytest.param("fused", marks=needs_triton)])
kinds = pytest.mark.parametrize("kind", KINDS)


@forms
@kinds
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_the_formula(
    form: str, kind: str, weights: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plain form then has parts of different sizes.
    monkeypatch.setattr(expert_step, "_BUFFER_BYTES", 2 * 4 * math.prod(shape[1:]))
    case = new_case(kind, weights, shape)
    wanted, moments = expected(kind, case)
    take_step(kind, form, case, new_step())
    for actual, moment in zip(case.moments, moments, strict=True):
        torch.testing.assert_close(actual.double(), moment, rtol=1e-5, atol=1e-6)
    if weights == "rounded":
        # One of the two neighbours in bf16.
        spacing = 2.0 ** (wanted.abs().log2().floor() - 7)
        assert ((case.weights.w_EIO.double() - wanted).abs() <= 1.001 * spacing).all()
        return
    exact = case.weights.w_EIO if weights == "float32" else case.weights.master_EIO
    torch.testing.assert_close(exact.double(), wanted, rtol=1e-5, atol=1e-6)
    if weights == "master":
        # Triton's interpreter cuts off where a GPU rounds.
        interpreted = form == "fused" and DEVICE == "cpu"
        torch.testing.assert_close(case.weights.w_EIO, exact.bfloat16(), rtol=2**-7 if interpreted else 0, atol=0)


@needs_triton
@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_form_rounds_as_the_plain_one(kind: str, shape: tuple[int, int, int]) -> None:
    """The same bits decide, though arithmetic in another order may tip a few weights that lie on the edge."""
    cases = [new_case(kind, "rounded", shape) for _ in range(2)]
    for form, case in zip(("plain", "fused"), cases, strict=True):
        take_step(kind, form, case, new_step())
    differ = cases[0].weights.w_EIO != cases[1].weights.w_EIO
    assert differ.double().mean() < 1e-3
    assert not torch.equal(cases[0].weights.w_EIO, new_case(kind, "rounded", shape).weights.w_EIO)


@forms
@kinds
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_skipped_step_changes_no_bit(form: str, kind: str, weights: str) -> None:
    case = new_case(kind, weights, SHAPES[0])
    case.g_EIO[0, 1, 2], case.g_EIO[2, 0, 0] = math.nan, math.inf
    before = bits_of(case)
    take_step(kind, form, case, new_step(skipped=True))
    assert bits_of(case) == before


@forms
@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_expert_without_tokens_keeps_its_weights_and_its_averages_decay(form: str, weights: str) -> None:
    case = new_case("factored", weights, SHAPES[1])
    before = [tensor[UNTOUCHED].clone() for tensor in tensors_of(case)]
    take_step("factored", form, case, new_step())
    after = [tensor[UNTOUCHED] for tensor in tensors_of(case)]
    for tensor, old in zip(after[:-2], before[:-2], strict=True):
        assert torch.equal(tensor, old)
    for average, old in zip(after[-2:], before[-2:], strict=True):
        torch.testing.assert_close(average, BETA2 * old)


@forms
@kinds
def test_the_random_bits_are_those_of_the_expert_whatever_process_has_it(form: str, kind: str) -> None:
    whole, again = (new_case(kind, "rounded", SHAPES[0]) for _ in range(2))
    take_step(kind, form, whole, new_step())
    w_EIO, _, first, stream = again.weights
    for part in (slice(0, 1), slice(1, 3)):
        weights = ExpertWeights(w_EIO[part], None, first + part.start, stream)
        share = Case(weights, again.g_EIO[part], [each[part] for each in again.moments], again.count)
        take_step(kind, form, share, new_step())
    assert torch.equal(w_EIO, whole.weights.w_EIO)


# ----------------------------------------------------------------------------------------------------- rounding


def test_rounding_is_to_a_neighbour_and_leaves_what_bf16_has() -> None:
    exact = torch.randn(1000).bfloat16()
    for bits in (0, 0xFFFF):
        assert torch.equal(round_stochastically(exact.float(), torch.tensor(bits).int()), exact)
    x = torch.randn(1000)
    low, high = (round_stochastically(x, torch.tensor(bits).int()).float() for bits in (0, 0xFFFF))
    assert (low.abs() <= x.abs()).all()
    assert (x.abs() <= high.abs()).all()
    assert torch.equal(torch.nextafter(low.bfloat16(), high.bfloat16()).float(), high)


@forms
def test_the_mean_over_steps_and_elements_is_exact(form: str) -> None:
    """A quarter of the distance between two neighbours is added to every weight, in each of many steps."""
    distance, steps, shape = 2.0**-8, 32, (2, 8, 32)
    ones = torch.ones(shape, dtype=BF16, device=DEVICE)
    total = torch.zeros(shape, device=DEVICE)
    for count in range(steps):
        # A first step of Adam changes each weight by the rate, against the gradient's sign.
        moments = [torch.zeros(shape, device=DEVICE) for _ in range(2)]
        weights = ExpertWeights(ones.clone(), None, 0, 99)
        step = Step(*(torch.tensor(x, device=DEVICE) for x in (0.25 * distance, 1.0, 0.0)), 0.0, 0.0, 1e-30)
        case = Case(weights, ones, moments, torch.tensor(float(count), device=DEVICE))
        take_step("adam", form, case, step)
        total += (1.0 - weights.w_EIO.float()) / distance
    assert set(((1.0 - weights.w_EIO.float()) / distance).unique().tolist()) == {0.0, 1.0}
    number = total.numel() * steps
    assert float(total.sum() / number) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / number))
    # No element is rounded the same way in every step, and neighbours are not rounded alike.
    assert (total > 0).all()
    assert (total < steps).all()
    variance = float(total.var()) / steps
    assert variance == pytest.approx(0.25 * 0.75, rel=4 * math.sqrt(2 / total.numel()))


def test_experts_steps_and_matrices_have_bits_of_their_own() -> None:
    def bits(first: int, stream: int, t: int) -> Tensor:
        weights = ExpertWeights(torch.empty(2, 16, 64), None, first, stream)
        return expert_step._random_bits(weights, slice(0, 2), t).flatten().double()

    series = [bits(0, 5, 1), bits(2, 5, 1), bits(0, 6, 1), bits(0, 5, 2)]
    for each in series:
        assert each.min() >= 0
        assert each.max() <= 65535
        assert each.mean() == pytest.approx(65535 / 2, abs=4 * 65536 / math.sqrt(12 * each.numel()))
    correlation = torch.corrcoef(torch.stack(series)) - torch.eye(len(series)).double()
    assert correlation.abs().max() < 4 / math.sqrt(series[0].numel())
    assert torch.equal(bits(0, 5, 1)[1024:], bits(1, 5, 1)[:1024])


# ---------------------------------------------------------------------------------------------------- compiling


def launches() -> None:
    """Every kernel with each kind of weights, of the sizes of a network."""
    for kind in KINDS:
        for weights in WEIGHTS:
            case = new_case(kind, weights, (2, 512, 2048), device="cpu")
            take_step(kind, "fused", case, new_step(device="cpu"))


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_every_generation() -> None:
    assert [each for each in compile_launches(launches) if each.spilled] == []
