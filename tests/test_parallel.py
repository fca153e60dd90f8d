"""Several processes compute what one computes: outputs, gradients, balance losses, optimiser step."""

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nmt.batch import Batch, covering, fit, make_batch
from nmt.config import AttentionConfig, Config, ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from nmt.cost.step import places
from nmt.errors import UserError
from nmt.model import routes
from nmt.model.experts import ExpertShard, MoE
from nmt.model.gating import balance_loss
from nmt.model.names import is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import AllToAllDispatcher, fixed_sizes, make_model
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.parallel.transfer import Transfer
from nmt.tokens import NUM_SPECIAL
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater
from tests.lessons import with_teacher
from tests.processes import mirrored, run_ranks
from tests.replayed import recordings

VOCABULARY = 13
# Two for each of up to four processes.
LENGTHS = [(3, 4), (1, 2), (5, 1), (2, 7), (6, 6), (4, 4), (1, 1), (7, 3)]

HIERARCHICAL = {"gating": "hierarchical", "branching": 4, "k": 1}
CASES: dict[str, dict[str, Any]] = {
    "noisy_top_k": {},
    "hierarchical": HIERARCHICAL,
    "hierarchical, groups across processes": {"gating": "hierarchical", "branching": 2, "k": 2},
    "softmax_top_k": {"gating": "softmax_top_k"},
    "strictly_balanced": {"gating": "strictly_balanced"},
    "all active": {"num_experts": 4, "k": 4},
    "deep experts": {"hidden_sizes": [5, 4, 6]},
    "no experts": {"num_experts": 0},
    "sigmoid": {"output": "sigmoid"},
    "factored": {"hidden_sizes": [7, 5]},
    "R-Drop": {},
    "R-Drop, strictly balanced": {"gating": "strictly_balanced"},
    "biases": HIERARCHICAL | {"bias_rate": 0.1, "straight_through": True},
    "a teacher": {},
}


def config_of(
    case: str, micro_batches: int, group: int = 0, training: bool = True, parallel: dict[str, bool] | None = None
) -> Config:
    moe = {"num_experts": 8, "k": 2, "hidden_sizes": [7], "w_importance": 0.3, "w_load": 0.2}
    moe |= {"output_masking": 0.2} | CASES.get(case, {})
    model = ModelConfig(
        hidden_size=6,
        cell_size=8,
        dropout=0.2 if training else 0.0,
        word_dropout=0.1,
        attention=AttentionConfig(size=5),
        moe=MoEConfig(**moe),
    )
    optimizer = "factored" if case == "factored" else "adam"
    training_config = TrainingConfig(
        micro_batches=micro_batches, precision="fp32", device="cpu", clip_norm=0.5, expert_optimizer=optimizer
    )
    if case.startswith("R-Drop"):
        training_config.r_drop = 3.0
    if case == BF16:
        training_config.expert_weights = "bfloat16"
    return Config(model=model, training=training_config, parallel=ParallelConfig(group, **parallel or {}))


def micro_batches_of(number: int) -> list[Batch]:
    """All sentences, in `number` micro-batches."""
    generator = np.random.default_rng(3)
    sides = [[generator.integers(NUM_SPECIAL, VOCABULARY, size=n) for n in side] for side in zip(*LENGTHS, strict=True)]
    size = len(LENGTHS) // number
    return [
        make_batch(np.arange(size), *(side[start : start + size] for side in sides))
        for start in range(0, len(LENGTHS), size)
    ]


def trained_model(config: Config, world: World) -> Seq2Seq:
    """A float64 model whose gates have preferences and noise."""
    torch.manual_seed(1)
    model = make_model(config, VOCABULARY, world).double()
    for name, parameter in model.named_parameters():
        if ".gate." in name and "threshold" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def run_updates(
    case: str,
    total: int,
    group: int = 0,
    training: bool = True,
    parallel: dict[str, bool] | None = None,
    room: float | None = None,
    recorded: bool = False,
) -> dict[str, Any]:
    """Outputs, gradients and parameters of two updates of `total` micro-batches, by all processes there are.

    With `room`, batches are fitted and exchanges have fixed sizes, as in recordings, or are `recorded`.
    """
    config = config_of(case, total, group, training, parallel)
    world = World.start("cpu", config.parallel)
    model = trained_model(config, world).train(training)
    for name, parameter in model.named_parameters():
        # Without noise its weights take no part, which data parallelism must know beforehand.
        parameter.requires_grad_(parameter.requires_grad and (training or "w_noise" not in name))
    optimizer = make_optimizer(model, config.training)
    with recordings(model, optimizer) if recorded else nullcontext():
        return _updated(case, total, Updater(model, optimizer, config, world), room, recorded)


def _updated(case: str, total: int, updater: Updater, room: float | None, recorded: bool) -> dict[str, Any]:
    model, optimizer, world = updater.model, updater.optimizer, updater.world
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    done = []
    batches = micro_batches_of(total)
    if case == "a teacher":
        batches = [with_teacher(batch, VOCABULARY) for batch in batches]
    sizes = updater.sizes or FixedSizes(updater.config.model.moe, world.device)
    if room is not None:
        sizes.room = room
        shape = covering(*(batch.shape for batch in batches)).with_room(1)
        batches = [fit(batch, shape) for batch in batches]
    for step in (1, 2):
        with fixed_sizes(model, None if room is None or recorded else sizes):
            out = updater.update(batches[world.rank :: world.size], step, 0.01)
        assert not sizes.exceeded
        losses = [balance_loss(sums, 0.3, 0.2) for sums in out.sums.values()]
        done.append((world.sum(out.nll.clone()), out.gradient_norm, *losses))
    with torch.no_grad():
        outputs = model.eval()(micro_batches_of(8)[0]).nll
    return {
        "figures": torch.stack([torch.stack(list(each)) for each in done]),
        "outputs": outputs,
        "gradients": gradients,
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "room": sizes.room,
        "drift": world.rank,
    }


def whole(results: list[dict[str, Any]], what: str, group: int) -> dict[str, torch.Tensor]:
    """The tensors of one expert group put together; dense ones must be the same in all processes."""
    joined = {}
    for name in results[0][what]:
        parts = [result[what][name] for result in results]
        if is_expert(name):
            joined[name] = torch.cat(parts[:group])
            for start in range(group, len(parts), group):
                assert torch.equal(torch.cat(parts[start : start + group]), joined[name]), name
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            joined[name] = parts[0]
    return joined


def run_cases(total: int, group: int, training: bool, cases: list[str], **parallel: bool) -> dict[str, Any]:
    return {case: run_updates(case, total, group, training, parallel) for case in cases}


def run_fixed(total: int, group: int) -> dict[str, Any]:
    return {case: run_updates(case, total, group, room=ROOM) for case in FIXED}


def run_recorded(total: int, group: int, room: float) -> dict[str, Any]:
    return {case: run_updates(case, total, group, room=room, recorded=True) for case in RECORDED}


def assert_same(several: list[dict[str, Any]], one: dict[str, Any], group: int) -> None:
    for result in several:
        torch.testing.assert_close(result["figures"], one["figures"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result["outputs"], one["outputs"], rtol=1e-10, atol=1e-10)
    for what in ("gradients", "parameters"):
        joined = whole(several, what, group)
        assert joined.keys() == one[what].keys()
        for name, tensor in one[what].items():
            torch.testing.assert_close(joined[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: n + text)


BF16 = "experts in bf16"
REPLICAS = ["noisy_top_k", "no experts", "factored"]
# Tokens, and those that are not padding, of either process.
OWN_TOKENS = [[(9, 9), (7, 4)], [(9, 5), (3, 0)], [(5, 2), (0, 0)]]
ROOM, LITTLE_ROOM = 2.0, 0.1  # the loads of so few tokens are uneven
FIXED = [case for case in CASES if CASES[case].get("gating") != "strictly_balanced"]
RECORDED = ["noisy_top_k", "hierarchical", "no experts", "factored", "R-Drop", "biases"]
HALVED = ["noisy_top_k", "hierarchical", "strictly_balanced", "deep experts", "sigmoid"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(2, folder, _two_ranks)


def _two_ranks() -> dict[str, Any]:
    joined = [case for case in CASES if CASES[case].get("gating") != "strictly_balanced"]
    return {
        "micro-batches": run_cases(2, 0, True, list(CASES)),
        "more micro-batches": run_cases(4, 0, True, ["noisy_top_k", "hierarchical"]),
        "replicas": run_cases(2, 1, True, [*REPLICAS, BF16]),
        "joined": run_cases(2, 0, False, joined),
        "halves": run_cases(2, 0, True, HALVED, overlap_exchange=True),
        "fixed": run_fixed(2, 0),
        "recorded": run_recorded(2, 0, ROOM),
        "recorded, little room": run_recorded(2, 0, LITTLE_ROOM),
        "recorded replicas": run_recorded(2, 1, ROOM),
        "recorded, more micro-batches": run_recorded(4, 0, LITTLE_ROOM),
        "in turn": run_cases(2, 0, True, ["noisy_top_k"], overlap=False),
        "own tokens": [_own_tokens(*sizes[int(os.environ["RANK"])]) for sizes in OWN_TOKENS],
    }


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_two_micro_batches(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """With dropout, masked outputs and noise, which belong to the micro-batch and not to the process."""
    assert_same([result["micro-batches"][case] for result in two_ranks], run_updates(case, 2), 2)


def test_replicas_of_bf16_experts_stay_equal(two_ranks: list[dict[str, Any]]) -> None:
    """Their gradients are added in bf16, and their weights are rounded alike."""
    several, one = [result["replicas"][BF16] for result in two_ranks], run_updates(BF16, 2)
    for name, tensor in whole(several, "parameters", 1).items():
        assert tensor.dtype == (torch.bfloat16 if is_expert(name) else torch.float64)
        torch.testing.assert_close(tensor, one["parameters"][name], rtol=0.02, atol=0.03)
    assert several[0]["figures"].tolist() == several[1]["figures"].tolist()
    torch.testing.assert_close(several[0]["figures"], one["figures"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("gating") != "strictly_balanced"])
def test_two_processes_are_one_with_the_joined_batch(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """Without dropout and noise. A strictly balanced gate fills its experts for each micro-batch, so it differs."""
    assert_same([result["joined"][case] for result in two_ranks], run_updates(case, 1, training=False), 2)


@pytest.mark.parametrize("case", ["noisy_top_k", "hierarchical"])
def test_two_processes_with_two_micro_batches_each(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["more micro-batches"][case] for result in two_ranks], run_updates(case, 4), 2)


@pytest.mark.parametrize("case", REPLICAS)
def test_expert_groups_smaller_than_the_world(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["replicas"][case] for result in two_ranks], run_updates(case, 2), 1)


@pytest.mark.parametrize("case", HALVED)
def test_tokens_that_travel_in_halves_come_to_the_same(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["halves"][case] for result in two_ranks], run_updates(case, 2), 2)


@pytest.mark.parametrize("case", FIXED)
def test_exchanges_of_fixed_sizes_come_to_the_same(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["fixed"][case] for result in two_ranks], run_updates(case, 2, room=ROOM), 2)


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize(
    ("what", "total", "group", "room"),
    [
        ("recorded", 2, 2, ROOM),
        ("recorded, little room", 2, 2, LITTLE_ROOM),
        ("recorded replicas", 2, 1, ROOM),
        ("recorded, more micro-batches", 4, 2, LITTLE_ROOM),
    ],
)
def test_recorded_steps_of_two_processes_are_those_of_one(
    case: str, what: str, total: int, group: int, room: float, two_ranks: list[dict[str, Any]]
) -> None:
    """A step whose exchanges had too little room is done again with more, by both."""
    results = [result[what][case] for result in two_ranks]
    assert_same(results, run_updates(case, total, room=ROOM), group)
    assert results[0]["room"] == results[1]["room"]
    assert (results[0]["room"] > room) == (room == LITTLE_ROOM and case != "no experts")


def test_one_half_travels_while_experts_work_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: before the experts see the first half, the second is on its way."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    events: list[str] = []
    for owner, name in ((Transfer, "begin"), (Transfer, "finish"), (routes, "grouped_matmul")):
        function = getattr(owner, name)

        def noted(*arguments: Any, function: Any = function, name: str = name, **options: Any) -> Any:
            # An expert of one hidden layer is two products.
            if events[-1:] != [name] or name != "grouped_matmul":
                events.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)
    try:
        moe = MoE(6, 4, config_of("noisy_top_k", 1).model.moe)
        moe.dispatcher = AllToAllDispatcher(dist.group.WORLD, 1, halves=True)
        y_TD, _ = moe(torch.randn(9, 6, requires_grad=True))
        one_half = ["finish", "grouped_matmul", "begin"]
        expected = ["begin", "begin", *one_half, *one_half, "finish", "finish"]
        assert events == expected
        events.clear()
        y_TD.sum().backward()
        assert events == expected
    finally:
        dist.destroy_process_group()


CHOICES = {
    "flat": {},
    "groups": HIERARCHICAL,
    "strictly balanced": {"gating": "strictly_balanced", "k": 3},
    "all active": {"k": 8},
}


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("padding", [0, 4, 15])
@pytest.mark.parametrize("case", CHOICES)
def test_a_row_travels_once_to_each_process_with_experts_of_its_token(
    case: str, padding: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forth and back, and so do the gradients of both, whatever the number of its experts there."""
    travelled: list[tuple[torch.Tensor, list[int]]] = []

    def noted(received: torch.Tensor, sent: torch.Tensor, _: Any = None, sizes: Any = None, **named: Any) -> Any:
        if sent.shape[1:] == (6,):
            travelled.append((sent.detach().clone(), sizes))
        return mirrored(received, sent)

    monkeypatch.setattr(dist, "all_to_all_single", noted)
    moe = MoE(6, 8, MoEConfig(8, **{"k": 2, "hidden_sizes": [7]} | CHOICES[case]), ExpertShard(0, 4))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe.dispatcher = AllToAllDispatcher(None, 4, halves)
    x_TD, real_T = torch.randn(15, 6, requires_grad=True), torch.arange(15) < 15 - padding
    y_TD, gate = moe(x_TD, real_T=real_T)
    y_TD.sum().backward()
    parts = [(0, 8), (8, 15)] if halves else [(0, 15)]
    for (begin, end), (rows_VD, sizes) in zip(parts, travelled, strict=False):
        wanted = [[t for t in range(begin, end) if m in gate.expert_TK[t] // 2] for m in range(4)]
        assert sizes == [len(tokens) for tokens in wanted]
        assert torch.equal(rows_VD, x_TD[[t for tokens in wanted for t in tokens]])
    numbers = [len(rows_VD) for rows_VD, _ in travelled]
    assert len(numbers) == 4 * len(parts)
    assert sum(numbers) == 4 * sum(numbers[: len(parts)])


@pytest.mark.parametrize("room", [4.0, 1.0, 0.2, 0.05])
@pytest.mark.parametrize("padding", [0, 4, 40])
@pytest.mark.parametrize("case", ["flat", "groups", "all active"])
def test_too_little_room_makes_nan_and_enough_room_changes_no_bit(
    case: str, padding: int, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", lambda received, sent, *_, **named: mirrored(received, sent))
    config = MoEConfig(8, **{"k": 2, "hidden_sizes": [7]} | CHOICES[case])
    moe = MoE(6, 8, config, ExpertShard(0, 4)).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    sizes = FixedSizes(config, torch.device("cpu"))
    sizes.room = room
    x_TD, real_T = torch.randn(40, 6, requires_grad=True), torch.arange(40) < 40 - padding
    found = []
    for fixed in (None, sizes):
        dispatcher = AllToAllDispatcher(None, 4, halves=False)
        moe.dispatcher, dispatcher.fixed = dispatcher, fixed
        y_TD, gate = moe(x_TD, real_T=real_T)
        leaves = [x_TD, *moe.parameters()]
        gradients = torch.autograd.grad(y_TD.square().sum(), leaves, allow_unused=True)
        found.append([y_TD.detach(), *(each for each in gradients if each is not None)])
    visits_M = [int((gate.expert_TK // 2 == process).any(1).sum()) for process in range(4)]
    slots = int((gate.expert_TK < 8).sum())
    even, most = gate.expert_TK.numel(), 4 * places(config, 8, 4, 40, room) * gate.expert_TK.shape[1]
    full = most if most <= 2.5 * even else math.ceil(room * (even + 6 * even**0.5))
    little = max(visits_M) >= places(config, 8, 4, 40, room) or slots > full
    assert bool(sizes.exceeded) == little
    assert sizes.suffices == (places(config, 8, 4, 40, room) > 40 and most <= max(2.5 * even, full))
    assert not (little and sizes.suffices)
    for exact, other in zip(*found, strict=True):
        assert torch.equal(exact, other) or little
    assert any(bool(other.isnan().any()) for other in found[1]) == little


def test_room_grows_until_all_tokens_can_visit_every_process() -> None:
    config = MoEConfig(8, k=2)
    sizes = FixedSizes(config, torch.device("cpu"))
    even = 10_000 * (1 - 15 / 28)  # neither of a token's two experts is among two of eight
    assert places(config, 8, 4, 10_000) == math.ceil(1.25 * (even + 6 * even**0.5)) + 1
    for _ in range(3):
        sizes.enlarge()
    assert places(config, 8, 4, 10_000, sizes.room) == 10_001
    assert not sizes.take_exceeded(World(torch.device("cpu")))
    sizes.exceeded.fill_(True)
    assert not sizes.take_exceeded(World(torch.device("cpu")))  # it was not asked, as nothing was exchanged
    sizes.suffices = False
    assert sizes.take_exceeded(World(torch.device("cpu")))
    assert not sizes.exceeded


def _own_tokens(number: int, real: int) -> list[list[torch.Tensor]]:
    """Output and gradients of a layer whose experts are spread over the processes, and of one that has all of them."""
    world = World.start("cpu", ParallelConfig())
    config, results = MoEConfig(8, **HIERARCHICAL | {"hidden_sizes": [7]}), []
    for share in (ExpertShard(world.group_rank, world.group_size), ExpertShard()):
        moe = MoE(6, 8, config, share).double().eval()
        generator = torch.Generator().manual_seed(2)
        held = slice(moe.experts.first, moe.experts.first + len(moe.experts.weights[0]))
        for name, parameter in moe.named_parameters():
            shape = (8, *parameter.shape[1:]) if name.startswith("experts") else parameter.shape
            drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
            parameter.data.copy_(drawn[held] if name.startswith("experts") else drawn)
        if share.size > 1:
            moe.dispatcher = AllToAllDispatcher(world.expert_group, share.size, halves=False)
        x_TD = torch.randn(number, 6, dtype=torch.float64, generator=generator).requires_grad_()
        y_TD, _ = moe(x_TD, real_T=torch.arange(number) < real)
        leaves = [x_TD, moe.gate.w_gate_DE, moe.gate.primary_w_gate_DA]
        results.append([y_TD.detach(), *torch.autograd.grad(y_TD.square().sum(), leaves)])
    return results


def test_padding_and_processes_without_tokens_change_nothing(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        for found, expected in result["own tokens"]:
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_summed_after_the_backward_pass_are_the_same(two_ranks: list[dict[str, Any]]) -> None:
    assert_same([result["in turn"]["noisy_top_k"] for result in two_ranks], run_updates("noisy_top_k", 2), 2)


def _four_ranks() -> dict[str, Any]:
    return {
        "all": run_cases(4, 0, True, list(CASES)),
        "halves": run_cases(4, 0, True, list(CASES), overlap_exchange=True),
        "pairs": run_cases(4, 2, True, list(CASES)),
        "fixed": run_fixed(4, 0),
        "fixed pairs": run_fixed(4, 2),
    }


@pytest.mark.slow
def test_four_processes_are_one(tmp_path: Path) -> None:
    results = run_ranks(4, tmp_path, _four_ranks)
    for case in CASES:
        one = run_updates(case, 4)
        assert_same([result["all"][case] for result in results], one, 4)
        assert_same([result["halves"][case] for result in results], one, 4)
        assert_same([result["pairs"][case] for result in results], one, 2)
        if case in FIXED:
            one = run_updates(case, 4, room=ROOM)
            assert_same([result["fixed"][case] for result in results], one, 4)
            assert_same([result["fixed pairs"][case] for result in results], one, 2)


def test_experts_that_do_not_divide_are_refused() -> None:
    world = World(torch.device("cpu"))
    world.group_size = 3
    with pytest.raises(UserError, match=r"the 8 experts of encoder.* cannot be spread over 3 processes"):
        make_model(config_of("noisy_top_k", 1), VOCABULARY, world)


def test_a_group_that_does_not_divide_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"parallel.expert_group_size=3 does not divide the 4 processes"):
        World.start("cpu", ParallelConfig(expert_group_size=3))


def test_one_process_has_all_experts_and_no_exchange() -> None:
    model = make_model(config_of("noisy_top_k", 1), VOCABULARY, World(torch.device("cpu")))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    assert [len(layer.experts.weights[0]) for layer in layers] == [8] * len(layers)
    assert not any(isinstance(layer.dispatcher, AllToAllDispatcher) for layer in layers)


def test_a_share_starts_as_that_part_of_the_whole_and_is_all_that_is_made() -> None:
    """Nobody ever holds all experts, which may exceed the memory of a host; dense layers are the same for all."""
    config = config_of("noisy_top_k", 1).model
    made = []
    for share in (ExpertShard(), ExpertShard(0, 2), ExpertShard(1, 2)):
        torch.manual_seed(5)
        made.append(dict(Seq2Seq(config, VOCABULARY, share).named_parameters()))
    whole, *shares = made
    for name, parameter in whole.items():
        parts = [share[name] for share in shares]
        if not is_expert(name):
            assert all(torch.equal(part, parameter) for part in parts), name
        else:
            assert all(2 * len(part) == len(parameter) for part in parts), name
            assert torch.equal(torch.cat(parts), parameter), name
            assert len(parameter.flatten().unique()) == parameter.numel(), name
