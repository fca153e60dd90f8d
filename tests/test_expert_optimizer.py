"""The optimiser of experts: the factored formula, what it equals and leaves alone, bf16 weights, and checkpoints."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nmt.model.kernels.expert_step
from nmt.checkpoint import list_checkpoints
from nmt.config import ModelConfig, TrainingConfig
from nmt.model.experts import ALL_EXPERTS, Experts, ExpertShard
from nmt.model.names import is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.parameters import read_tensors
from nmt.training.optim import (
    COLUMN,
    MASTER,
    ROW,
    clipped_step,
    make_optimizer,
    set_rate,
    state_shapes,
    tensors_to_save,
)
from tests.test_training import clones
from tests.toy import HARD, saved, steps_logged, train

FACTORED = TrainingConfig(expert_optimizer="factored")
IDLE = 2


class Layer(nn.Module):
    """A dense matrix and experts, named as in the network."""

    def __init__(
        self, num_experts: int = 5, hidden_sizes: tuple[int, ...] = (7, 4), share: ExpertShard = ALL_EXPERTS
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 3)
        self.moe = nn.ModuleDict({"experts": Experts(num_experts, 6, list(hidden_sizes), share)})
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def experts(self) -> list[Tensor]:
        """Their matrices, one tensor a layer."""
        return list(self.moe["experts"].weights)


def set_gradients(layer: Layer, step: int, size: float) -> None:
    """Random ones of very different rows and columns; expert IDLE gets none."""
    generator = torch.Generator().manual_seed(step)
    for parameter in layer.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * size
        if parameter.dim() == 3:
            gradient *= 10.0 ** torch.randint(-3, 2, parameter.shape[:2], generator=generator)[:, :, None]
            gradient *= 10.0 ** torch.randint(-3, 2, parameter.shape[::2], generator=generator)[:, None]
            gradient[IDLE] = 0.0
        parameter.grad = gradient.to(parameter.dtype)


class Reference:
    """The formula, one expert after the other in float64."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.w = [[w.double() for w in w_EIO.detach()] for w_EIO in matrices]
        self.r = [[torch.zeros(len(w)).double() for w in experts] for experts in self.w]
        self.c = [[torch.zeros(w.shape[1]).double() for w in experts] for experts in self.w]

    def step(self, t: int, rate: float, gradients: list[Tensor], beta2: float = 0.98, epsilon: float = 1e-9) -> None:
        for w, r, c, g_EIO in zip(self.w, self.r, self.c, gradients, strict=True):
            for expert, g in enumerate(g_EIO.double()):
                r[expert] = beta2 * r[expert] + (1 - beta2) * (g**2).mean(1)
                c[expert] = beta2 * c[expert] + (1 - beta2) * (g**2).mean(0)
                if g.any():
                    r_hat, c_hat = r[expert] / (1 - beta2**t), c[expert] / (1 - beta2**t)
                    v = torch.outer(r_hat, c_hat) / r_hat.mean()
                    w[expert] = w[expert] - rate * g / (v.sqrt() + epsilon)


@pytest.mark.parametrize("hidden_sizes", [(7,), (7, 4)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_the_steps_of_experts_are_those_of_the_formula(clip_norm: float, hidden_sizes: tuple[int, ...]) -> None:
    """Of the clipped gradient; of all else they are Adam's."""
    ours, theirs = Layer(hidden_sizes=hidden_sizes), Layer(hidden_sizes=hidden_sizes)
    theirs.load_state_dict(ours.state_dict())
    optimizer, adam = make_optimizer(ours, FACTORED), make_optimizer(theirs, TrainingConfig())
    reference, idle = Reference(ours.experts()), [w_EIO[IDLE].clone() for w_EIO in ours.experts()]
    for step, size in enumerate((0.01, 3.0, 100.0, 1e-6, 1.0)):
        for layer in (ours, theirs):
            set_gradients(layer, step, size)
        rate, gradients = 0.1 / (step + 1), [w_EIO.grad.clone() for w_EIO in ours.experts()]
        done, expected = clipped_step(optimizer, clip_norm, rate), clipped_step(adam, clip_norm, rate)
        torch.testing.assert_close(done.gradient_norm, expected.gradient_norm)
        scale = max(1.0, float(done.gradient_norm) / clip_norm) if clip_norm else 1.0
        reference.step(step + 1, rate, [gradient / scale for gradient in gradients])
        for w_EIO, w, r, c in zip(ours.experts(), reference.w, reference.r, reference.c, strict=True):
            torch.testing.assert_close(w_EIO.double(), torch.stack(w), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[w_EIO][ROW].double(), torch.stack(r), rtol=1e-5, atol=0)
            torch.testing.assert_close(optimizer.state[w_EIO][COLUMN].double(), torch.stack(c), rtol=1e-5, atol=0)
            assert optimizer.state[w_EIO]["step"] == step + 1
        for actual, wanted in zip(ours.dense.parameters(), theirs.dense.parameters(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(w_EIO[IDLE], before) for w_EIO, before in zip(ours.experts(), idle, strict=True))


def test_it_is_adam_without_first_moment_where_the_square_has_rank_one() -> None:
    ours, theirs = Layer(), Layer()
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, FACTORED)
    adam = torch.optim.Adam(theirs.parameters(), betas=(0.0, FACTORED.adam_beta2), eps=FACTORED.adam_epsilon)
    factors = [(torch.rand(w.shape[:2]) + 0.1, torch.rand(w.shape[::2]) + 0.1) for w in ours.experts()]
    for step in range(4):
        for layer in (ours, theirs):
            set_gradients(layer, step, 1.0)
            for w_EIO, (a_EI, b_EO) in zip(layer.experts(), factors, strict=True):
                # The same squares up to a factor, or their average would not have rank one.
                w_EIO.grad = (step + 1) * w_EIO.grad.sign() * a_EI[:, :, None] * b_EO[:, None]
        adam.param_groups[0]["lr"] = 0.05
        adam.step()
        clipped_step(optimizer, 0.0, 0.05)
        for actual, wanted in zip(ours.experts(), theirs.experts(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["dense.bias", "moe.experts.weights.1"])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_gradient_that_is_not_finite_changes_no_bit(bad: float, where: str, good_steps: int) -> None:
    layer = Layer()
    optimizer = make_optimizer(layer, FACTORED)
    for step in range(good_steps):
        set_gradients(layer, step, 1.0)
        clipped_step(optimizer, 1.0, 0.1)
    before = clones(layer, optimizer)
    set_gradients(layer, 9, 1.0)
    layer.get_parameter(where).grad.view(-1)[1] = bad
    assert clipped_step(optimizer, 1.0, 0.1).skipped == 1
    after = clones(layer, optimizer)
    before += [torch.zeros_like(tensor) for tensor in after[len(before) :]]
    # View as integers: -0.0 is another bit than 0.0.
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(after, before, strict=True))
    set_gradients(layer, 10, 1.0)
    assert clipped_step(optimizer, 1.0, 0.1).skipped == 0
    assert all(tensor.isfinite().all() for tensor in clones(layer, optimizer))
    assert not torch.equal(layer.experts()[0], after[2])


def test_how_many_experts_are_worked_on_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    for limit in (2**28, 0, 2 * 6 * 7 * 4):
        monkeypatch.setattr(nmt.model.kernels.expert_step, "_BUFFER_BYTES", limit)
        torch.manual_seed(1)
        layer = Layer(num_experts=7)
        optimizer = make_optimizer(layer, FACTORED)
        for step in range(3):
            set_gradients(layer, step, 1.0)
            clipped_step(optimizer, 1.0, 0.1)
        layers.append(clones(layer, optimizer))
    for other in layers[1:]:
        assert all(map(torch.equal, other, layers[0]))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-22, 1e-15, 1e-10, 1e15])
def test_gradients_whose_squares_or_products_leave_float32_do_no_harm(size: float) -> None:
    layer = Layer()
    optimizer, reference = make_optimizer(layer, FACTORED), Reference(layer.experts())
    for step in range(3):
        set_gradients(layer, step, size)
        reference.step(step + 1, 0.1, [w_EIO.grad.clone() for w_EIO in layer.experts()])
        assert clipped_step(optimizer, 0.0, 0.1).skipped == 0
        assert all(tensor.isfinite().all() for tensor in clones(layer, optimizer))
        for w_EIO, w in zip(layer.experts(), reference.w, strict=True):
            torch.testing.assert_close(w_EIO.double(), torch.stack(w), rtol=1e-5, atol=2e-6)


def test_what_is_remembered_is_what_state_shapes_says(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Seq2Seq(tiny_config(), 13)
    for kind in ("adam", "factored"):
        optimizer = make_optimizer(model, TrainingConfig(expert_optimizer=kind))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        clipped_step(optimizer, 1.0, 0.1)
        for name, parameter in model.named_parameters():
            found = {key: tuple(tensor.shape) for key, tensor in optimizer.state[parameter].items()}
            assert found == state_shapes(name, parameter.shape, kind)
        optimizer.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_experts_is_adam_s(tiny_config: Callable[..., ModelConfig]) -> None:
    assert isinstance(make_optimizer(Seq2Seq(tiny_config(num_experts=0), 13), FACTORED), torch.optim.Adam)


KINDS = ["adam", "factored"]


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_have_a_rate_of_their_own(kind: str, masters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only theirs differs: a step is proportional to its rate, and moments do not depend on it."""
    if masters:
        masters_everywhere(monkeypatch)
    layers = [Layer() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    before = {name: parameter.detach().clone() for name, parameter in layers[0].named_parameters()}
    saved = []
    for layer, factor in zip(layers, (1.0, 0.25), strict=True):
        optimizer = make_optimizer(layer, TrainingConfig(expert_optimizer=kind, expert_rate=factor))
        set_gradients(layer, 1, 1.0)
        clipped_step(optimizer, 0.0, 0.1)
        saved.append(tensors_to_save(layer, optimizer))
    for name, start in before.items():
        whole, part = (each["model"][name] - start for each in saved)
        factor = 0.25 if is_expert(name) else 1.0
        torch.testing.assert_close(part, factor * whole, rtol=1e-4, atol=1e-6)
        assert whole.any()
    for one, other in zip(*(each["training"].values() for each in saved), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------- experts in bf16


def masters_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts get bf16 parameters with masters on a CPU too, as on a GPU."""
    monkeypatch.setattr(TrainingConfig, "experts_in_bf16", lambda _self, on_gpu: True)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_take_the_steps_of_float32_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, ours = Layer(), Layer()
    ours.load_state_dict(exact.state_dict())
    training = TrainingConfig(expert_optimizer=kind)
    float32 = make_optimizer(exact, training)
    masters_everywhere(monkeypatch)
    optimizer = make_optimizer(ours, training)
    assert [w_EIO.dtype for w_EIO in ours.experts()] == [torch.bfloat16] * 3
    for step in range(3):
        set_gradients(ours, step, 1.0)
        for one, other in zip(ours.parameters(), exact.parameters(), strict=True):
            other.grad = one.grad.clone().to(other.dtype)
        done, expected = (clipped_step(each, 0.5, 0.01) for each in (optimizer, float32))
        torch.testing.assert_close(done.gradient_norm, expected.gradient_norm)
    saved = tensors_to_save(ours, optimizer)
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(saved["model"][name], parameter.detach(), rtol=1e-5, atol=1e-6)
        for moment, value in float32.state[parameter].items():
            torch.testing.assert_close(saved["training"][f"{moment}.{name}"], value, rtol=1e-5, atol=1e-7)
    assert saved["training"].keys() == tensors_to_save(exact, float32)["training"].keys()
    for w_EIO in ours.experts():
        assert torch.equal(w_EIO, optimizer.state[w_EIO][MASTER].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_experts_is_rounded_as_in_the_whole(kind: str) -> None:
    training = TrainingConfig(expert_optimizer=kind, expert_weights="bfloat16")
    layers = [Layer(num_experts=6), *(Layer(num_experts=6, share=ExpertShard(rank, 2)) for rank in range(2))]
    whole, *shares = layers
    for rank, share in enumerate(shares):
        for w_EIO, own_EIO in zip(whole.experts(), share.experts(), strict=True):
            own_EIO.data.copy_(w_EIO[3 * rank : 3 * rank + 3])
    optimizers = [make_optimizer(layer, training) for layer in layers]
    for step in range(3):
        set_gradients(whole, step, 1.0)
        for rank, share in enumerate(shares):
            for w_EIO, own_EIO in zip(whole.experts(), share.experts(), strict=True):
                own_EIO.grad = w_EIO.grad[3 * rank : 3 * rank + 3].clone()
        for optimizer in optimizers:
            clipped_step(optimizer, 0.0, 0.01)
    for w_EIO, *parts in zip(*(layer.experts() for layer in layers), strict=True):
        assert torch.equal(torch.cat(parts), w_EIO)


def test_small_changes_are_kept_on_average_without_masters() -> None:
    """Each is a hundredth of what bf16 can tell apart."""
    layer = Layer(num_experts=40)
    for w_EIO in layer.experts():
        w_EIO.data.fill_(1.0)
    optimizer = make_optimizer(layer, TrainingConfig(expert_weights="bfloat16"))
    for _ in range(100):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, -1.0)
        clipped_step(optimizer, 0.0, 2**-7 / 100)
    for w_EIO in layer.experts():
        assert len(w_EIO.unique()) > 2
        assert float(w_EIO.detach().double().mean()) == pytest.approx(
            1 + 2**-7, abs=4 * 2**-7 / math.sqrt(w_EIO.numel())
        )


def test_a_rate_is_set_apart_from_the_step() -> None:
    """As where the step is a captured graph, which has no number of the host."""
    at_once, apart = Layer(), Layer()
    apart.load_state_dict(at_once.state_dict())
    optimizers = [make_optimizer(layer, FACTORED) for layer in (at_once, apart)]
    for step, rate in enumerate((0.1, 0.02)):
        for layer in (at_once, apart):
            set_gradients(layer, step, 1.0)
        clipped_step(optimizers[0], 1.0, rate)
        set_rate(optimizers[1], rate)
        clipped_step(optimizers[1], 1.0, None)
    assert all(map(torch.equal, clones(at_once, optimizers[0]), clones(apart, optimizers[1])))


# ----------------------------------------------------------------------------------------------------- whole runs

IN_BF16 = "training.expert_weights=bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "masters", "bfloat16"])
def test_going_on_changes_no_bit(corpus: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = (*HARD, "training.expert_optimizer=factored")
    if weights == "masters":
        masters_everywhere(monkeypatch)
    if weights == "bfloat16":
        changes += (IN_BF16,)
    whole = train(corpus, "whole", 6, *changes)
    for steps in (1, 4, 6):
        stopped = train(corpus, "stopped", steps, *changes)
    assert saved(stopped) == saved(whole)
    assert steps_logged(stopped, "train") == list(range(1, 7))
    newest = list_checkpoints(whole / "checkpoints")[-1].path
    written = read_tensors(newest / "training")
    assert written[f"{ROW}.encoder.moe_layers.moe.1.experts.weights.0"].shape == (4, 16)
    assert all(".experts." not in name for name in written if name.startswith("exp_avg."))
    values = read_tensors(newest / "model")
    assert {value.dtype for value in (written | values).values()} == {torch.float32}
    held = {name: torch.equal(value, value.bfloat16().float()) for name, value in values.items() if is_expert(name)}
    assert set(held.values()) == {weights == "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_a_gpu_and_of_a_cpu_are_alike(corpus: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masters and without, a run resumes from the other's checkpoint, with all its digits."""
    changes = (f"training.expert_optimizer={kind}",)
    for name in ("cpu", "gpu"):
        train(corpus, name, 2, *changes)
    before = saved(corpus / "cpu")
    with monkeypatch.context() as on_gpu:
        masters_everywhere(on_gpu)
        train(corpus, "gpu", 4, *changes)
    between = saved(corpus / "gpu")
    assert {part: between[part].keys() for part in ("model", "training")} == {
        part: before[part].keys() for part in ("model", "training")
    }
    train(corpus, "cpu", 4, *changes)
    trained = (
        read_tensors(list_checkpoints(corpus / name / "checkpoints")[-1].path / "model") for name in ("cpu", "gpu")
    )
    for one, other in zip(*(each.values() for each in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.002)
    train(corpus, "gpu", 6, *changes)
