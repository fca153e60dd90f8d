"""What the sweep of tests/faults once found broken, each in a test of its own."""

import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.utils.tensorboard import SummaryWriter

import nmt.files
from nmt.checkpoint import list_checkpoints, seal
from nmt.cli import main
from nmt.commands.launch import _end_like, _written_at
from nmt.errors import ProcessError, StorageError, UserError, exit_status, same_error
from nmt.metrics.record import DevLine
from nmt.metrics.writer import MetricsWriter
from nmt.parallel.mesh import World
from nmt.parallel.saving import Saver
from nmt.run import RunDirectory
from nmt.training.reports import Reports
from nmt.training.trainer import Trainer
from tests.toy import settings, train, write_corpus


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def places(folder: Path) -> tuple[Path, Path]:
    return folder / "metrics.jsonl", folder / "tensorboard"


# -------------------------------------------------------------------------------------------- metrics on a full disk


def test_metrics_that_find_no_space_name_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(places(tmp_path), 0, 9) as out:
        out.write(DevLine(1, 2.0, 3.0))
        with monkeypatch.context() as patch:
            patch.setattr(SummaryWriter, "add_scalar", no_space)
            with pytest.raises(StorageError, match=r"cannot write .*tensorboard: No space left on device"):
                out.write(DevLine(2, 2.0, 3.0))

    def write_to_full_device() -> None:
        with MetricsWriter(places(tmp_path), 1, 9) as out:
            out.file = open("/dev/full", "w")  # noqa: SIM115 - the writer closes it
            out.write(DevLine(2, 2.0, 3.0))

    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        write_to_full_device()


def test_the_thread_of_tensorboard_does_not_speak_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its error comes out of a later call, or of the end; a thread's other errors are still told."""
    before = threading.excepthook

    def write_many() -> None:
        with MetricsWriter(places(tmp_path), 0, 9) as out:
            monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", no_space)
            for step in range(1, 1000):
                out.write(DevLine(step, 2.0, 3.0))

    with pytest.raises(StorageError, match=r"cannot write .*tensorboard: No space left"):
        write_many()
    assert threading.excepthook is before
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_training_is_not_hidden_by_files_that_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SummaryWriter, "close", no_space)
    with pytest.raises(KeyError), MetricsWriter(places(tmp_path), 0, 9):
        raise KeyError
    with pytest.raises(StorageError, match=r"cannot write"), MetricsWriter(places(tmp_path), 0, 9):
        pass


def test_going_on_with_a_full_disk_keeps_the_lines_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = places(tmp_path)
    lines = '{"step": 1}\n{"step": 2}\n'
    path.write_text(lines)
    monkeypatch.setattr(nmt.files.os, "fsync", no_space)
    with pytest.raises(StorageError):
        MetricsWriter(places(tmp_path), 1, 9)
    assert path.read_text() == lines


# ------------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x"), 2),
        (StorageError("x"), 6),
        (ValueError("x"), 2),
        (OSError(errno.EIO, "x"), 6),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (SystemExit(0), 1),
    ],
    ids=repr,
)
def test_run_status_has_the_status_of_the_command(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    assert exit_status(error) == status
    if not isinstance(error, OSError):
        return

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Reports, "introduce", fail)
    assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=1")]) == status
    told = json.loads((corpus / "a" / "RUN_STATUS.json").read_text())
    assert (told["state"], told["code"]) == ("failed", status)


def test_a_bug_is_told_with_rank_and_step(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(trainer: Trainer, _score: float | None) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(Trainer, "_save", fail)
    with pytest.raises(TypeError) as caught:
        main(["train", *settings(corpus, "run.name=a", "training.max_steps=9", "training.checkpoint_every=2")])
    assert caught.value.__notes__ == ["rank 0 of 1, at step 2"]
    told = json.loads((corpus / "a" / "RUN_STATUS.json").read_text())
    assert (told["code"], told["message"]) == (1, "TypeError: a bug (rank 0 of 1, at step 2)")


@pytest.mark.parametrize("pattern", ["model/*", "training/*", "state.json"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04no safetensors", b"{}"])
def test_what_a_manifest_vouches_for_may_still_be_no_checkpoint(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], pattern: str, content: bytes
) -> None:
    [*earlier, checkpoint] = list_checkpoints(Path(shutil.copytree(run, tmp_path / "a")) / "checkpoints")
    for each in earlier:
        shutil.rmtree(each.path)
    for path in checkpoint.path.glob(pattern):
        path.write_bytes(content)
    (checkpoint.path / "manifest.json").unlink()
    seal(checkpoint.path, {name: checkpoint.manifest[name] for name in ("step", "score", "vocabulary")})
    capfd.readouterr()
    assert main(["train", str(tmp_path / "a"), "training.max_steps=9"]) == 4
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("nmt:")]
    assert str(checkpoint.path / pattern.split("/")[0]) in line


def test_a_run_does_not_go_on_with_another_vocabulary_beside_it(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would train well and never translate."""
    run = train(corpus, "a", 1)
    own = run / "subwords.model"
    own.write_bytes(own.read_bytes() + b"x")
    capfd.readouterr()
    assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=2")]) == 4
    assert f"{own} is not the vocabulary that the run was started with" in capfd.readouterr().err.splitlines()[-1]


def test_a_corpus_that_cannot_be_written_is_no_fault_of_the_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path)
    (tmp_path / "p").write_text("a file")
    assert main(["train", *settings(tmp_path, "run.name=a")]) == 6
    assert f"corpus.directory={tmp_path}/p cannot be written" in capfd.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------- the cause, of several processes


class RankOne(World):
    """Rank 1 of 2, without the other."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.size = 1, 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),  # the other knows nothing of it
        (CheckpointException("save", {1: _wrap_exception(OSError("no space"))}), False),
        (CheckpointException("save", {0: _wrap_exception(OSError("no space"))}), True),
        (same_error(6, "no space"), True),
    ],
)
def test_a_save_that_failed_here_is_told_here(
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    raised: BaseException,
    told: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("nmt.parallel.saving.dcp.save", fail)
    saver = Saver(corpus, "vocabulary", 1, RankOne())
    saver.save(1, {"model": {}}, {}, None)
    with pytest.raises(StorageError, match=r"[nN]o space") as caught:
        saver.wait()
    assert caught.value.reported_elsewhere is told

    def train(*_: Any) -> None:
        raise caught.value

    monkeypatch.setattr("nmt.commands.train.World.start", lambda *_: RankOne())
    monkeypatch.setattr("nmt.commands.train._open", train)
    monkeypatch.setattr(RankOne, "on_main", lambda _self, action: action())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert main(["train", *settings(corpus, "run.name=a")]) == 6
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot write checkpoint" in line]
    assert len(said) == (0 if told else 1)


def failed(codes: dict[int, int]) -> ChildFailedError:
    failures = {rank: ProcessFailure(rank, 0, code, "/nowhere") for rank, code in codes.items()}
    return ChildFailedError("nmt", failures)


@pytest.mark.parametrize(
    ("told", "codes", "status"),
    [
        (("failed", 7), {0: 6, 1: 7}, 6),  # rank 0 could not say why; rank 1 said that rank 0 was lost
        (("failed", 7), {0: 7, 1: 6}, 6),
        (("running", None), {0: 6, 1: -15}, 6),
        (("running", None), {1: -9}, 7),
        (("failed", 7), {0: 7, 1: -9}, 7),
        (("failed", 5), {0: 5, 1: 5}, 5),
        (("failed", 1), {0: -15, 1: 7}, 1),
        (("stopped", 143), {0: 143, 1: 143}, 143),
        (("", None), {0: 2, 1: 2}, 2),
    ],
)
def test_the_launcher_ends_with_the_cause(
    tmp_path: Path, told: tuple[str, int | None], codes: dict[int, int], status: int
) -> None:
    run = RunDirectory(tmp_path)
    before = _written_at(run)
    if told[0]:
        run.write_status(*told, "", 3, "step-3")
    with pytest.raises((SystemExit, UserError)) as caught:
        _end_like(run, before, failed(codes), 2)
    error = caught.value
    assert (error.code if isinstance(error, SystemExit) else exit_status(error)) == status
    if told[0]:
        assert (run.status()["state"], run.status()["code"]) == (told[0].replace("running", "failed"), status)
        assert run.status()["step"] == 3
    if isinstance(error, UserError):
        lost = next(rank for rank, code in codes.items() if code not in (7, -15))
        assert f"rank {lost} of 2" in str(error)
    assert (type(error) is ProcessError) == (status == 7 and isinstance(error, UserError))


# ------------------------------------------------------------------------------------------------ nothing is unpickled


def unpickles(source: str) -> list[str]:
    """What in a source could run a program hidden in a file that it reads."""
    return re.findall(
        r"\bpickle\b(?=[.\s]*(?:import|load|\n))|\btorch\.load\b|\ballow_pickle\b(?!=False)|\bunsafe_load\b", source
    )


def test_no_file_that_is_read_can_run_a_program() -> None:
    sources = {path: path.read_text() for path in Path(nmt.files.__file__).parent.rglob("*.py")}
    assert len(sources) > 50
    assert {path: unpickles(source) for path, source in sources.items() if unpickles(source)} == {}
    for evil in ("import pickle\n", "torch.load(path)", "np.load(path, allow_pickle=True)", "yaml.unsafe_load(text)"):
        assert unpickles(evil)
