"""bf16 without casting weights, float32 where it matters: one copy of a model, and what it computes."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nmt.training.validation
from nmt.batch import Batch, source_batch
from nmt.cli import main
from nmt.config import ModelConfig
from nmt.decoding.translator import Translator
from nmt.device import product_dtype, set_float32_products
from nmt.evaluation.perplexity import perplexity
from nmt.model.gating import Gate
from nmt.model.names import is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import WorkingWeights
from nmt.run import RunDirectory
from nmt.tokens import BOS
from tests.conftest import TINY_VOCAB
from tests.toy import settings

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]

CPU, BF16 = torch.device("cpu"), torch.bfloat16
MODELS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "feedback": {"wiring": "feedback", "function": "additive"},
    "gnmt": {"wiring": "gnmt", "function": "normalised", "bottom_layer": "bidirectional_full"},
    "gnmt_v2": {"wiring": "gnmt_v2", "function": "normalised", "output_bias": True, "tie_embeddings": False},
    "projected": {"cell_size": 16, "bottom_layer": "forward"},
    "softmax": {"gating": "softmax_top_k", "hidden_sizes": [7, 5]},
    "hierarchical": {"gating": "hierarchical", "num_experts": 6, "branching": 3, "k": 1},
    "strict": {"gating": "strictly_balanced", "output": "sigmoid"},
    "norms": {"norm": "layers", "size": 6, "heads": 2, "bidirectional_layers": 3},
    "no experts": {"num_experts": 0},
}


class Casts(TorchDispatchMode):
    """Counts casts of parameters, and the numbers of the largest other cast."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.name_of = {each.untyped_storage().data_ptr(): name for name, each in model.named_parameters()}
        self.of_weights: Counter[str] = Counter()
        self.largest_other = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            name = self.name_of.get(args[0].untyped_storage().data_ptr())
            if name is None:
                self.largest_other = max(self.largest_other, out.numel())
            else:
                self.of_weights[name] += 1
        return out


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_config: Configs) -> Seq2Seq:
    model = Seq2Seq(tiny_config(**MODELS[request.param]), TINY_VOCAB).eval()
    for name, parameter in model.named_parameters():
        if "threshold" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def outputs(model: Seq2Seq, batch: Batch) -> list[Tensor]:
    """All that a pass makes but the logits, and the summed loss of its pairs."""
    encoded, gates = model.encode(batch.source_N, batch.source)
    x_ND, more = model.decode(batch.target_in_N, batch.target, encoded)
    first = model.step(torch.full((batch.num_sentences,), BOS), model.memory(encoded), model.start(batch.num_sentences))
    chosen = [part for gate in (gates | more | first.gates).values() for part in gate[:2]]
    return [*model.memory(encoded), x_ND, first.x_RD, first.weights_RS, *chosen, model(batch).nll]


# ------------------------------------------------------------------------------------------------------ the copy


@torch.no_grad()
def test_the_copy_computes_what_autocast_does_to_the_bit(model: Seq2Seq, tiny_batch: Batches) -> None:
    batch = tiny_batch((4, 2), (1, 6), (6, 3))
    with torch.autocast("cpu", dtype=BF16):
        expected = outputs(model, batch)
    copy = WorkingWeights(model, CPU, BF16).model
    found = outputs(copy, batch)
    assert found[0].dtype == BF16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert not copy.training
    assert copy.share == model.share


def test_what_must_be_precise_stays_float32(model: Seq2Seq) -> None:
    copy = WorkingWeights(model, CPU, BF16).model
    kept = {name for name, parameter in copy.named_parameters() if parameter.dtype == torch.float32}
    gates = {name: module for name, module in copy.named_modules() if isinstance(module, Gate)}
    of_gates = {f"{name}.{own}" for name, gate in gates.items() for own, _ in gate.named_parameters()}
    assert of_gates <= kept
    assert "output.weight" in kept or model.config.tie_embeddings
    others = {"embedding", "output", "v_N", "gain", "bias_N"}
    assert all(any(part in name for part in others) for name in kept - of_gates)
    assert model.dtype == torch.float32


def test_float32_is_the_model_itself_and_a_copy_is_made_once(model: Seq2Seq) -> None:
    assert WorkingWeights(model, CPU, torch.float32).model is model
    copy = WorkingWeights(model, CPU, BF16).model
    assert WorkingWeights(copy, CPU, BF16).model is copy


@torch.no_grad()
def test_the_copy_is_written_in_place_after_a_step(model: Seq2Seq) -> None:
    weights = WorkingWeights(model, CPU, BF16)
    before = {name: parameter.data_ptr() for name, parameter in weights.model.named_parameters()}
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    stale, fresh = (dict(each.named_parameters()) for each in (weights.model, WorkingWeights(model, CPU, BF16).model))
    assert not torch.equal(stale["decoder.attention.query.weight"], fresh["decoder.attention.query.weight"])
    weights.write(model)
    written = dict(weights.model.named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in written.items()} == before
    assert written.keys() == fresh.keys()
    assert all(torch.equal(written[name], fresh[name]) for name in fresh)
    whole = WorkingWeights(model, CPU, torch.float32)
    whole.write(model)
    assert whole.model is model


@torch.no_grad()
def test_a_decoded_position_casts_no_weight(model: Seq2Seq) -> None:
    copy = WorkingWeights(model, CPU, BF16).model
    memory = copy.memory(copy.encode(*source_batch([np.array([5, 7]), np.array([6])]))[0])
    state = copy.start(2)
    with Casts(copy) as casts:
        for token in (4, 9):
            decoded = copy.step(torch.full((2,), token), memory, state)
            copy.logits(decoded.x_RD)
            state = decoded.state
    assert casts.of_weights == Counter()
    # A row of each column at most, as embedding, gate or softmax reads it; two slots of a token have one each.
    assert 0 < casts.largest_other <= 2 * 2 * model.config.hidden_size


def test_no_weight_is_cast_for_each_position_in_training(model: Seq2Seq, tiny_batch: Batches) -> None:
    def casts(length: int) -> Counter[str]:
        with Casts(model) as found, torch.autocast("cpu", dtype=BF16):
            model(tiny_batch((3, length)))
        return found.of_weights

    model.train()
    long, short = casts(9), casts(2)
    assert {name: count for name, count in long.items() if not is_expert(name)} == {
        name: count for name, count in short.items() if not is_expert(name)
    }
    # Of an expert's, its own weights, if it has rows.
    most = max((moe.num_experts for moe in model.moe_layers().values()), default=0)
    assert all(count <= most for name, count in long.items() if is_expert(name))


# ---------------------------------------------------------------------------------------------------- the logits


@torch.no_grad()
def test_logits_are_float32_whatever_is_around(model: Seq2Seq) -> None:
    copy = WorkingWeights(model, CPU, BF16).model
    x_RD = torch.randn(4, model.config.hidden_size).to(BF16)
    expected_RV = F.linear(x_RD.float(), model.output.weight, model.output.bias)
    assert torch.equal(copy.logits(x_RD), expected_RV)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(model.logits(x_RD), expected_RV)
    assert torch.equal(copy.logits(x_RD.view(2, 2, -1)), expected_RV.view(2, 2, -1))


@torch.no_grad()
def test_the_best_pieces_of_a_hypothesis_do_not_tie() -> None:
    config = ModelConfig(hidden_size=64, cell_size=64)
    model = WorkingWeights(Seq2Seq(config, 4000), CPU, BF16).model
    x_RD = torch.randn(300, 64).to(BF16)
    best_R5 = model.logits(x_RD).topk(5).values
    ties = (best_R5.diff(dim=1) == 0).any(1)
    assert not ties.any()
    # As it was: an exact tie in every fifth row or so.
    rounded_R5 = F.linear(x_RD, model.output.weight.to(BF16)).topk(5).values
    assert (rounded_R5.diff(dim=1) == 0).any(1).sum() > 30


# --------------------------------------------------------------------------------- translating, scoring, training


@pytest.fixture
def run(run: Path) -> RunDirectory:
    return RunDirectory.existing(str(run))


def test_a_run_translates_in_bf16_from_one_copy(run: RunDirectory) -> None:
    config = run.config(["decoding.precision=bf16"])
    translator = Translator.load(run, config)
    assert translator.model.dtype == BF16
    sources, targets, _ = run.text("test")
    with Casts(translator.model) as casts:
        assert len(translator.translate(sources)) == len(sources)
    # Once a batch of sentences what every score takes from the attention: a vector, and no matrix.
    assert set(casts.of_weights) == {"decoder.attention.v_N"}
    exact = Translator.load(run, replace(config, decoding=replace(config.decoding, precision="fp32")))
    world = nmt.training.validation.World(CPU)
    arguments = translator.subwords, sources, targets, 500, world
    assert perplexity(translator.model, *arguments).pieces == pytest.approx(
        perplexity(exact.model, *arguments).pieces, rel=0.01
    )


def test_validation_in_bf16_uses_a_copy_of_the_parameters_as_they_are_and_drops_it(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[weakref.ref[Seq2Seq]] = []
    passed: list[Tensor] = []
    original = nmt.training.validation.perplexity

    def seen(model: Seq2Seq, *arguments: Any, **named: Any) -> Any:
        copies.append(weakref.ref(model))
        passed.append(model.decoder.attention.query.weight.clone())
        return original(model, *arguments, **named)

    monkeypatch.setattr(nmt.training.validation, "perplexity", seen)
    changes = ("run.name=a", "training.max_steps=4", "training.validate_every=2", "training.precision=bf16")
    assert main(["train", *settings(corpus, *changes)]) == 0
    gc.collect()
    assert [copy() for copy in copies] == [None, None]
    assert {weight.dtype for weight in passed} == {BF16}
    assert not torch.equal(*passed)


# ------------------------------------------------------------------------------------------- what a GPU is told


@contextmanager
def kept_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True), ("auto", True)])
def test_float32_on_a_gpu_is_float32(precision: str, tf32: bool) -> None:
    with kept_settings():
        for before in ("high", "highest"):
            torch.set_float32_matmul_precision(before)
            torch.backends.cudnn.allow_tf32 = before == "high"
            set_float32_products(torch.device("cuda"), precision)
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cudnn.allow_tf32 == tf32
    assert (product_dtype(torch.device("cuda"), precision) == BF16) == tf32
    assert product_dtype(CPU, "auto") == torch.float32
