"""Write figures of training to metrics.jsonl, TensorBoard and the terminal."""

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nmt.errors import StorageError
from nmt.files import read_regular, write_atomically
from nmt.metrics.record import DevLine, TrainLine, step_of
from nmt.terminal import printable, written

# Number of bars of a histogram, from 0 to its largest value.
_NUM_BARS = 60
# Smallest width of a terminal for a progress bar. In a narrower one, lines are printed instead.
_BAR_COLUMNS = 60


class MetricsWriter:
    """Writer of metrics.jsonl, TensorBoard curves and a progress bar (without a terminal, plain lines).

    A run that resumes from step n first removes the lines of later steps, so that every step has one line; from the
    start (step 0), it removes all. All methods
    raise StorageError if a file cannot be written.
    """

    def __init__(self, places: tuple[Path, Path] | None, step: int, max_steps: int) -> None:
        """Open the files at `places`: metrics.jsonl, and the folder for TensorBoard. With None, nothing is written."""
        self.quiet = places is None
        if places is None:
            return
        path, tensorboard = places
        self.path, self.tensorboard_path = places
        if path.exists():
            with _writing(path):
                text = read_regular(path).decode(errors="replace")
            kept = [line for line in text.splitlines() if step and step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        with _writing(path):
            self.file = path.open("a", encoding="utf-8")
        with _writing(tensorboard):
            self.tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else 0)
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            disable=not _has_room(),
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar:6}| {desc}",
        )

    def write(self, line: TrainLine | DevLine) -> None:
        """Write one line, and one point per curve."""
        if self.quiet:
            return
        figures = line.to_dict()
        with _writing(self.path):
            self.file.write(json.dumps(figures) + "\n")
            self.file.flush()
        with _writing(self.tensorboard_path):
            for name, value in figures.items():
                if name not in ("step", "kind"):
                    self.tensorboard.add_scalar(f"{line.kind}/{name}", value, line.step)

    def write_histograms(self, step: int, kind: str, values: Mapping[str, Tensor]) -> None:
        """Write the distributions of these values to TensorBoard."""
        if self.quiet:
            return
        with _writing(self.tensorboard_path):
            for name, each in values.items():
                bars = np.linspace(0.0, max(float(each.max()), 1.0), _NUM_BARS + 1)
                self.tensorboard.add_histogram(f"{kind}/{name}", each, step, bins=bars)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.quiet:
            return
        self.bar.update(step - self.bar.n)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the progress bar if there is one."""
        if self.quiet:
            return
        written(lambda: self.bar.write(printable(line), file=sys.stderr))
        written(sys.stderr.flush)

    def show(self, text: str, lines: str, keep: bool) -> None:
        """Show the newest figures: `text` beside the progress bar and, if `keep`, `lines` above it.

        Without a bar, always print `lines`.
        """
        if self.quiet:
            return
        if not self.bar.disable:
            self.bar.set_description_str(text, refresh=False)
        if keep or self.bar.disable:
            self.say(lines)

    def __enter__(self) -> Self:
        if not self.quiet:
            self.hook_before, threading.excepthook = threading.excepthook, self._in_thread
        return self

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        # An OSError in TensorBoard's thread is raised again by the next call of TensorBoard.
        if not isinstance(failure.exc_value, OSError):
            self.hook_before(failure)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        self.bar.close()
        try:
            with _writing(self.tensorboard_path), self.file:
                self.tensorboard.close()
        except StorageError:
            if error is None:
                raise
        finally:
            threading.excepthook = self.hook_before


def _has_room() -> bool:
    """Return whether standard error is a terminal with room for a bar. Some terminals have 0 rows and columns."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal; closed; no standard error
        return False
    return columns >= _BAR_COLUMNS and rows >= 2


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; run the same command again to resume from the last "
            "checkpoint"
        ) from error
