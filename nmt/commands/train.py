"""nmt train: a run from its newest checkpoint, or from the start, to its end; by one process or all of torchrun's."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nmt.checkpoint import list_checkpoints
from nmt.commands import say
from nmt.config import Config
from nmt.data.prepare import Prepared, prepare
from nmt.errors import CheckpointError, ProcessError, StorageError, UserError, exit_status
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.training.trainer import Stopped, Trainer


def train(config: Config) -> None:
    """Prepare the corpus if need be, open or create the run, train, and leave word of how it ended."""
    run = run_of(config)
    speaks = os.environ.get("RANK", "0") == "0"
    # Every process asks for the corpus; one makes it while the others wait for its lock.
    prepared = prepare(config.corpus, say if speaks else _say_nothing)
    world = World.start(config.training.device, config.parallel)
    try:
        with world.losses_told(lambda: "before the first step"):
            world.on_main(lambda: _open(run, config, prepared))
            with _status(run, world):
                Trainer(config, prepared, run, world).train()
    except Stopped as stopped:
        if world.is_main:
            say(str(stopped))
        world.stop()
        sys.exit(stopped.status)
    world.stop()
    if world.is_main:
        say(f"run {run.path}: curves in {run.tensorboard} (make tensorboard), checkpoints in {run.checkpoints}")
        print(run.path)


def run_of(config: Config) -> RunDirectory:
    """The folder that `run.*` names. UserError if they name none, CheckpointError if an exported model is there."""
    if not config.run.name:
        raise UserError("run.name is empty: give experiment=NAME, or run.name=NAME for a run of your own settings")
    run = RunDirectory(Path(config.run.directory) / config.run.name)
    if run.exported:
        raise CheckpointError(f"{run.path} is an exported model, which cannot be trained on: choose another run.name")
    return run


def _say_nothing(_line: str) -> None:
    pass


def _open(run: RunDirectory, config: Config, prepared: Prepared) -> None:
    facts = ("pairs_read", "pairs_kept", "dropped", "source_pieces", "target_pieces", "vocabulary_size")
    corpus = {"name": config.corpus.name, "fingerprint": prepared.fingerprint}
    corpus |= {name: prepared.manifest[name] for name in facts}
    for line in run.start_or_continue(config, prepared.path / "subwords.model", corpus):
        say(f"changed since the run was started: {line}")
    for split in ("dev", "test"):
        run.write_text(split, *prepared.text(split))


@contextmanager
def _status(run: RunDirectory, world: World) -> Iterator[None]:
    """Keep RUN_STATUS.json: torchrun ends with status 1 however its processes ended, so this file says it."""

    def write(state: str, code: int | None, message: str) -> None:
        saved = list_checkpoints(run.checkpoints)
        step, checkpoint = (saved[-1].step, str(saved[-1].path)) if saved else (0, None)
        run.write_status(state, code, message, step, checkpoint)

    if world.is_main:
        write("running", None, "")
    try:
        yield
    except Stopped as stopped:
        if world.is_main:
            write("stopped", stopped.status, str(stopped))
        raise
    except BaseException as error:
        # Whoever lost the others says so, since those that still run are to end when they are told to.
        if world.is_main or (isinstance(error, ProcessError) and run.status().get("state") != "failed"):
            with suppress(StorageError):  # a full disk, or two at once: the error itself matters more
                write("failed", exit_status(error), " ".join(f"{type(error).__name__}: {error}".split()))
        raise
    if world.is_main:
        write("finished", 0, "")
