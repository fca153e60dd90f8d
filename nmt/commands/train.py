"""nmt train: start a run or resume it from its newest checkpoint, in one process or in those of torchrun."""

import shlex
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nmt.checkpoint import list_checkpoints
from nmt.commands import say
from nmt.commands.memory import check_memory
from nmt.commands.prepare import prepare_corpus
from nmt.config import Config
from nmt.data.mixture import Corpora, mixed_in
from nmt.data.prepared import VOCABULARY
from nmt.device import shortage_told
from nmt.errors import CheckpointError, DataError, MemoryLimitError, ProcessError, StorageError, UserError, exit_status
from nmt.files import write_atomically
from nmt.parallel.mesh import World
from nmt.parallel.watchdog import watch_for_hangs
from nmt.process import launched_rank
from nmt.run import SHARED_MARK, STARTED_FROM, RunDirectory
from nmt.training.stopping import StopRequest
from nmt.training.trainer import Stopped, Trainer
from nmt.training.transfer import Origin

# Longest time for a network file system to show a new file to other hosts.
_SEEN_SECONDS = 30.0


def train(config: Config) -> RunDirectory:
    """Prepare the corpus if needed, create or open the run, train, record how it ended, and return the run."""
    run = run_of(config)
    check_resumable(run, config)
    speaks = launched_rank() == 0
    mixed_in(config.corpus)  # a mistake shows at once, and not after an hour
    # All processes call this: one prepares the corpus while the others wait for its lock.
    corpora = Corpora(config.corpus, prepare_corpus(config.corpus, say if speaks else _say_nothing))
    corpora.check_training(config.training)
    world = World.start(config.training.device, config.parallel)
    asked = StopRequest()
    try:
        with ExitStack() as until_the_end, world.report_peer_failures(lambda: "before the first step"):
            origin = world.on_main(lambda: _open(run, config, corpora, until_the_end))
            _check_that_all_see(run, world)
            # Handle signals before the status becomes "running", so that the end of the run is always recorded.
            with asked.noted(lambda: _is_lost(run, world)), _status(run, world):
                _check_memory(config, corpora, world)
                with shortage_told(lambda: "building the network", "choose a smaller model or fewer experts"):
                    trainer = Trainer(config, corpora, run, world, asked, origin)
                with watch_for_hangs(world, trainer.where, lambda error: _report_peer_failure(run, world, error)):
                    trained = trainer.train()
    except Stopped as stopped:
        if world.is_main:
            say(str(stopped))
        world.stop()
        sys.exit(stopped.status)
    except (DataError, CheckpointError, MemoryLimitError, StorageError) as error:
        if not (world.is_main or error.reported_elsewhere):
            say(f"nmt: rank {world.rank} of {world.size}: {error}")
        raise
    world.stop()
    if world.is_main and trained:
        say(f"run {run.path}: curves in {run.tensorboard} ({_curves(run)}), checkpoints in {run.checkpoints}")
    return run


def run_of(config: Config) -> RunDirectory:
    """Return the run of `run.directory` and `run.name`. UserError without a name, CheckpointError if it is exported."""
    if not config.run.name:
        raise UserError("run.name is empty: give experiment=NAME, or run.name=NAME for a run with your own settings")
    run = RunDirectory(Path(config.run.directory) / config.run.name)
    if run.exported:
        raise CheckpointError(f"{run.path} is an exported model, which cannot be trained: choose another run.name")
    return run


def _curves(run: RunDirectory) -> str:
    """Return the command that shows the curves: a short one if the project's Makefile is in the working directory."""
    with suppress(OSError, ValueError):
        if "\ntensorboard:" in Path("Makefile").read_text(encoding="utf-8"):
            return "make tensorboard"
    return shlex.join(["tensorboard", "--logdir", str(run.tensorboard)])


def _say_nothing(_line: str) -> None:
    pass


def _check_that_all_see(run: RunDirectory, world: World) -> None:
    """Raise StorageError in all processes unless all hosts see the same folder of the run."""
    if world.size == 1:
        return
    mark = run.path / SHARED_MARK
    token = world.on_main(lambda: _write_token(mark))
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := mark.is_file() and mark.read_text() == token) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = world.max_int(0 if seen else world.rank + 1)
    if blind:
        raise StorageError(
            f"rank {blind - 1} does not see what rank 0 writes to {run.path}: all hosts need one file system for "
            "run.directory"
        )


def _write_token(mark: Path) -> str:
    token = uuid.uuid4().hex
    write_atomically(mark, token.encode())
    return token


def _check_memory(config: Config, corpora: Corpora, world: World) -> None:
    warning = world.on_main(lambda: check_memory(config, corpora.record(), world))
    if warning and world.is_main:
        say(warning)


def check_resumable(run: RunDirectory, config: Config) -> None:
    """Refuse settings with which the run cannot start or resume, before a corpus is prepared. Errors as `_open`."""
    run.check_places()
    if run.config_path.exists():
        run.check_settings(config)
    _check_saved(run)
    _check_steps(run, config)
    _origin(run, config)


def _check_saved(run: RunDirectory) -> None:
    """Raise CheckpointError if the run has saved checkpoints and none is there: it would start again from step 0."""
    named = run.status().get("checkpoint")
    if named and not any(run.checkpoints.glob("step-*")):
        raise CheckpointError(
            f"{run.checkpoints} has no checkpoint, but {run.status_path.name} names {named}: restore it, or choose "
            "another run.name"
        )


def _check_steps(run: RunDirectory, config: Config) -> None:
    """Raise UserError, before config.yaml is rewritten, if the run is already past `training.max_steps`."""
    saved, wanted = list_checkpoints(run.checkpoints), config.training.max_steps
    if saved and saved[-1].step > wanted:
        raise UserError(
            f"training.max_steps={wanted} is below step {saved[-1].step}, which {run.path} has reached: give at least "
            f"{saved[-1].step}, or choose another run.name"
        )


def _is_lost(run: RunDirectory, world: World) -> bool:
    """Return True if other processes have failed, so that the step cannot be finished with them."""
    return world.size > 1 and run.status().get("state") == "failed"


def _origin(run: RunDirectory, config: Config) -> Origin | None:
    """Return what `run.start_from` names; None if it names nothing, or if the run has a checkpoint of its own."""
    return Origin.find(config, run) if config.run.start_from and not list_checkpoints(run.checkpoints) else None


def _open(run: RunDirectory, config: Config, corpora: Corpora, until_the_end: ExitStack) -> Origin | None:
    """Create the run or check that it can be resumed, and lock it. Return what it starts from, if it does."""
    run.check_places()
    until_the_end.enter_context(run.training())
    _check_steps(run, config)
    corpora.verify()
    corpus = corpora.record()
    origin = _origin(run, config)
    if origin:
        corpus[STARTED_FROM] = origin.record()
    elif run.config_path.exists() and (recorded := run.corpus_info().get(STARTED_FROM)):
        corpus[STARTED_FROM] = recorded
    for line in run.start_or_continue(config, corpora.own.path / VOCABULARY, corpus):
        say(f"changed since the run was started: {line}")
    for split in ("dev", "test"):
        run.write_text(split, *corpora.own.text(split), corpora.directions(split))
    return origin


@contextmanager
def _status(run: RunDirectory, world: World) -> Iterator[None]:
    """Keep RUN_STATUS.json up to date: it has the real exit status, whereas torchrun always exits with 1."""
    if world.is_main:
        _write_status(run, "running", None, "")
    try:
        yield
    except Stopped as stopped:
        if world.is_main:
            _write_status(run, "stopped", stopped.status, str(stopped))
        raise
    except BaseException as error:
        _write_failure(run, world, error)
        raise
    if world.is_main:
        _write_status(run, "finished", 0, "")


def _write_failure(run: RunDirectory, world: World, error: BaseException) -> None:
    # The first process that lost another one also writes it, because the main process may be the lost one.
    if world.is_main or (isinstance(error, ProcessError) and run.status().get("state") != "failed"):
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        message = " ".join(f"{type(error).__name__}: {error}{notes}".split())
        with suppress(StorageError):  # on a full disk, or if two write at once: the error itself matters more
            _write_status(run, "failed", exit_status(error), message)


def _write_status(run: RunDirectory, state: str, code: int | None, message: str) -> None:
    saved = list_checkpoints(run.checkpoints)
    step, checkpoint = (saved[-1].step, str(saved[-1].path)) if saved else (0, None)
    run.write_status(state, code, message, step, checkpoint)


def _report_peer_failure(run: RunDirectory, world: World, error: ProcessError) -> None:
    """Report the failure of another process from a process that cannot unwind."""
    say(f"nmt: {error}")
    _write_failure(run, world, error)
