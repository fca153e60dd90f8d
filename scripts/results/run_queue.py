"""Train the next runs of the queue behind docs/results/quality.md, whenever a GPU has time.

  python scripts/results/run_queue.py list                           # every run and its state
  python scripts/results/run_queue.py run --minutes 9 --jobs 2       # the next runs, for nine minutes, two on each GPU
  python scripts/results/run_queue.py run explain.base.moe_4 claim   # this one, then all of this study

results/queue.yaml lists the runs and their purpose, and test sets to score some of them on: "test" is a run's own, and
NAME is FOLDER/NAME.LANGUAGE.gz with --texts FOLDER. A run that ends leaves a record in results/runs/: its settings,
commit, hardware, seconds and figures. scripts/results/pages.py makes tables from the records. A run that does not end
within --minutes is stopped and saved, and the next `run` resumes it. SIGTERM, SIGHUP and Ctrl-C stop and save all.
Settings such as corpus.root=/data/europarl are passed to every `nmt train`. The record has those that are no places
as `overridden`, and `list` shows them.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml

from nmt.cost.operations import model_cost
from nmt.errors import DataError, UserError, exit_status
from nmt.files import differs, read_json, write_atomically
from nmt.metrics.record import DevLine, TrainLine, read_lines
from nmt.process import ended_by_signals
from nmt.run import RunDirectory, flatten

ROOT = Path(__file__).parents[2]
QUEUE = ROOT / "results" / "queue.yaml"
RECORDS = ROOT / "results" / "runs"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOPPED = {*(128 + number for number in _STOPPING), *(-number for number in _STOPPING)}
"""Statuses of `nmt train` after a signal; negative before it has begun to catch them."""
_PLACES = re.compile(r"(corpus\.(root|directory)|training\.device|decoding\.device)=")
_STUDY = {"question": str, "settings": [str], "variants": {str: [str]}, "changes": [{str: object}]}
_CHANGE = {"name", "change", "purpose"}

_GONE = "training.bands="
"""A setting of older records that is gone: their steps had as many sentence lengths, where all steps mix all now."""


@dataclass(frozen=True)
class Entry:
    """A run of the queue."""

    name: str
    """STUDY.CHANGE.VARIANT."""
    purpose: str
    settings: list[str]
    """Of `nmt train`, without its name and places."""
    needs: str = ""
    """What must be written before it can run."""
    sets: Sequence[str] = ()
    """Test sets to score it on."""


def read_queue(path: Path = QUEUE) -> list[Entry]:
    """All runs of the queue, in its order. UserError names an entry that is wrong."""
    entries: list[Entry] = []
    try:
        studies = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if wrong := differs(studies, {str: _STUDY}):
        raise DataError(f"{path}: {wrong}")
    for study, of_study in studies.items():
        if wrong := differs(of_study.get("sets", []), [str], "sets"):
            raise DataError(f"{path}: {study}: {wrong}")
        for change in of_study["changes"]:
            entries += _entries(f"{path}: {study}", study, of_study, change)
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: {min(twice)} is there twice: names of runs must differ")
    return entries


def _entries(where: str, study: str, of_study: dict[str, Any], change: dict[str, Any]) -> Iterator[Entry]:
    if missing := _CHANGE - change.keys():
        raise UserError(f"{where} has a change without {min(missing)}: {change}")
    where = f"{where}.{change['name']}"
    for key, shape in (("settings", [str]), ("variants", {str: [str]})):
        if wrong := differs(change.get(key, type(shape)()), shape, key):
            raise DataError(f"{where}: {wrong}")
    if unknown := change.keys() - _CHANGE - {"settings", "variants", "needs"}:
        raise UserError(f"{where} has {min(unknown)}, which no change has")
    if ("needs" in change) == ("variants" in change):
        raise UserError(f"{where} must have either the variants that it runs with, or what it needs")
    if "needs" in change:
        yield Entry(f"{study}.{change['name']}", change["purpose"], [], change["needs"])
    for variant, own in change.get("variants", {}).items():
        if variant not in of_study["variants"]:
            raise UserError(f"{where} names {variant}; the variants of {study} are {', '.join(of_study['variants'])}")
        settings = [*of_study["variants"][variant], *of_study["settings"], *change.get("settings", []), *own]
        yield Entry(f"{study}.{change['name']}.{variant}", change["purpose"], settings, sets=of_study.get("sets", ()))


@dataclass(frozen=True)
class Site:
    """The place of the runs: folders, code and hardware."""

    runs: Path
    """Folder of the runs themselves."""
    records: Path
    """Folder of their records."""
    commit: str
    hardware: str
    jobs: int
    """Runs that share a GPU."""
    places: Sequence[str] = ()
    """Settings of the command line for all runs."""
    texts: Path = Path()
    """Folder of test sets."""
    gpus: Sequence[str] = ("",)
    """The GPUs, as CUDA_VISIBLE_DEVICES names them; one empty name if there are none."""

    def record(self, entry: Entry) -> Path:
        """The record of a run, which is there when the run is done."""
        return self.records / f"{entry.name}.json"

    def state(self, entry: Entry) -> str:
        """The state of a run, as `list` prints it. UserError if its record has other settings."""
        record = self.record(entry)
        if record.is_file():
            try:
                made = read_json(record, {"settings": [str]})
            except (OSError, ValueError) as error:
                raise DataError(f"{record} is no record of a run: {error}") from error
            overridden = made.get("overridden", [])
            if [setting for setting in made["settings"] if not setting.startswith(_GONE)] != entry.settings:
                raise UserError(
                    f"{record} was made with other settings than results/queue.yaml has now: name the change anew"
                )
            return f"done with {' '.join(overridden)}" if overridden else "done"
        if entry.needs:
            return f"needs {entry.needs}"
        status = RunDirectory(self.runs / entry.name).status()
        return f"{status['state']} at step {status['step']:,}" if status else "waiting"


class Children:
    """The programs that run now. After `stop`, no other one starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = set[subprocess.Popen[bytes]]()
        self.stopped = False

    def run(self, command: Sequence[str], gpu: str, seconds: float, output: Any, errors: Any) -> tuple[int, bytes]:
        """The status of a program, which gets SIGTERM after this time, and what it writes to `output` if it is PIPE.

        It sees this GPU alone; with an empty name, what this program sees.
        """
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None
        with self._lock:
            if self.stopped:
                return -signal.SIGTERM, b""
            process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
            self._running.add(process)
        found = b""
        try:
            if output == subprocess.PIPE:
                found, _ = process.communicate(timeout=seconds)
            else:
                process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            found = process.communicate()[0] or b"" if output == subprocess.PIPE else b""
            process.wait()
        finally:
            self._running.discard(process)
        return process.returncode, found

    def stop(self) -> None:
        """Send SIGTERM to those that run."""
        with self._lock:
            self.stopped = True
            for process in [*self._running]:
                process.terminate()


def sit(entry: Entry, site: Site, deadline: float, gpu: str = "", children: Children | None = None) -> str:
    """Train a run and score it until the deadline (of time.monotonic), and write its record if both have ended.

    Returns how it went, in one line. Translations stay in the run's folder of reports.
    """
    started, children = time.monotonic(), children or Children()
    if started >= deadline:
        return "not started: no time is left"
    if children.stopped:
        return "not started"
    command = [sys.executable, "-m", "nmt.cli", "train", *entry.settings, *site.places]
    command += [f"run.name={entry.name}", f"run.directory={site.runs}"]
    site.runs.mkdir(parents=True, exist_ok=True)
    log = site.runs / f"{entry.name}.log"
    with log.open("ab") as stream:
        code, _ = children.run(command, gpu, deadline - started, stream, stream)
    run = RunDirectory(site.runs / entry.name)
    if code not in (0, *_STOPPED):
        return f"failed with status {code}: {log} ends with {_last_line(log)!r}"
    if not run.status():
        return "stopped before its first step"
    sitting = {"commit": site.commit, "hardware": site.hardware, "jobs": site.jobs}
    sitting["seconds"] = round(time.monotonic() - started, 1)
    sittings = _add_sitting(run.path / "sittings.json", sitting)
    if code in _STOPPED:
        return f"stopped at step {run.status()['step']:,}: run it again to resume it"
    scored: dict[str, Any] = {}
    if entry.sets:
        try:
            scored = {"scores": scores(run, entry.sets, site.texts, log, deadline - time.monotonic(), gpu, children)}
        except InterruptedError:
            return "trained, but not scored: run it again to score it"
        except (subprocess.CalledProcessError, ValueError, KeyError) as error:
            return f"failed to score it ({error}): {log} ends with {_last_line(log)!r}"
    record = {"name": entry.name, "purpose": entry.purpose, "settings": entry.settings, **figures(run), **scored}
    if overridden := [setting for setting in site.places if not _PLACES.match(setting)]:
        record["overridden"] = overridden
    record |= {"sittings": sittings, "config": flatten(run.config().to_dict())}
    site.records.mkdir(parents=True, exist_ok=True)
    write_atomically(site.record(entry), (json.dumps(record, indent=1) + "\n").encode())
    return f"dev perplexity {record['dev_perplexity']:.3f} after {sitting['seconds']:.0f} seconds"


def scores(
    run: RunDirectory,
    sets: Sequence[str],
    texts: Path,
    log: Path,
    seconds: float,
    gpu: str,
    children: Children,
) -> dict[str, Any]:
    """BLEU, chrF2 and perplexity of a run on each of these sets, and the signatures of the scores.

    InterruptedError after `seconds`, or if `children` are stopped. CalledProcessError if `nmt evaluate` fails, which
    writes why to `log`.
    """
    sides = run.config().corpus.sides
    command, names = [sys.executable, "-m", "nmt.cli", "evaluate", str(run.path), "--json"], {"test": "test"}
    for name in sets:
        source, reference = (texts / f"{name}.{language}.gz" for language in sides)
        command += ["--split", "test"] if name == "test" else ["--source", str(source), "--reference", str(reference)]
        names[name if name == "test" else source.name] = name
    with log.open("ab") as stream:
        code, output = children.run(command, gpu, max(seconds, 0.0), subprocess.PIPE, stream)
    if code in _STOPPED:
        raise InterruptedError
    if code:
        raise subprocess.CalledProcessError(code, command)
    found: dict[str, Any] = {name: {} for name in sets}
    signatures = {}
    for each in json.loads(output):
        if each["name"] in ("BLEU", "chrF2", "perplexity"):
            found[names[each["set"]]][each["name"]] = round(each["score"], 3)
            signatures[each["name"]] = each.get("signature", "")
    return {**found, "signatures": {name: text for name, text in signatures.items() if text}}


def figures(run: RunDirectory) -> dict[str, Any]:
    """The figures of a finished run.

    Perplexities have the step as their key; one of training is the mean since the line before. Figures of gates are
    means over the last four lines of training.
    """
    training, dev = read_lines(run.metrics_path, TrainLine), read_lines(run.metrics_path, DevLine)
    vocabulary = json.loads(run.corpus_path.read_text(encoding="utf-8"))["vocabulary_size"]
    cost = model_cost(run.config().model, vocabulary)
    last = training[-4:]
    gates = {
        layer: {name: statistics.fmean(line.gates[layer][name] for line in last) for name in last[-1].gates[layer]}
        for layer in last[-1].gates
    }
    return {
        "steps": training[-1].step,
        "dev_perplexity": dev[-1].perplexity,
        "best_dev_perplexity": min(line.perplexity for line in dev),
        "dev_word_perplexity": dev[-1].word_perplexity,
        "dev_perplexities": {line.step: line.perplexity for line in dev},
        "train_perplexities": {line.step: line.perplexity for line in training},
        "parameters": cost.num_parameters,
        "ops_per_timestep": cost.ops_per_timestep,
        "tokens_per_second": statistics.median(line.tokens_per_second for line in training),
        "gpu_memory_gb": training[-1].gpu_memory_gb,
        "gates": gates,
    }


def _add_sitting(path: Path, sitting: dict[str, Any]) -> list[dict[str, Any]]:
    """All sittings of a run so far, which are kept in its folder."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    write_atomically(path, json.dumps([*before, sitting]).encode())
    return [*before, sitting]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def run_queue(entries: list[Entry], site: Site, minutes: float, discard: bool) -> bool:
    """Train the entries in their order for this many minutes. Returns whether none failed.

    If a signal ends the program, those that run are stopped and saved first.
    """
    deadline, children = time.monotonic() + 60 * minutes, Children()
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in [*site.gpus] * site.jobs:
        free.put(gpu)

    def one(entry: Entry) -> bool:
        gpu = free.get()
        try:
            outcome = sit(entry, site, deadline, gpu, children)
        except (UserError, OSError) as error:
            outcome = f"failed: {error}"
        finally:
            free.put(gpu)
        # One write, since several runs may end at once.
        print(f"{entry.name}: {outcome}\n", end="", flush=True)
        if discard and site.record(entry).is_file():
            shutil.rmtree(site.runs / entry.name / "checkpoints")
        return not outcome.startswith("failed")

    with ThreadPoolExecutor(site.jobs * len(site.gpus)) as pool, ended_by_signals():
        try:
            return all(list(pool.map(one, entries)))
        except KeyboardInterrupt:
            children.stop()
            raise


def commit_here() -> str:
    """The commit of this code. UserError if it is in no git repository."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"{ROOT} is no git repository: give the commit of its code with --commit")
    changed = subprocess.run([*git, "status", "--porcelain", "nmt", "conf"], capture_output=True, check=False).stdout
    return found.stdout.strip() + (" with changes" if changed else "")


def hardware_here() -> str:
    """The device that a run takes, and the version of PyTorch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores; torch {torch.__version__}"


def gpus_here() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; one empty name if there are none."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (visible or [str(number) for number in range(torch.cuda.device_count())]) or [""]


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "run"))
    parser.add_argument("what", nargs="*", help="names of runs (default: all that are ready); settings key=value")
    parser.add_argument("--minutes", type=float, default=2e4, help="stop and save what still runs after this time")
    parser.add_argument("--jobs", type=int, default=1, help="runs that share each GPU (default 1)")
    parser.add_argument("--commit", help="of this code, where it is no git repository")
    parser.add_argument("--discard", action="store_true", help="remove the checkpoints of runs that have their record")
    parser.add_argument("--queue", type=Path, default=QUEUE)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of results (default results/runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs/queue"), help="folder of the runs")
    parser.add_argument("--texts", type=Path, default=Path("data/news"), help="folder of test sets")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one")
    try:
        ended = act(options)
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"run_queue: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(exit_status(error))
    sys.exit(0 if ended else 1)


def act(options: argparse.Namespace) -> bool:
    """Do what the command line asks for. Returns whether no run failed.

    UserError for a mistake in it or in the queue.
    """
    places = [each for each in options.what if re.match(r"[a-z_.]+=", each)]
    entries = read_queue(options.queue)
    names = list[str]()
    for each in options.what:
        if each not in places:
            meant = [entry.name for entry in entries if f"{entry.name}.".startswith(f"{each}.")]
            if not meant:
                raise UserError(f"{each} is not in {options.queue}; run_queue.py list prints the runs that are")
            names += meant
    listing = options.action == "list"
    commit = "" if listing else options.commit or commit_here()
    site = Site(
        options.runs, options.records, commit, hardware_here(), options.jobs, places, options.texts, gpus_here()
    )
    ready, sound = [], True
    for entry in entries:
        try:
            state = site.state(entry)
        except UserError as error:
            print(f"run_queue: {error}", file=sys.stderr)
            sound = False
            continue
        over = entry.needs or site.record(entry).is_file()
        if listing or (over and entry.name in names):
            print(f"{entry.name:<34} {state:<28} {entry.purpose}")
        elif not over and (not names or entry.name in names):
            ready.append(entry)
    # Else this would only be found after hours of training.
    sets = {name for entry in ready for name in entry.sets if name != "test"}
    if lacking := sorted(name for name in sets if len([*options.texts.glob(f"{name}.*.gz")]) < 2):
        raise DataError(f"{options.texts} lacks {lacking[0]}.LANGUAGE.gz: give the folder of test sets with --texts")
    if names:
        ready.sort(key=lambda entry: names.index(entry.name))
    return run_queue(ready, site, options.minutes, options.discard) and sound


if __name__ == "__main__":
    main()
