"""The predicted time of a training step: what its parts must add up to, and how it must grow."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nmt.batch import Batch
from nmt.config import AttentionConfig, Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.cost.activations import Precision
from nmt.cost.budget import TokenCounts
from nmt.cost.cards import CARDS, RATES, Card, Rates
from nmt.cost.operations import model_cost
from nmt.cost.step import (
    SPENT_ON,
    Machines,
    MicroBatch,
    Part,
    bound_of,
    mean_batch,
    moe_parts,
    places,
    step_parts,
    touched,
    visits,
)
from nmt.data.batching import plan_epoch
from nmt.model.experts import ExpertShard, MoE
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import AllToAllDispatcher, fixed_sizes
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater
from tests.conftest import TINY_VOCAB
from tests.processes import mirrored
from tests.scripts import load_script

BF16 = Precision(on_gpu=True, size=2)
BATCH = MicroBatch(32000, 31000, 1100, 40, 38)
DENSE, MOE = ModelConfig(moe=MoEConfig(0)), ModelConfig()
H100 = CARDS["h100"]
ENDLESS = Card("endless", 1.0, math.inf, math.inf, math.inf, "")
"""10^12 operations per second, and bytes that cost nothing."""
PERFECT = Rates(*(1.0 for _ in Rates._fields))._replace(position_us=0, launch_ms=0, message_us=0)


def step(
    model: ModelConfig, machines: Machines, batch: MicroBatch = BATCH, numbers: Precision = BF16, **training: object
) -> list[Part]:
    training = {"micro_batches": machines.gpus} | training
    return step_parts(Config(model=model, training=TrainingConfig(**training)), 32000, batch, numbers, machines)


def ms(*arguments: object, **changes: object) -> float:
    return sum(part.ms for part in step(*arguments, **changes))


def experts(count: int, **changes: object) -> ModelConfig:
    """A flat gate up to 256 experts, else groups of 256."""
    groups = {"gating": "hierarchical", "branching": count // 256, "k": 2} if count > 256 else {"k": min(4, count)}
    return ModelConfig(moe=MoEConfig(count, **(groups | changes)))


# --------------------------------------------------------------------------------------------------------- measured


fit = load_script("scripts/results/step_time.py")
RESULT = json.loads(fit.RESULTS.read_text(encoding="utf-8"))
MEASURED, GROWTH = (table["rows"] for table in RESULT["tables"])


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['step']}, {row['card']}")
def test_predictions_are_within_a_fifth_of_what_was_measured(row: dict[str, Any]) -> None:
    predicted = fit.predicted_ms(row, RATES)
    assert predicted == pytest.approx(row["ms"], rel=0.2)
    assert row["predicted_ms"] == pytest.approx(predicted, abs=0.001), "run python -m scripts.results.step_time"


def test_the_ceilings_of_an_h100_are_those_measured_last() -> None:
    about = " ".join(json.loads(fit.RESULTS.with_name("speed.json").read_text(encoding="utf-8"))["about"])
    tflops, terabytes = (float(number) for number in re.findall(r"(\d[\d.]*) T(?:FLOP|B)", about))
    assert (H100.tflops, H100.copy_tbs) == (tflops, terabytes)


def test_the_table_of_growing_experts_is_what_the_code_gives() -> None:
    for now, row in zip(fit.growing(RATES), GROWTH, strict=True):
        figures = {name: value for name, value in now.items() if isinstance(value, float)}
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=0.03, abs=0.03)
        assert (row["parameters"], row["spent_on"]) == (now["parameters"], now["spent_on"])


@pytest.mark.slow
def test_constants_are_found_again_from_the_times_that_they_give() -> None:
    """Within what the start is allowed to weigh. A constant that no step depends on stays as it was."""
    rows = [row | {"ms": fit.predicted_ms(row, RATES)} for row in MEASURED if "part" not in row]
    for row in rows:
        row.pop("parts", None)
    start = RATES._replace(experts=RATES.experts / 2, position_us=2 * RATES.position_us)
    found = fit.fitted(rows, start)
    for row in rows:
        assert fit.predicted_ms(row, found) == pytest.approx(row["ms"], rel=0.05)
    assert found.message_us == pytest.approx(RATES.message_us)


def test_constants_are_written_where_they_stand() -> None:
    text = fit.CONSTANTS.read_text(encoding="utf-8")
    assert fit.with_rates(text, RATES) == text
    assert "    passes: float = 0.125\n" in fit.with_rates(text, RATES._replace(passes=0.125))


# ------------------------------------------------------------------------------------------------------- adding up


@pytest.mark.parametrize(
    "model",
    [
        DENSE,
        ModelConfig(moe=MoEConfig(0), cell_size=512, bottom_layer="bidirectional_full"),
        ModelConfig(moe=MoEConfig(0), attention=AttentionConfig(wiring="gnmt")),
        ModelConfig(moe=MoEConfig(0), attention=AttentionConfig(heads=8), bidirectional_layers=3),
    ],
)
def test_products_are_the_operations_of_training(model: ModelConfig) -> None:
    """Where nothing else takes time, a step takes its FLOPs over the rate. Without padding, as some wirings have it."""
    even = MicroBatch(32000, 30000, 1000, 32, 30)
    flops = model_cost(model, 32000).training_flops(*even[:3])
    assert ms(model, Machines(ENDLESS, PERFECT), even) == pytest.approx(flops / 1e9)
    # float32 has half the rate.
    assert ms(model, Machines(ENDLESS, PERFECT), even, Precision(True, 4)) == pytest.approx(2 * flops / 1e9)


def test_products_of_experts_are_theirs_and_half_a_tile_each() -> None:
    moe = MoEConfig(8, k=4)
    parts = {part.name: part.ms for part in moe_parts(512, moe, 8, 8192, Machines(ENDLESS, PERFECT))}
    assert parts["experts, products"] == pytest.approx(6 * (4 * 8192 + 8 * 32) * 2 * 512 * 2048 / 1e9)
    assert parts["gates, choosing"] == pytest.approx(2 * 6 * 8192 * 512 * 2 * 8 / 1e9)


def test_the_optimiser_moves_bytes_of_every_parameter() -> None:
    slow = H100._replace(copy_tbs=H100.copy_tbs / 2)
    for machine in (H100, slow):
        [optimiser] = [part for part in step(DENSE, Machines(machine)) if part.name == "optimiser"]
        gigabytes = optimiser.ms * machine.copy_tbs * RATES.memory
        # Weight, gradient and two moments, some read and written: more than 16 bytes, less than 64.
        assert 16 < gigabytes * 1e9 / model_cost(DENSE, 32000).num_parameters < 64


def test_feedback_pays_for_padding_and_for_keys_and_values_at_each_position() -> None:
    fed = replace(DENSE, attention=AttentionConfig(wiring="feedback"))
    long = BATCH._replace(target_positions=2 * BATCH.target_positions)
    longer = [ms(model, Machines(H100), long) - ms(model, Machines(H100)) for model in (DENSE, fed)]
    # Keys and values are read at least once more at each of them.
    read = BATCH.sentences * BATCH.source_positions * 2 * 512 * 2 / (H100.copy_tbs * 1e9)
    assert longer[1] > longer[0] + BATCH.target_positions * read


def test_additive_attention_takes_longer_for_its_tanh() -> None:
    product, additive = (replace(DENSE, attention=AttentionConfig(name)) for name in ("product", "additive"))
    pairs = BATCH.source * BATCH.target / BATCH.sentences
    longer = ms(additive, Machines(ENDLESS, PERFECT)) - ms(product, Machines(ENDLESS, PERFECT))
    # At least a hundred operations each, of which the card does 10^9 per millisecond.
    assert longer > 100 * 512 * pairs / 1e9


def test_micro_batches_repeat_all_but_the_optimiser() -> None:
    first = "first pass to the gates"
    for model in (DENSE, MOE):
        one, three = (
            {part.name: part.ms for part in step(model, Machines(H100), micro_batches=count)} for count in (1, 3)
        )
        assert three.pop("optimiser") == pytest.approx(one.pop("optimiser"))
        assert first not in one
        assert (first in three) == (model is MOE)
        again = three.pop(first, 0.0)
        assert three == pytest.approx({name: 3 * each for name, each in one.items()})
        # At most a forward pass of everything below the softmax.
        assert again < sum(three.values()) / 3
    balanced = replace(MOE, moe=MoEConfig(32, w_importance=0, w_load=0))
    assert first not in {part.name for part in step(balanced, Machines(H100), micro_batches=3)}
    only_encoder = replace(MOE, decoder_moe_after=[])
    [short], [both] = (
        [part.ms for part in step(model, Machines(H100), micro_batches=3) if part.name == first]
        for model in (only_encoder, MOE)
    )
    assert 0 < short < both


def test_bottom_lstms_wait_once() -> None:
    """The rate of products has no end, so that waiting is all that is left."""
    machines = Machines(H100._replace(tflops=math.inf))
    batch = BATCH._replace(target_positions=50)

    def waiting(machines: Machines, **changes: Any) -> float:
        parts = step(replace(DENSE, cell_size=512, **changes), machines, batch)
        return sum(part.ms for part in parts if part.name == "LSTMs, recurrent") / (2e-3 * RATES.position_us)

    # The longer of both sides' bottom layers, two more layers of the encoder, one of the decoder.
    assert waiting(machines) == pytest.approx(50 + 2 * 40 + 50)
    assert waiting(machines, bottom_layer="forward") == pytest.approx(50 + 2 * 40 + 50)
    assert waiting(machines._replace(gpus=2)) == pytest.approx(waiting(machines))


def test_one_gpu_has_no_network_and_an_endless_link_is_like_one_gpu() -> None:
    alone = step(MOE, Machines(H100))
    assert "network" not in {part.bound for part in alone}
    rates = RATES._replace(message_us=0.0)
    one, two = (Machines(H100, rates, gpus=gpus, group=1, link_gbs=math.inf) for gpus in (1, 2))
    assert ms(MOE, two) == pytest.approx(ms(MOE, one))


def test_a_second_pass_repeats_all_but_the_optimiser() -> None:
    one, two = ({part.name: part.ms for part in step(DENSE, Machines(H100), r_drop=alpha)} for alpha in (0.0, 2.0))
    assert two == pytest.approx({name: ms * (1 if name == "optimiser" else 2) for name, ms in one.items()})


def test_rows_travel_four_times_and_gradients_twice() -> None:
    rates = RATES._replace(message_us=0.0)
    parts = {part.name: part.ms for part in step(MOE, Machines(H100, rates, gpus=4, group=4, link_gbs=100.0))}
    # Of four experts, one to four are on the four processes. All four gates and numbers travel with a row, twice.
    visited = 1 - math.comb(24, 4) / math.comb(32, 4)
    rows = 3 * sum(places(MOE.moe, 32, 4, tokens) for tokens in (BATCH.source, BATCH.target))
    assert rows == pytest.approx(3 * 1.25 * visited * (BATCH.source + BATCH.target), rel=0.06)
    assert parts["exchange of rows"] == pytest.approx(rows * (4 * 512 * 2 + 2 * 2 * 4 * 4) / 100e6)
    cost = model_cost(MOE, 32000)
    dense = cost.num_parameters - cost.num_expert_parameters
    assert parts["sum of gradients"] == pytest.approx(2 * 4 * dense * 3 / 4 / 100e6)
    # Two groups of two hold two copies of every expert.
    parts = {part.name: part.ms for part in step(MOE, Machines(H100, rates, gpus=4, group=2, link_gbs=100.0))}
    copies = 2 * 4 * cost.num_expert_parameters / 2 / 2 / 100e6
    assert parts["sum of gradients"] == pytest.approx(2 * 4 * dense * 3 / 4 / 100e6 + copies)


def test_as_many_numbers_travel_as_training_exchanges(
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Callable[..., ModelConfig],
    tiny_batch: Callable[..., Batch],
) -> None:
    """Rows of places that are full or empty."""
    config = Config(model=tiny_config(k=4), training=TrainingConfig(precision="fp32", device="cpu"))
    model = Seq2Seq(config.model, TINY_VOCAB, ExpertShard(0, 4)).train()
    batch = tiny_batch((3, 4), (6, 2), (1, 5))
    sizes = FixedSizes(config.model.moe, torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = AllToAllDispatcher(None, 4, halves=False)
    sent_bytes = []

    def count(output: torch.Tensor, rows: torch.Tensor, *more: Any, **named: Any) -> Any:
        # Rows are sent in bf16 on a GPU, gates with the numbers of their experts in float32.
        if rows.is_floating_point():
            sent_bytes.append(rows.numel() * (2 if rows.shape[1] == config.model.hidden_size else 4))
        return mirrored(output, rows, *more, **named)

    monkeypatch.setattr(dist, "all_to_all_single", count)
    updater = Updater(model, make_optimizer(model, config.training), config, World(torch.device("cpu")))
    with fixed_sizes(model, sizes):
        updater.update([batch], 1, 1e-3)
    rates = RATES._replace(message_us=0.0)
    own = MicroBatch(batch.num_source_tokens, batch.num_target_tokens, 3, 6, 6)
    parts = {part.name: part.ms for part in step(config.model, Machines(H100, rates, 4, 4, link_gbs=1e-3), own)}
    # Three quarters of them leave a GPU.
    assert parts["exchange of rows"] == pytest.approx(sum(sent_bytes) * 0.75 / 1e6 * 1e3)


@pytest.mark.parametrize("processes", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_token_visits_as_many_processes_as_random_choices_reach(groups: int, processes: int) -> None:
    levels = {"gating": "hierarchical", "branching": groups, "k": 2, "primary_k": 3} if groups > 1 else {"k": 6}
    rng, size = np.random.default_rng(1), 64 // groups
    found = []
    for _ in range(1000):
        of_groups = rng.permutation(groups)[:3]
        experts = [group * size + rng.permutation(size)[: levels["k"]] for group in of_groups]
        found.append(len(set((np.concatenate(experts) // (64 // processes)).tolist())))
    assert visits(MoEConfig(64, **levels), 64, processes) == pytest.approx(np.mean(found), rel=0.03)


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (8, 8), (64, 200), (1000, 300)])
def test_experts_with_rows_are_as_many_as_random_rows_reach(count: int, rows: int) -> None:
    rng = np.random.default_rng(1)
    reached = [len(set(rng.integers(0, count, rows).tolist())) for _ in range(300)]
    assert touched(count, rows) == pytest.approx(np.mean(reached), rel=0.02)
    assert touched(count, 1e9) == pytest.approx(count)


# --------------------------------------------------------------------------------------------------------- growing

COUNTS = [4, 32, 256, 2048, 16384, 131072]


def test_more_experts_take_no_less_time() -> None:
    """Except for the exchange of rows, since tokens of many experts in groups visit fewer GPUs than those of a few."""
    for gpus in (1, 4):
        machines = Machines(H100, gpus=gpus, group=gpus, link_gbs=50.0)
        steps = [step(experts(count), machines) for count in COUNTS]
        times = [sum(part.ms for part in parts if part.name != "exchange of rows") for parts in steps]
        assert times == sorted(times)
    flat = [ms(ModelConfig(moe=MoEConfig(count)), Machines(H100)) for count in COUNTS]
    assert flat == sorted(flat)


def test_more_gpus_take_longer_for_a_step_but_not_for_a_token() -> None:
    """Experts grow with the GPUs, as in the paper, or there are none."""
    sizes = [2**power for power in range(11)]
    for models in ([DENSE] * len(sizes), [experts(32 * gpus) for gpus in sizes]):
        times = [
            ms(model, Machines(H100, gpus=gpus, group=gpus, link_gbs=50.0))
            for gpus, model in zip(sizes, models, strict=True)
        ]
        assert times == sorted(times)
        per_token = [time / gpus for time, gpus in zip(times, sizes, strict=True)]
        assert per_token == sorted(per_token, reverse=True)


def test_a_faster_link_or_card_takes_no_longer() -> None:
    model = experts(2048)
    times = [ms(model, Machines(H100, gpus=16, group=16, link_gbs=link)) for link in (1, 10, 50, 248, 1e6, math.inf)]
    assert times == sorted(times, reverse=True)
    for card in CARDS.values():
        for faster in (card._replace(tflops=2 * card.tflops), card._replace(copy_tbs=2 * card.copy_tbs)):
            assert ms(model, Machines(faster)) < ms(model, Machines(card))


def test_longer_batches_take_longer() -> None:
    longer = BATCH._replace(source_positions=100, target_positions=100)
    assert ms(MOE, Machines(H100), longer) > ms(MOE, Machines(H100))


@pytest.mark.parametrize("gpus", [1, 1024])
@pytest.mark.parametrize("tokens", [1, 1e7])
@pytest.mark.parametrize("link", [1e-6, 1e9])
def test_extreme_sizes_give_finite_times(gpus: int, tokens: float, link: float) -> None:
    batch = MicroBatch(tokens, tokens, 1, tokens, tokens)
    for count in (0, 1, 1024, 131072):
        model = ModelConfig(moe=MoEConfig(count, k=1)) if count < 2 else experts(count)
        group = min(gpus, max(count, 1))
        for part in step(model, Machines(H100, gpus=gpus, group=group, link_gbs=link), batch):
            assert 0 < part.ms < math.inf


# ------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    ("bound", "model", "machines", "batch"),
    [
        ("products", replace(DENSE, cell_size=8192), Machines(H100), BATCH._replace(source_positions=5)),
        ("memory", replace(DENSE, dropout=0.5), Machines(H100._replace(copy_tbs=0.1)), BATCH),
        ("optimiser", experts(2048), Machines(H100), MicroBatch(500, 500, 20, 25, 25)),
        ("launch", DENSE, Machines(H100), MicroBatch(25, 25, 1, 25, 25)),
        ("network", experts(2048), Machines(H100, gpus=64, group=64, link_gbs=2.0), BATCH),
    ],
)
def test_what_bounds_a_step(bound: str, model: ModelConfig, machines: Machines, batch: MicroBatch) -> None:
    parts = step(model, machines, batch)
    spent = {each: sum(part.ms for part in parts if part.bound == each) for each in SPENT_ON}
    assert bound_of(parts) == max(spent, key=spent.__getitem__)
    assert bound_of(parts) == bound


# -------------------------------------------------------------------------------------------------- mean micro-batch


def test_the_longest_sentence_of_a_micro_batch_is_about_that_of_real_ones() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(0.0, 0.5, 60000)
    lengths = [np.clip(np.exp(3.2 + common + rng.normal(0.0, 0.15, 60000)), 2, 199).astype(int) for _ in range(2)]
    training = TrainingConfig(batch_tokens=8192)
    steps = plan_epoch(*lengths, training, 0)
    for length, position in zip(lengths, (3, 4), strict=True):
        longest = np.mean([int(length[each[0]].max()) + 1 for each in steps])
        tokens = TokenCounts(100 * (length.mean() + 1), 100 * (length.mean() + 1), 100)
        assert mean_batch(Config(training=training), tokens)[position] == pytest.approx(longest, rel=0.15)
