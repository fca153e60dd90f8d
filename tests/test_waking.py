"""An exported model reads and verifies an expert when it is needed; translating loads no library for training."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nmt.checkpoint import BF16_FORMAT, EXPORT_FORMAT, Checkpoint, seal
from nmt.config import ModelConfig
from nmt.errors import CheckpointError
from nmt.model.names import is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import WorkingWeights
from nmt.parameters import read_model, write_parameters
from tests.conftest import TINY_VOCAB

Configs = Callable[..., ModelConfig]
CPU = torch.device("cpu")
LAYER, HURT = "encoder.2", "encoder.moe_layers.moe.2.experts.weights.1"
IN_PLACE = ("F32", "BF16")


def export(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, hashes: bool = True) -> Checkpoint:
    """An exported model of random weights."""
    torch.manual_seed(1)
    model = WorkingWeights(Seq2Seq(config, TINY_VOCAB), CPU, dtype).model
    folder.mkdir(exist_ok=True)
    write_parameters(model, folder / "model.safetensors")
    number = BF16_FORMAT if dtype == torch.bfloat16 else EXPORT_FORMAT
    facts = {"format": number, "step": 1, "steps": [1], "score": None, "vocabulary": "words"}
    experts = {name: len(each) for name, each in model.named_parameters() if is_expert(name)}
    seal(folder, facts, experts if hashes else None)
    return Checkpoint(folder, 1, json.loads((folder / "manifest.json").read_text()))


def damage(checkpoint: Checkpoint, parameter: str, share: float) -> None:
    """Flip a bit of a parameter, at this share of its bytes."""
    path = checkpoint.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:begin])[parameter]["data_offsets"]
    data[begin + first + int(share * (end - first))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_expert_is_found_when_it_wakes_and_not_before(
    tmp_path: Path, tiny_config: Configs, dtype: torch.dtype
) -> None:
    config = tiny_config()
    checkpoint = export(tmp_path, config, dtype)
    damage(checkpoint, HURT, 0.6)  # of four experts, number 2
    model = read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE)
    experts = model.moe_layers()[LAYER].experts
    assert experts.when_woken is not None
    experts.when_woken([0, 1])
    experts.when_woken([3, 1])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"damaged \(model\.safetensors is not what was written"):
            experts.when_woken([3, 2])
    # Those who need all weights, such as a GPU, find the damage at once.
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_model([checkpoint], config, TINY_VOCAB, "words")


def test_a_product_wakes_the_experts_that_have_rows(tmp_path: Path, tiny_config: Configs) -> None:
    config = tiny_config()
    model = read_model([export(tmp_path, config)], config, TINY_VOCAB, "words", IN_PLACE)
    experts = model.moe_layers()[LAYER].experts
    woken: list[set[int]] = []
    experts.when_woken = lambda numbers: woken.append(set(numbers))
    with torch.no_grad():
        experts(torch.randn(5, 6), torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert woken == [{1, 3}]


def test_damage_elsewhere_is_found_at_once(tmp_path: Path, tiny_config: Configs) -> None:
    config = tiny_config()
    checkpoint = export(tmp_path, config)
    damage(checkpoint, "encoder.moe_layers.moe.2.gate.w_gate_DE", 0.5)
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE)


def test_without_hashes_of_experts_all_is_verified_at_once(tmp_path: Path, tiny_config: Configs) -> None:
    """Exports of older versions."""
    config = tiny_config()
    checkpoint = export(tmp_path, config, hashes=False)
    model = read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE)
    assert model.moe_layers()[LAYER].experts.when_woken is None
    damage(checkpoint, HURT, 0.6)
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE)


def test_an_expert_without_a_hash_is_refused(tmp_path: Path, tiny_config: Configs) -> None:
    config = tiny_config()
    checkpoint = export(tmp_path, config)
    checkpoint.manifest["files"]["model.safetensors"]["experts"][HURT].pop()
    model = read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE)
    wake = model.moe_layers()[LAYER].experts.when_woken
    assert wake is not None
    with pytest.raises(CheckpointError, match=r"has no hash of expert 3"):
        wake([3])


def test_an_expert_that_is_not_a_number_is_refused(tmp_path: Path, tiny_config: Configs) -> None:
    """As are other parameters, although their hashes are right."""
    config = tiny_config()
    model = Seq2Seq(config, TINY_VOCAB)
    with torch.no_grad():
        model.moe_layers()[LAYER].experts.weights[1][2, 0, 0] = torch.nan
    write_parameters(model, tmp_path / "model.safetensors")
    experts = {name: len(each) for name, each in model.named_parameters() if is_expert(name)}
    seal(tmp_path, {"format": 1, "step": 1, "steps": [1], "score": None, "vocabulary": "words"}, experts)
    checkpoint = Checkpoint(tmp_path, 1, json.loads((tmp_path / "manifest.json").read_text()))
    wake = read_model([checkpoint], config, TINY_VOCAB, "words", IN_PLACE).moe_layers()[LAYER].experts.when_woken
    assert wake is not None
    wake([0, 1, 3])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        wake([2])


class Readers(TorchDispatchMode):
    """Finds operations that read more of these tensors than one expert has."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.most = {
            each.untyped_storage().data_ptr(): each[0].numel()
            for name, each in model.named_parameters()
            if is_expert(name)
        }
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in args:
            if not isinstance(each, torch.Tensor) or function.is_view:
                continue
            if each.numel() > self.most.get(each.untyped_storage().data_ptr(), each.numel()):
                self.found.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gating", ["noisy_top_k", "hierarchical", "strictly_balanced"])
def test_no_pass_reads_the_weights_of_all_experts(
    tmp_path: Path, tiny_config: Configs, tiny_batch: Callable[..., Any], stored: torch.dtype, gating: str
) -> None:
    groups = {"branching": 3, "k": 1} if gating == "hierarchical" else {}
    config = tiny_config(gating=gating, num_experts=6, **groups)
    model = read_model([export(tmp_path, config, stored)], config, TINY_VOCAB, "words", IN_PLACE)
    model = WorkingWeights(model, CPU, torch.float32).model
    with torch.no_grad(), Readers(model) as readers:
        model(tiny_batch((3, 2), (1, 4)))
    assert readers.found == set()


@pytest.mark.slow
def test_translating_loads_no_library_for_training(run: Path) -> None:
    """What `import torch` loads by itself does not count: some builds load a part of torch.distributed."""
    code = (
        "import sys, torch; before = set(sys.modules); from nmt.cli import main; "
        f"main(['translate', {str(run)!r}]); "
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="the dog\n", capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("\n") == 1
    loaded = done.stderr.splitlines()[-1].split()
    assert "nmt.decoding.searcher" in loaded
    unwanted = ("torch.distributed", "torch._dynamo", "torch._inductor", "datasets", "hydra", "omegaconf", "sacrebleu")
    unwanted += ("tensorboard", "pyarrow", "pandas", "nmt.training", "nmt.parallel")
    assert [name for name in loaded if name.startswith(unwanted)] == []
