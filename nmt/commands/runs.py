"""nmt runs: list the runs in a folder with state, best score and size."""

import argparse
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from nmt.checkpoint import Checkpoint, exported_checkpoint, list_checkpoints
from nmt.commands import Parser, say, show
from nmt.config import RunConfig
from nmt.errors import CheckpointError, UserError
from nmt.process import host_name
from nmt.run import RunDirectory


class _Row(NamedTuple):
    """A run as text; unknown cells are "-"."""

    name: str
    state: str
    step: str = "-"
    best: str = "-"
    checkpoint: str = "-"
    size: str = "-"


_HEAD = _Row("run", "state", "step", "best score", "checkpoint", "size")


def parser() -> Parser:
    """Options of `nmt runs`."""
    parser = Parser(
        "runs",
        "List the runs in a folder: state, last saved step, best validation score with its checkpoint, and size on "
        "disk. A run that was training when its process disappeared is shown as died.",
        "  nmt runs\n  nmt runs /data/runs",
        takes_run=False,
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of the runs (default: runs)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print a table of the runs in `options.folder`, sorted by name. CheckpointError if it is not a folder."""
    folder = Path(options.folder or RunConfig.directory)
    if options.folder and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that has the runs")
    rows = [_row(path) for path in sorted(folder.iterdir()) if _is_run(path)] if folder.is_dir() else []
    if not rows:
        say(f"there are no runs in {folder}: start one with nmt train")
        return
    table = [[_on_one_line(cell) for cell in row] for row in (_HEAD, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _on_one_line(cell: str) -> str:
    """Return a cell with U+FFFD for each character that cannot be printed: a folder's name may have line breaks."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cell)


def _is_run(path: Path) -> bool:
    """Return True for a run or an exported model, even if damaged. Hidden folders are still being written."""
    run = RunDirectory(path)
    traces = (run.config_path, run.status_path, run.checkpoints)
    return not path.name.startswith(".") and (run.exported or any(map(os.path.lexists, traces)))


def _row(path: Path) -> _Row:
    run = RunDirectory(path)
    try:
        size = _readable_size(_size(path))
        if run.exported:
            return _Row(path.name, "exported", f"{exported_checkpoint(path).step:,}", size=size)
        saved = list_checkpoints(run.checkpoints)
        status = run.status()
        step = f"{saved[-1].step:,}" if saved else "0"
        try:
            best_by = run.config().training.best_by
        except UserError:
            return _Row(path.name, "damaged", step, size=size)
        # A run that nmt experts --grow wrote has a checkpoint, but neither a status nor metrics.
        new = saved and not any(map(os.path.lexists, (run.status_path, run.metrics_path)))
        return _Row(path.name, "not trained yet" if new else _state(status), step, *_best(saved, best_by), size)
    except UserError:
        return _Row(path.name, "damaged", size=size)
    except OSError as error:
        return _Row(path.name, error.strerror or "unreadable")


def _state(status: dict[str, Any]) -> str:
    """Return the state in RUN_STATUS.json, or "died" if it is running but its process is gone."""
    state = status.get("state", "unknown")
    pid = status.get("pid")
    if state != "running" or status.get("host") != host_name() or not isinstance(pid, int):
        return state
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "died"
    except PermissionError:
        pass  # it exists, but belongs to another user
    return state


def _best(saved: list[Checkpoint], best_by: str) -> tuple[str, str]:
    """Return (best score, name of its checkpoint), or without any score ("-", name of the newest checkpoint or "-")."""
    scored = [(each.score, each) for each in saved if each.score is not None]
    if not scored:
        return "-", saved[-1].path.name if saved else "-"
    score, checkpoint = min(scored, key=lambda each: each[0])
    # Lower is better: BLEU is stored as a negative number.
    shown = f"BLEU {-score:.2f}" if best_by == "bleu" else f"perplexity {score:.3f}"
    return shown, checkpoint.path.name


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder, without links and files that disappear meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def _readable_size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
