"""The smallest run that has every part: its text, its settings, and what tests ask about it."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nmt.commands.train
from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.compose import compose_config
from nmt.config import Config
from nmt.config.reading import put_setting, read_value
from nmt.parameters import read_tensors

ENGLISH = ["the", "small", "dog", "runs", "over", "a", "green", "meadow", "this", "morning", "and", "looks"]
GERMAN = ["der", "kleine", "Hund", "läuft", "über", "eine", "grüne", "Wiese", "am", "Morgen", "und", "sucht"]
TINY_RUN = [
    "corpus=files",
    "corpus.name=toy",
    "corpus.train.source=[train.en]",
    "corpus.train.target=[train.de]",
    "corpus.dev.source=[dev.en]",
    "corpus.dev.target=[dev.de]",
    "corpus.test.source=[test.en]",
    "corpus.test.target=[test.de]",
    "corpus.subwords.kind=bpe",
    "corpus.subwords.vocab_size=96",
    "model=small",
    "model.hidden_size=16",
    "model.cell_size=16",
    "model.dropout=0.2",
    "model.attention.size=16",
    "model.moe.num_experts=4",
    "model.moe.hidden_sizes=[16]",
    "training.schedule=inverse_sqrt",
    "training.batch_tokens=120",
    "training.warmup_steps=2",
    "training.hold_steps=3",
    "training.device=cpu",
    "training.log_every=1",
    "training.validate_every=4",
    "training.validation_sentences=3",
    "decoding.device=cpu",
]

# Micro-batches, noise and every kind of dropout; eight updates are more than an epoch.
HARD = ("training.micro_batches=2", "training.batch_tokens=700", "training.validation_sentences=2")
HARD += ("model.word_dropout=0.1", "model.moe.output_masking=0.1", "model.moe.expert_dropout=0.2", "training.r_drop=1")
SHARED_TEXT = "shared_text"
"""A link to the folder whose text, prepared already, the runs beside the link are trained on."""


def write_corpus(folder: Path, seed: int = 0, count: int = 80) -> None:
    """Word for word translations."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for split, size in (("train", count), ("dev", 8), ("test", 12)):
        picks = [generator.integers(0, len(GERMAN), generator.integers(1, 8)) for _ in range(size)]
        for language, words in (("en", ENGLISH), ("de", GERMAN)):
            text = "".join(" ".join(words[pick] for pick in sentence) + "\n" for sentence in picks)
            (folder / f"{split}.{language}").write_text(text)


def settings(folder: Path, *changes: str) -> list[str]:
    """The arguments of a tiny run in `folder`, on the text that lies there or that SHARED_TEXT leads to."""
    text = (folder / SHARED_TEXT).resolve() if (folder / SHARED_TEXT).exists() else folder
    return [*TINY_RUN, f"corpus.root={text}", f"corpus.directory={text}/p", f"run.directory={folder}", *changes]


@cache
def _tiny_run() -> dict[str, Any]:
    return compose_config(TINY_RUN).to_dict()


def toy_config(folder: Path, *changes: str) -> Config:
    """What `settings` of the same arguments are composed to; Hydra, which is slow, is asked once."""
    tree = deepcopy(_tiny_run())
    for key, _, text in (word.partition("=") for word in settings(folder, *changes)[len(TINY_RUN) :]):
        put_setting(Config, tree, key, read_value(Config, key, text))
    return Config.from_dict(tree)


def train(folder: Path, name: str, steps: int, *changes: str) -> Path:
    """Train the run `name` in `folder` until it has this many updates; its folder."""
    nmt.commands.train.train(toy_config(folder, f"run.name={name}", f"training.max_steps={steps}", *changes))
    return folder / name


def _bytes_of(part: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in read_tensors(part).items()}


def saved(run: Path) -> dict[str, Any]:
    """All that decides how a run goes on, from its newest checkpoint."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = newest.state()
    return {
        **{part: _bytes_of(newest.path / part) for part in ("model", "training")},
        "data": json.dumps([newest.step, state["data"], state["progress"]["target_tokens"]]),
    }


def steps_logged(run: Path, kind: str) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == kind]


class Cli:
    """Runs commands in this process: `status`, and what they wrote."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *arguments: str) -> int:
        self.capfd.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        self.out, self.err = self.capfd.readouterr()
        return status

    def refuses(self, status: int, *arguments: str, says: tuple[str, ...], progress: bool = False) -> None:
        """The command ends with `status` and one line, which has every one of `says`."""
        assert self(*arguments) == status, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        *before, line = self.err.splitlines()
        assert progress or not before, self.err
        assert line.startswith("nmt: ")
        for part in says:
            assert part in line, line
