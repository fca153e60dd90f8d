"""Save and load checkpoints with all processes together: torch.distributed.checkpoint, in safetensors files.

Each process writes only its own shard. A checkpoint describes the unsharded tensors, so any number of processes can
load it, each its own shard. Several hosts need a file system that all of them see. Nothing is pickled: the only formats
are safetensors and JSON. `nmt.checkpoint` defines the contents of a step folder and chooses one to load.

Training waits only while the tensors are copied to host memory. A thread does the rest in the background.
"""

import json
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.futures import Future

from nmt.checkpoint import Checkpoint, list_checkpoints, prune_checkpoints, seal, step_folder
from nmt.config import Config
from nmt.errors import CheckpointError, StorageError, UserError
from nmt.files import folder_atomically, remove, unfinished
from nmt.model.assemble import skeleton
from nmt.model.names import is_expert
from nmt.parallel.expert_parallel import shard_of
from nmt.parallel.mesh import World
from nmt.parameters import OFFSETS, Tensors, check_finite, check_parameters, check_vocabulary, stored

# The main process hashes the files of all processes while the others wait. A hundred GB take minutes.
_HASHING = timedelta(hours=2)

Parts = Mapping[str, Mapping[str, Tensor]]
"""The parts of a checkpoint by name: "model" (parameters) and "training" (the optimiser's moments)."""


class Saver:
    """Writer of a run's checkpoints, one at a time, in the background of training.

    All processes must call the same methods. The next call raises the error of an earlier save.
    """

    def __init__(self, folder: Path, vocabulary: str, keep: int, world: World) -> None:
        self.folder, self.vocabulary, self.keep, self.world = folder, vocabulary, keep, world
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        # A separate group: its messages must not mix with those of training in the meantime, and hashing may take
        # longer than training's timeout.
        self.group = dist.new_group(backend="gloo", timeout=_HASHING) if world.mesh else None

    def check_space(self, checkpoint_bytes: int, saves_left: int) -> None:
        """Raise StorageError, in all processes, if the disk cannot hold the checkpoints that the run still adds."""

        def check() -> None:
            there = len(list_checkpoints(self.folder))
            # Those kept, the best, and the new one, which is written before an old one is removed.
            more = min(self.keep + 2 - there, saves_left)
            existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            if more * checkpoint_bytes > free:
                raise StorageError(
                    f"{self.folder} will hold {more} more checkpoints of {checkpoint_bytes / 1e9:.3g} GB, but its disk "
                    f"has {free / 1e9:.3g} GB free: make room, or lower training.keep_checkpoints={self.keep}"
                )

        self.world.on_main(check)

    def save(self, step: int, parts: Parts, state: dict[str, Any], score: float | None) -> None:
        """Copy the tensors to the host, and start writing checkpoints/step-N in the background.

        Waits for the previous save first, and raises its StorageError if it failed.
        """
        self.wait()
        staged = {part: {name: _on_host(tensor) for name, tensor in parts[part].items()} for part in parts}
        self._thread = threading.Thread(target=self._run, args=(step, staged, state, score), name="Saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. StorageError if it could not be written; earlier ones stay."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, parts: dict[str, Tensors], state: dict[str, Any], score: float | None) -> None:
        final = step_folder(self.folder, step)
        temporary = unfinished(final)
        folder = ExitStack()  # entered by the main process only

        def begin() -> None:
            folder.enter_context(folder_atomically(final))
            for part in parts:
                (temporary / part).mkdir()

        def finish() -> None:
            (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
            seal(temporary, {"step": step, "score": score, "vocabulary": self.vocabulary})
            # A folder with this name can only be a damaged or repeated save of this step. The new one replaces it.
            remove(final)
            folder.close()

        try:
            if self.world.device.type == "cuda":
                # By default, a thread uses the first GPU, where every process would then allocate memory.
                torch.cuda.set_device(self.world.device)
            with folder:
                self.world.on_main(begin, self.group)
                for part, tensors in parts.items():
                    with _quiet():
                        dcp.save(
                            {name: share_of_whole(name, tensor, self.world) for name, tensor in tensors.items()},
                            storage_writer=_Writer(temporary / part),
                            process_group=self.group,
                            no_dist=self.group is None,
                        )
                self.world.on_main(finish, self.group)
            self.world.on_main(lambda: prune_checkpoints(self.folder, self.keep, step), self.group)
        # CheckpointException derives from BaseException.
        except (Exception, CheckpointException) as error:
            cause = _innermost(error)
            # An OSError's text can contain a path, and a path can match the words for a lost process.
            lost = (
                None if isinstance(cause, OSError) else self.world.peer_failure(str(cause), f"while saving step {step}")
            )
            self._error = lost or StorageError(
                f"cannot write checkpoint {final}: {_cause(cause)}; earlier checkpoints are untouched"
            )
            self._error.reported_elsewhere = _is_of_others(error, self.world.rank)
            self._error.__cause__ = error


def _is_of_others(error: BaseException, rank: int) -> bool:
    """Return whether a save failed in other processes only."""
    if isinstance(error, CheckpointException):
        return rank not in error.failures
    return isinstance(error, UserError) and error.reported_elsewhere


def _on_host(tensor: Tensor) -> Tensor:
    """Return a copy in float32, the only type of checkpoints. A GPU needs no memory for it."""
    return tensor.detach().to("cpu", copy=True).contiguous().float()


class _Writer(HuggingFaceStorageWriter):
    """The library's writer, except that it writes files directly from the tensors' memory.

    The library would first build each file as a bytes object. Saving thus needs no memory besides the tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file. Raises OSError or SafetensorError if that fails."""
        done: Future[list[WriteResult]] = Future()
        tensors, offsets = {}, {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            tensors[item.index.fqn] = tensor
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            path.touch()
            mode = path.stat().st_mode
            save_file(tensors, path, {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})
            path.chmod(mode)  # safetensors makes files that only their owner can read
        done.set_result([])
        return done


def _innermost(error: BaseException) -> BaseException:
    """Return the exception that caused the library's exception, or `error` if there is none."""
    if isinstance(error, CheckpointException) and error.failures:
        return _innermost(next(iter(error.failures.values()))[0])
    return error


def _cause(error: BaseException) -> str:
    """Return the text of the innermost exception, as one line."""
    return " ".join(str(_innermost(error)).split())


def share_of_whole(name: str, tensor: Tensor, world: World) -> Tensor:
    """Return `tensor` as torch.distributed.checkpoint needs it: experts as this process's shard of a DTensor."""
    if world.group_size == 1 or not (is_expert(name) and tensor.dim()):
        return tensor
    return DTensor.from_local(tensor, world.host_mesh, [Replicate(), Shard(0)], run_check=False)


def read_share(folder: Path, targets: Tensors, world: World) -> None:
    """Fill `targets` from one part of a checkpoint. They are CPU tensors, with this process's share of the experts.

    CheckpointError if the part does not hold these tensors.
    """
    _read_into(folder, {name: share_of_whole(name, tensor, world) for name, tensor in targets.items()})


def _read_into(folder: Path, targets: Tensors) -> None:
    if not targets:
        return
    try:
        stored(folder)  # raises for unreadable files, for which the library would log many lines
        with _quiet():
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    # The reader raises many types: a manifest's hashes can match any content.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} has other tensors than this program writes ({_cause(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the library's warning about a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_checkpoint(
    folder: Path, step: int, parts: Parts, state: dict[str, Any], score: float | None, vocabulary: str
) -> Path:
    """Write one checkpoint from a single process, and return its folder. StorageError if it cannot be written."""
    saver = Saver(folder, vocabulary, keep=sys.maxsize, world=World(torch.device("cpu")))
    saver.save(step, parts, state, score)
    saver.wait()
    return step_folder(folder, step)


def load_parameters(checkpoint: Checkpoint, config: Config, vocab_size: int, vocabulary: str, world: World) -> Tensors:
    """Load the parameters, or this process's share of them, from a checkpoint whose files are verified, on the CPU.

    CheckpointError if they do not fit `config` or were made with another vocabulary.
    """
    check_vocabulary(checkpoint, vocabulary)
    network = skeleton(config.model, vocab_size, shard_of(config, world))
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    own = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if is_expert(name):
            shape[0] *= world.group_size
    check_parameters(checkpoint, stored(checkpoint.parameters), shapes)
    read_share(checkpoint.parameters, own, world)
    for name, parameter in own.items():
        check_finite(checkpoint, name, parameter)
    return own
