"""What several test files share: a seed, few threads, and the smallest configuration that has every part."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from nmt.batch import NUM_SPECIAL, Batch, make_batch
from nmt.config import AttentionConfig, ModelConfig, MoEConfig

TINY_VOCAB = 13


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    # The processes of `make test` share the cores.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """A ModelConfig of single-digit sizes; keywords of the model, its attention or its experts override."""

    def build(**changes: Any) -> ModelConfig:
        moe = {"num_experts": 4, "k": 2, "hidden_sizes": [7]}
        attention = {"size": 5}
        moe |= {each.name: changes.pop(each.name) for each in fields(MoEConfig) if each.name in changes}
        attention |= {each.name: changes.pop(each.name) for each in fields(AttentionConfig) if each.name in changes}
        model = {"hidden_size": 6, "cell_size": 8, "dropout": 0.0} | changes
        return ModelConfig(attention=AttentionConfig(**attention), moe=MoEConfig(**moe), **model)

    return build


@pytest.fixture
def tiny_batch() -> Callable[..., Batch]:
    """Random sentence pairs below TINY_VOCAB of the given (source, target) lengths, EOS not counted."""

    def build(*lengths: tuple[int, int]) -> Batch:
        rng = np.random.default_rng(3)
        sides = [[rng.integers(NUM_SPECIAL, TINY_VOCAB, size=n) for n in side] for side in zip(*lengths, strict=True)]
        return make_batch(np.arange(len(lengths)), *sides)

    return build
