"""What the cases share: a tiny corpus and its settings, processes that cannot outlive their case, and comparisons."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nmt.checkpoint import Checkpoint, list_checkpoints, newest_verified
from nmt.corpus.phrasebook import phrasebook
from nmt.parameters import read_tensors

ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).resolve().parent / "hooks"
NMT = [sys.executable, "-m", "nmt.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nmt.cli"]

# How long processes wait for each other, and how much longer until all of them are gone: on CPUs, on GPUs. There the
# first operation waits for NCCL to connect, and a process that was told to stop takes 20 s to be sure that it hangs.
TIMEOUT_SECONDS = (8, 25)
PATIENCE_SECONDS = (15, 35)
# No command takes as long as this unless it hangs, also on a busy machine.
LIMIT_SECONDS = 150

MODEL = (
    "model=small",
    "model.hidden_size=32",
    "model.cell_size=32",
    "model.num_encoder_layers=1",
    "model.num_decoder_layers=1",
    "model.dropout=0.1",
    "model.attention.size=32",
    "model.moe.num_experts=4",
    "model.moe.hidden_sizes=[32]",
)
TRAINING = (
    "training.schedule=inverse_sqrt",
    "training.warmup_steps=5",
    "training.batch_tokens=150",
    "training.micro_batches=2",
    "training.log_every=1",
    "training.validate_every=10",
    "training.validation_sentences=0",
    "training.checkpoint_every=5",
    "training.keep_checkpoints=2",
)
# Figures of a line that depend on the clock.
_OF_THE_CLOCK = ("tokens_per_second", "tflops")


def corpus_settings(text: Path, data: Path) -> list[str]:
    """Text files train/dev/test.en/.de in one folder, prepared in another."""
    files = [f'corpus.{split}.{side}=["{split}.{language}"]' for split, side, language in _files()]
    return [
        "corpus=files",
        "corpus.name=tiny",
        f'corpus.root="{text}"',
        f'corpus.directory="{data}"',
        "corpus.subwords.kind=bpe",
        "corpus.subwords.vocab_size=256",
        *files,
    ]


def _files() -> list[tuple[str, str, str]]:
    sides = (("source", "en"), ("target", "de"))
    return [(split, side, language) for split in ("train", "dev", "test") for side, language in sides]


def write_text(folder: Path, skip: int = 0, pairs: int = 120) -> None:
    """Sentences of the phrasebook, from number `skip` on; an epoch of them is about twenty updates."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", pairs), ("dev", 12), ("test", 4)):
        chosen = list(islice(phrasebook(split, "en", "de", skip + count), skip, skip + count))
        for language in ("en", "de"):
            lines = [pair.source if language == "en" else pair.target for pair in chosen]
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass
class Tally:
    """What a case counts: faults, what survived them, results compared bit by bit, and promises that were broken."""

    injected: int = 0
    survived: int = 0
    compared: int = 0
    equal: int = 0
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class Process:
    """One command with all processes it starts: found by a mark in their environment, ended with the case."""

    def __init__(self, command: Sequence[str], log: Path, faults: Sequence[dict[str, Any]], extra: dict[str, Any]):
        self.mark = uuid.uuid4().hex
        self.log, self.happened_path = log, log.with_suffix(".faults")
        self.happened_path.unlink(missing_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GOMP_SPINCOUNT": "10000",
            "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}",
            "NMT_FAULTS_LOG": str(self.happened_path),
            "NMT_FAULTS": json.dumps(list(faults)),
            "NMT_FAULTS_MARK": self.mark,
        }
        limit = extra.pop("preexec_fn", None)
        for name, value in extra.items():
            environment[name] = value
        self.started = time.monotonic()
        with log.open("wb") as stream:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env=environment,
                preexec_fn=limit,
                start_new_session=True,
                cwd=ROOT,
            )

    def pids(self, rank: int | None = None) -> list[int]:
        """Its processes that are alive, or those of one rank."""
        wanted = [f"NMT_FAULTS_MARK={self.mark}".encode()]
        wanted += [f"RANK={rank}".encode()] if rank is not None else []
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if not zombie and all(each in variables for each in wanted):
                found.append(int(folder.name))
        return found

    def kill(self, rank: int | None = None) -> None:
        """kill -9 all of its processes, or those of one rank."""
        for pid in self.pids(rank):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def happened(self, kind: str) -> list[list[str]]:
        """The faults of a kind so far: [time, rank, pid, kind, more ...]."""
        if not self.happened_path.exists():
            return []
        lines = [line.split() for line in self.happened_path.read_text().splitlines()]
        return [line for line in lines if len(line) > 3 and line[3] == kind]

    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """Its exit status, when all of its processes are gone. TimeoutError, after killing them, if they are not."""
        deadline = time.monotonic() + seconds
        try:
            status = self.popen.wait(seconds)
            while self.pids():
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.05)
        except (subprocess.TimeoutExpired, TimeoutError):
            alive = self.pids()
            self.kill()
            self.popen.wait()
            raise TimeoutError(f"{len(alive)} processes alive after {seconds:.0f} s: {self.tail()}") from None
        return status

    def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        """Whether the condition came true while it ran. TimeoutError, after killing all, if nothing happens."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.popen.poll() is not None:
                return condition()
            if time.monotonic() > deadline:
                self.kill()
                self.popen.wait()
                raise TimeoutError(f"waited {seconds:.0f} s in vain: {self.tail()}")
            time.sleep(0.002)
        return True

    def tail(self) -> str:
        """The last line of what it said."""
        return (self.errors().strip().splitlines() or ["(silent)"])[-1]


class Box:
    """One case: its folder, its seeded random numbers, its tally."""

    def __init__(self, name: str, shared: "Shared", quick: bool) -> None:
        self.name, self.shared, self.quick = name, shared, quick
        self.folder = shared.folder / name
        self.folder.mkdir()
        self.random = random.Random(f"{shared.seed} {name}")
        self.tally = Tally()
        self.processes: list[Process] = []

    def settings(self, run: str, *changes: str) -> list[str]:
        """The arguments of `nmt train` for a run of this case. Later settings win."""
        steps = f"training.max_steps={self.shared.steps}"
        device = f"training.device={'cuda' if self.shared.gpus else 'cpu'}"
        timeout = f"parallel.timeout_seconds={self.shared.timeout_seconds}"
        fixed = [*corpus_settings(self.shared.text, self.shared.data), *MODEL, *TRAINING, device, timeout, steps]
        given = [f'run.directory="{self.folder}"', f"run.name={run}", *changes]
        keys = {each.partition("=")[0] for each in given}
        return [each for each in fixed if each.partition("=")[0] not in keys] + given

    def run(self, name: str) -> Path:
        return self.folder / name

    def start(
        self, run: str, *changes: str, processes: int = 1, faults: Sequence[dict[str, Any]] = (), **extra: Any
    ) -> Process:
        """`nmt train` of a run, in one or several processes, with faults to come."""
        several = ["--processes", str(processes)] if processes > 1 else []
        return self.command([*NMT, "train", *several, *self.settings(run, *changes)], faults, **extra)

    def command(self, command: Sequence[str], faults: Sequence[dict[str, Any]] = (), **extra: Any) -> Process:
        log = self.folder / f"{len(self.processes):03d}.log"
        process = Process(command, log, faults, extra)
        self.processes.append(process)
        return process

    def train(self, run: str, *changes: str, processes: int = 1, **extra: Any) -> Process:
        """`start` and wait for its end."""
        process = self.start(run, *changes, processes=processes, **extra)
        process.wait()
        return process

    def promise(self, kept: bool, what: str, process: Process | None = None) -> bool:
        """Note a broken promise, with the last words of the process that broke it."""
        if not kept:
            said = f" [{process.log.name}: {process.tail()[:300]}]" if process else ""
            self.tally.broken.append(what + said)
        return kept

    def fault(self, kept: bool, what: str, process: Process | None = None) -> bool:
        """Count one fault, and whether everything promised for it was kept."""
        self.tally.injected += 1
        self.tally.survived += kept
        return self.promise(kept, what, process)

    def finish(self, run: str, *changes: str, processes: int = 1, **extra: Any) -> bool:
        """Let the same command go on to the end, and compare with the run that nothing interrupted."""
        process = self.train(run, *changes, processes=processes, **extra)
        if not self.promise(process.popen.returncode == 0, f"{run} did not go on to its end", process):
            return False
        return self.compare(self.run(run), self.shared.whole(processes))

    def compare(self, run: Path, whole: Path) -> bool:
        """Count whether two runs are the same in every bit that does not tell the time; on GPUs, which add in any
        order, whether they are alike.
        """
        different = differences(run, whole)
        self.tally.compared += 1
        self.tally.equal += not different
        if self.shared.gpus and different:
            scores = [lines(each, "dev")[-1]["perplexity"] for each in (run, whole)]
            self.tally.notes.append(f"dev perplexity {scores[0]:.3f}, whole {scores[1]:.3f}")
            return self.promise(abs(scores[0] / scores[1] - 1) < 0.05, f"{run.name} is far from {whole.name}")
        return self.promise(not different, f"{run.name} differs from {whole.name}: {'; '.join(different[:3])}")

    def copy(self, source: Path, name: str) -> Path:
        """A run of this case that begins as a copy of another."""
        subprocess.run(["cp", "-a", "--no-preserve=links", str(source), str(self.run(name))], check=True)
        return self.run(name)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.popen.wait()


class Shared:
    """What all cases read: the text, its prepared form, and runs that nothing interrupted."""

    def __init__(self, folder: Path, seed: int, steps: int, gpus: bool = False) -> None:
        self.folder, self.seed, self.steps, self.gpus = folder, seed, steps, gpus
        self.timeout_seconds, self.patience_seconds = TIMEOUT_SECONDS[gpus], PATIENCE_SECONDS[gpus]
        self.text, self.data = folder / "text", folder / "data"
        self.lock = threading.Lock()
        write_text(self.text)

    def whole(self, processes: int) -> Path:
        """The run of so many processes that nothing interrupted."""
        return self.made(f"whole-{processes}", processes=processes)

    def half(self, processes: int) -> Path:
        """The same, as far as half of its updates, with two checkpoints."""
        return self.made(f"half-{processes}", f"training.max_steps={self.steps // 2}", processes=processes)

    def made(self, name: str, *changes: str, processes: int = 1) -> Path:
        """A run that is made when it is first asked for."""
        with self.lock:
            box = self.folder / name
            if not box.exists():
                process = Box(name, self, quick=True).train("run", *changes, processes=processes)
                if process.popen.returncode:
                    raise RuntimeError(f"without any fault: {process.errors()}")
            return box / "run"


# --------------------------------------------------------------------------------------------------- looking at runs


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is what was written."""
    return newest_verified(list_checkpoints(run / "checkpoints"))[0]


def newest_step(run: Path) -> int:
    """Its step, 0 without one."""
    found = newest(run)
    return found.step if found else 0


def status(run: Path) -> dict[str, Any]:
    """RUN_STATUS.json; empty if there is none."""
    path = run / "RUN_STATUS.json"
    return json.loads(path.read_text()) if path.exists() else {}


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run, without what the clock says. A line cut short by a crash is left out."""
    found = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if figures["kind"] == kind:
            found.append({name: value for name, value in figures.items() if name not in _OF_THE_CLOCK})
    return found


def differences(run: Path, whole: Path) -> list[str]:
    """Where two finished runs differ: parameters, moments, training state, every logged figure."""
    one, other = newest(run), newest(whole)
    if one is None or other is None or one.step != other.step:
        return [f"newest checkpoint {one and one.step} against {other and other.step}"]
    found = [] if _timeless(one.state()) == _timeless(other.state()) else ["state.json"]
    for part in ("model", "training"):
        ours, theirs = (read_tensors(each.path / part) for each in (one, other))
        if ours.keys() != theirs.keys():
            return [f"{part}: names"]
        bits = ((name, ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in sorted(ours))
        found += [f"{part} {name}" for name, a, b in bits if not torch.equal(a, b)]
    for kind in ("train", "dev"):
        ours_, theirs_ = lines(run, kind), lines(whole, kind)
        if [each["step"] for each in ours_] != [each["step"] for each in theirs_]:
            found.append(f"{kind} lines: {len(ours_)} against {len(theirs_)}")
        found += [f"{kind} line {a['step']}" for a, b in zip(ours_, theirs_, strict=False) if repr(a) != repr(b)]
    return found


def _timeless(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state without how long it took."""
    return state | {"progress": state["progress"] | {"seconds": 0.0}}


def one_line(process: Process, *parts: str) -> bool:
    """Whether the command ended without a traceback, its last line naming all of these."""
    text = process.errors()
    return "Traceback" not in text and all(part in process.tail() for part in parts)
