"""What several test files share: a seed, one thread, a tiny configuration and batch, the toy text and a run on it."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from nmt.batch import Batch, make_batch
from nmt.config import AttentionConfig, ModelConfig, MoEConfig
from nmt.preparation.prepare import prepare
from nmt.tokens import NUM_SPECIAL
from tests.kernels import interpret_without_gpu
from tests.many import train_many
from tests.toy import SHARED_TEXT, Cli, toy_config, train, write_corpus

interpret_without_gpu()
# On a busy machine, any example may take long.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

TINY_VOCAB = 13
# The files that take longest, so that no process waits for another's at the end.
FIRST = ("test_world_size", "test_surgery_runs", "test_training_time", "test_training", "test_prepare")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Matrices this small are slower on two threads, and the processes of `make test` share the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _signals_end_programs() -> None:
    # nohup and a shell's `&` start a program with signals ignored. The processes of tests would inherit that, and tests
    # that wait for the end of one would wait for ever.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


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


@pytest.fixture(scope="session")
def shared_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy text and what `nmt prepare` made of it, for all who change neither."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    prepare(toy_config(folder).corpus, lambda _line: None)
    return folder


@pytest.fixture
def corpus(shared_text: Path, tmp_path: Path) -> Path:
    """A folder for runs of a test's own, on the shared text."""
    (tmp_path / SHARED_TEXT).symlink_to(shared_text)
    return tmp_path


@pytest.fixture(scope="session")
def run(shared_text: Path) -> Path:
    """One run of 8 updates with checkpoints at 2, 4, 6 and 8, for all who only read it."""
    changes = ("training.checkpoint_every=2", "training.validate_every=2", "training.keep_checkpoints=9")
    return train(shared_text, "run", 8, *changes)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of several directions, for all who only read it."""
    return train_many(tmp_path_factory.mktemp("many"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of this process alone, whose collectives are those of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
