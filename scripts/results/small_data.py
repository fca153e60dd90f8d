"""Run the studies of docs/results/small-data.md by the nmt command: other domains, many languages, growth, students.

  python -m scripts.results.small_data list transfer growth
  python -m scripts.results.small_data run transfer --places multi30k=DIR europarl=DIR news=DIR --jobs 8 --minutes 9
  python -m scripts.results.small_data_tables                      # results/small_data.json from the records

A study is a list of jobs. A job runs a few nmt commands, the last of which train or make the run of its name, and then
translates test sets with that run. Its record, results/small_data/JOB.json, has the commands, the scores, commit,
hardware and seconds. A job with a record is not run again, nor is one whose time is up before it starts. Jobs run side
by side where --jobs allows; each waits for the jobs that it needs.

Commands name the folders of the text in braces: {multi30k} has the files of github.com/multi30k/dataset, {europarl}
those that scripts/make_europarl.py makes, and {news} newstest2014.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from nmt.config import Config
from nmt.config.reading import put_setting, read_value
from nmt.cost.operations import model_cost
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.tokenizers import bleu_tokenizer
from nmt.files import write_atomically
from nmt.metrics.record import DevLine, TrainLine, read_lines
from nmt.run import RunDirectory
from scripts.results.run_queue import commit_here, hardware_here

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "small_data"
SEEDS = (1, 2, 3)
SIZES = (1000, 5000, 29000)


@dataclass(frozen=True)
class Job:
    """Commands that end in a run of the job's name, and the test sets that it translates."""

    name: str
    commands: list[list[str]]
    """Arguments of nmt. {runs} is the folder of all runs, {name} the job's name."""
    sets: tuple[str, ...] = ()
    """Keys of SETS, or languages such as multi30k:en-de."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must have ended."""
    beams: tuple[int, ...] = (4,)
    alone: bool = False
    """Whether no other job may run beside it, because its speed counts."""
    keeps: bool = False
    """Whether other jobs need the run, whose checkpoints are otherwise removed after scoring."""


SETS = {
    "europarl": ("{europarl}/test.en.gz", "{europarl}/test.fr.gz", "en-fr"),
    "news": ("{news}/newstest2014.en.gz", "{news}/newstest2014.fr.gz", "en-fr"),
}
"""Test sets by name: sources, references, direction."""


def text_of_set(name: str) -> tuple[str, str, str]:
    """Return (file of sources, file of references, direction) of a set such as europarl or multi30k:en-de."""
    if name in SETS:
        return SETS[name]
    corpus, _, direction = name.partition(":")
    source, target = direction.split("-")
    stem = f"{{{corpus}}}/test_2016_flickr"
    return f"{stem}.{source}.gz", f"{stem}.{target}.gz", direction


def train(*settings: str) -> list[str]:
    """Return the command that trains the job's run."""
    return ["train", "run.directory={runs}", "run.name={name}", *settings]


EUROPARL = ["experiment=europarl_en_fr_moe_32", "corpus.root={europarl}", "corpus.max_pairs=300000"]
MEDIUM = ["model=medium", "model.dropout=0.1"]
SMALL_MOE = ["model.moe.num_experts=8", "model.moe.k=2"]
QUIET = ["training.validation_sentences=0", "training.log_every=50"]


def captions(source: str, target: str, *more: str, experiment: str = "multi30k_en_de_moe_4") -> list[str]:
    """Return the settings of a run on captions in two languages."""
    files = [
        f"corpus.{split}.{side}=[{stem}.{language}.gz]"
        for split, stem in (("train", "train"), ("dev", "val"), ("test", "test_2016_flickr"))
        for side, language in (("source", source), ("target", target))
    ]
    languages = [f"corpus.source_language={source}", f"corpus.target_language={target}"]
    corpus = ["corpus=multi30k_en_de", "corpus.root={multi30k}", *languages, *files]
    return [f"experiment={experiment}", *corpus, *QUIET, *more]


def steps(count: int, validations: int = 10) -> list[str]:
    """Return the settings for this many steps, with equally many between validations."""
    every = count // validations
    return [f"training.max_steps={count}", f"training.validate_every={every}", f"training.checkpoint_every={count}"]


def transfer() -> Iterator[Job]:
    """A general model and a few pairs of another domain: from Europarl to captions, English to French."""
    general = train(*EUROPARL, *MEDIUM, *SMALL_MOE, *QUIET, *steps(2000, 4))
    yield Job("transfer.general", [general], ("europarl", "multi30k:en-fr"), keeps=True)
    for name, more in (("grown", []), ("grown_redrawn", ["--redraw", "0.5"])):
        grow = ["experts", "{runs}/transfer.general", "--grow", "32", *more, "-o", "{runs}/{name}"]
        yield Job(f"transfer.{name}", [grow], needs=("transfer.general",), keeps=True)
    for size, tuned, scratch, vocabulary in ((1000, 150, 500, 2000), (5000, 300, 1000, 4000), (29000, 900, 2000, 8000)):
        for seed in SEEDS:
            text = ["en", "fr", f"corpus.max_pairs={size}", f"training.seed={seed}"]
            starts = {"added": "grown", "redrawn": "grown_redrawn"}
            general = ["run.start_from={runs}/transfer.general"]
            mixture = "corpus.mixture={'{runs}/transfer.general': 1.0}"
            ways = {
                "scratch": [f"corpus.subwords.vocab_size={vocabulary}", *steps(scratch)],
                "tuned": [*general, *steps(tuned)],
                "mixed": [*general, *steps(2 * tuned), mixture],
                "frozen": [*general, *steps(tuned), "training.freeze=[experts]"],
            }
            for way, start in starts.items():
                grown = ["run.start_from={runs}/transfer." + start]
                ways[way] = [*grown, *steps(tuned), "training.freeze=['experts[::4]']"]
            for way, own in ways.items():
                if way == "redrawn" and seed > 1:
                    continue
                needs = () if way == "scratch" else (f"transfer.{starts.get(way, 'general')}",)
                sets = ("multi30k:en-fr",) if way == "scratch" else ("multi30k:en-fr", "europarl")
                experiment = "multi30k_en_de_moe_4" if way == "scratch" else "fine_tune"
                settings = captions(*text, *own, experiment=experiment)
                yield Job(f"transfer.{way}.{size}.{seed}", [train(*settings)], sets, needs)


LANGUAGES = ("en", "de", "fr", "cs")
SINGLES = ("en-de", "de-en", "en-fr", "cs-en")


def languages() -> Iterator[Job]:
    """Captions in four languages: one model of all twelve directions, and models of one direction each."""
    everything = tuple(f"multi30k:{a}-{b}" for a in LANGUAGES for b in LANGUAGES if a != b)
    for seed in SEEDS:
        settings = ["experiment=multi30k_12_directions", "corpus.root={multi30k}", *QUIET, f"training.seed={seed}"]
        yield Job(f"languages.all.{seed}", [train(*settings)], everything)
        for direction in SINGLES:
            own = captions(*direction.split("-"), f"training.seed={seed}", *steps(1500))
            yield Job(f"languages.{direction}.{seed}", [train(*own)], (f"multi30k:{direction}",))


GROWTH_STEPS, GROWN_AT = 800, 200
GROWTH_TOKENS = 30_900
"""Tokens of both sides in a step of these runs, on average."""
NETWORKS = {
    "none": ["model.moe.num_experts=0", "model.moe.k=2"],
    "moe_8": ["model.moe.num_experts=8", "model.moe.k=2"],
    "moe_32": ["model.moe.num_experts=32", "model.moe.k=2"],
}
GROWN = [
    *("model.moe.num_experts=32", "model.moe.gating=hierarchical", "model.moe.branching=8", "model.moe.primary_k=2"),
    *("model.moe.k=1", "model.moe.straight_through=true"),
]
# How many times as long a step of 32 experts takes, measured by the jobs growth.speed.*.
SLOWER = {"none": 1.12}


def growth() -> Iterator[Job]:
    """Networks that grow at a quarter of their training, against those that are trained on."""
    settings = [*EUROPARL, *MEDIUM, *QUIET, "training.schedule=wsd", "training.warmup_steps=100"]
    settings += ["training.batch_tokens=16384", "training.keep_checkpoints=20"]
    every = [f"training.{each}_every=100" for each in ("validate", "checkpoint")]
    for network, own in {**NETWORKS, "grown": GROWN}.items():
        yield Job(f"growth.speed.{network}", [train(*settings, *own, *steps(150, 1))], alone=True)
    for seed in SEEDS:
        of_seed = [*settings, *every, f"training.seed={seed}"]
        for network, own in NETWORKS.items():
            trained = train(*of_seed, *own, f"training.max_steps={GROWTH_STEPS}")
            yield Job(f"growth.{network}.{seed}", [trained], keeps=network != "moe_32")
        for network, slower in SLOWER.items():
            longer = round(GROWN_AT + (GROWTH_STEPS - GROWN_AT) * slower)
            trained = train(*of_seed, *NETWORKS[network], f"training.max_steps={longer}")
            yield Job(f"growth.{network}_longer.{seed}", [trained])
        for start, way, more in (
            ("none", "grown", []),
            ("moe_8", "grown", []),
            ("moe_8", "redrawn", ["--redraw", "0.5"]),
            ("moe_8", "unlearned", []),
        ):
            grow = ["experts", f"{{runs}}/growth.{start}.{seed}", "--grow", "32", *more]
            grow += ["-o", "{runs}/{name}", f"decoding.checkpoint={GROWN_AT}"]
            change = [["change", "{runs}/{name}", "model.moe.straight_through", "false"]] if way == "unlearned" else []
            name = f"growth.{start}_{way}.{seed}"
            yield Job(name, [grow, *change, ["train", "{runs}/{name}"]], needs=(f"growth.{start}.{seed}",))


def students() -> Iterator[Job]:
    """A large teacher, a small student of it, and the same student without a teacher."""
    teacher = train(*EUROPARL, *QUIET, "model.dropout=0.0", *steps(1000, 4))
    sets = ("europarl", "news")
    yield Job("students.teacher", [teacher], sets, beams=(1, 4), keeps=True)
    small = [*EUROPARL, *MEDIUM, *QUIET, "model.moe.num_experts=0", *steps(1500, 3)]
    for seed in (1, 2):
        own = [*small, f"training.seed={seed}"]
        yield Job(f"students.alone.{seed}", [train(*own)], sets, beams=(1, 4), keeps=seed == 1)
        # The teacher's vocabulary, and so its prepared text: both learn it from the same pairs.
        taught = [*own, "run.start_from={runs}/students.teacher", "corpus.subwords.vocabulary=learn"]
        yield Job(f"students.started.{seed}", [train(*taught)], sets, ("students.teacher",), (1, 4))
        # The second seed uses the text that the first one made.
        needs = ("students.teacher", *(("students.taught.1",) if seed > 1 else ()))
        distill = ["distill", "{runs}/students.teacher", *train(*taught)[1:]]
        yield Job(f"students.taught.{seed}", [distill], sets, needs, (1, 4), keeps=seed == 1)


STUDIES = {study.__name__: study for study in (students, growth, transfer, languages)}


@dataclass(frozen=True)
class Site:
    """The place of the runs: folders, code and hardware."""

    places: Mapping[str, str]
    """Values of the names in braces: runs, multi30k, europarl."""
    records: Path
    commit: str
    hardware: str
    jobs: int
    deadline: float
    """Of time.monotonic: no command runs longer."""
    settings: Sequence[str] = ()
    """Settings added to every training, for a trial on a small machine."""
    lines: int = 0
    """Lines of each test set that are translated, for a trial; 0: all."""

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    def filled(self, text: str, name: str) -> str:
        """Return a text with this machine's places and the job's name in place of {..}."""
        for key, value in {**self.places, "name": name}.items():
            text = text.replace(f"{{{key}}}", value)
        return text

    def record_of(self, job: Job) -> Path:
        """Return the path of a job's record."""
        return self.records / f"{job.name}.json"

    def run_of(self, job: Job) -> Path:
        """Return the folder of a job's run."""
        return Path(self.places["runs"]) / job.name


def work(job: Job, site: Site) -> str:
    """Run a job's commands and score its run, write its record, and return how it went in one line."""
    began = time.monotonic()
    log = site.run_of(job).with_name(f"{job.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    own = [
        "-m",
        "scripts.results.small_data",
        "score",
        str(site.run_of(job)),
        "--beams",
        *map(str, job.beams),
        "--lines",
        str(site.lines),
    ]
    own += [
        "--sets",
        *(",".join(site.filled(each, job.name) for each in (name, *text_of_set(name))) for name in job.sets),
    ]
    commands = [[site.filled(word, job.name) for word in command] for command in job.commands]
    commands = [[*each, *site.settings] if each[0] in ("train", "distill") else each for each in commands]
    commands = [["-m", "scripts.results.small_data" if each[0] == "change" else "nmt.cli", *each] for each in commands]
    took = []
    for command in [*commands, *([own] if job.sets else [])]:
        started = time.monotonic()
        with log.open("ab") as stream:
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    stdout=stream,
                    stderr=stream,
                    check=False,
                    timeout=max(site.deadline - started, 0.0),
                )
            except subprocess.TimeoutExpired:
                return "out of time"
        if done.returncode:
            return f"failed with status {done.returncode}: {log} ends with {_last_line(log)!r}"
        took.append(round(time.monotonic() - started, 1))
    scores = json.loads(_last_line(log)) if job.sets else {}
    record = {"name": job.name, "commands": [["nmt", *command] for command in job.commands], "scores": scores}
    record |= {"commit": site.commit, "hardware": site.hardware, "jobs": site.jobs, "seconds": took}
    record |= figures(RunDirectory(site.run_of(job)))
    site.records.mkdir(parents=True, exist_ok=True)
    write_atomically(site.record_of(job), (json.dumps(record, indent=1) + "\n").encode())
    if not job.keeps:
        shutil.rmtree(site.run_of(job) / "checkpoints")
    shown = ", ".join(f"{name} {each['4']['BLEU']:.2f}" for name, each in scores.items() if "4" in each)
    return f"{shown or 'done'} after {time.monotonic() - began:.0f} s"


def figures(run: RunDirectory) -> dict[str, Any]:
    """Return the figures of a run's training: perplexities by step, speed, size."""
    cost = model_cost(run.config().model, run.corpus_info()["vocabulary_size"])
    found: dict[str, Any] = {"parameters": cost.num_parameters, "ops_per_timestep": cost.ops_per_timestep}
    if not run.metrics_path.exists():
        return found
    training, dev = read_lines(run.metrics_path, TrainLine), read_lines(run.metrics_path, DevLine)
    speeds = [line.tokens_per_second for line in training]
    found |= {"dev_perplexities": {line.step: round(line.perplexity, 4) for line in dev}}
    found |= {"dev_perplexity": min(line.perplexity for line in dev), "tokens_per_second": statistics.median(speeds)}
    return found


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _left(jobs: Sequence[Job], site: Site) -> list[Job]:
    """Return the jobs without a record, and those whose run they need but which is not on this machine."""
    left = [job for job in jobs if not site.record_of(job).is_file()]
    while True:
        needed = {need for job in left for need in job.needs if not (Path(site.places["runs"]) / need).is_dir()}
        more = [job for job in jobs if job.name in needed and job not in left]
        if not more:
            return [job for job in jobs if job in left]
        left += more


class Scheduler:
    """Threads that run jobs side by side, in the order of their list, each after those that it needs."""

    def __init__(self, jobs: Sequence[Job], site: Site) -> None:
        self.site = site
        self.waiting = _left(jobs, site)
        self.running: list[Job] = []
        self.failed: set[str] = set()
        self.changed = threading.Condition()

    def run(self) -> bool:
        """Run all jobs, and return whether none failed."""
        with ThreadPoolExecutor(self.site.jobs) as pool:
            for each in [pool.submit(self._serve) for _ in range(self.site.jobs)]:
                each.result()
        return not self.failed

    def _serve(self) -> None:
        while job := self._next():
            outcome = "not started: no time is left" if self.site.is_late else work(job, self.site)
            print(f"{time.strftime('%H:%M:%S')} {job.name}: {outcome}", flush=True)
            with self.changed:
                self.running.remove(job)
                if not self.site.record_of(job).is_file():
                    self.failed.add(job.name)
                self.changed.notify_all()

    def _next(self) -> Job | None:
        """Return the next job, marked as running, as soon as one may run; None if none is left."""
        with self.changed:
            while self.waiting:
                for job in self.waiting:
                    if lost := self.failed.intersection(job.needs):
                        print(f"{job.name}: not started: there is no {min(lost)}", flush=True)
                        self.failed.add(job.name)
                        self.waiting.remove(job)
                        break
                    if self._may_run(job):
                        self.waiting.remove(job)
                        self.running.append(job)
                        return job
                    if job.alone:  # its turn comes when nothing else runs
                        self.changed.wait()
                        break
                else:
                    self.changed.wait()
            return None

    def _may_run(self, job: Job) -> bool:
        unfinished = {each.name for each in (*self.waiting, *self.running)}
        if unfinished.intersection(job.needs):
            return False
        return not (self.running and (job.alone or any(each.alone for each in self.running)))


def score(run: str, sets: Sequence[str], beams: Sequence[int], most: int = 0) -> dict[str, Any]:
    """Return BLEU, chrF2 and lines per second of a run on test sets, by set and beam."""
    import nmt
    from nmt.textfile import open_text

    model = nmt.load(run)
    found: dict[str, Any] = {}
    for text in sets:
        name, *paths, direction = text.split(",")
        sides = []
        for path in paths:
            with open_text(Path(path), "--sets") as lines:
                sides.append(list(islice(lines, most or None)))
        tokenizer = bleu_tokenizer("auto", direction.split("-")[1])
        found[name] = {}
        for beam in beams:
            began = time.monotonic()
            hypotheses = [each.text for each in model.translate(sides[0], beam_size=beam, direction=direction)]
            seconds = time.monotonic() - began
            scores = corpus_scores(hypotheses, [sides[1]], tokenizer.name)
            found[name][str(beam)] = {each.name: round(each.value, 3) for each in scores}
            found[name][str(beam)] |= {"signatures": [each.signature for each in scores]}
            found[name][str(beam)]["lines_per_second"] = round(len(hypotheses) / seconds, 1)
    return found


def change(run: str, key: str, text: str) -> None:
    """Change a setting of a run that no run may change: to study what it is worth."""
    path = RunDirectory(Path(run)).config_path
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    put_setting(Config, settings, key, read_value(Config, key, text))
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("list", "the jobs and whether they have a record"), ("run", "run what has no record")):
        each = actions.add_parser(name, help=text)
        each.add_argument("studies", nargs="+", help=f"{', '.join(STUDIES)}, or jobs")
        each.add_argument(
            "--records", type=Path, default=RECORDS, help="folder of results (default results/small_data)"
        )
    each.add_argument(
        "--places", nargs="+", default=[], help="NAME=FOLDER for each name in braces; runs=runs/small_data"
    )
    each.add_argument("--minutes", type=float, default=1e6, help="start nothing after this time, and stop what runs")
    each.add_argument("--jobs", type=int, default=1, help="jobs side by side (default 1)")
    each.add_argument("--commit", help="of this code, where it is no git repository")
    each.add_argument("--settings", nargs="+", default=[], help="KEY=VALUE added to every training, for a trial")
    each.add_argument("--lines", type=int, default=0, help="lines of each test set, for a trial (default all)")
    own = actions.add_parser("score", help="translate test sets with a run (for `run`)")
    own.add_argument("of")
    own.add_argument("--sets", nargs="+", required=True)
    own.add_argument("--beams", nargs="+", type=int, default=[4])
    own.add_argument("--lines", type=int, default=0)
    other = actions.add_parser("change", help="change a setting of a run (for `run`)")
    for word in ("of", "key", "value"):
        other.add_argument(word)
    options = parser.parse_args()
    match options.action:
        case "score":
            print(json.dumps(score(options.of, options.sets, options.beams, options.lines)))
            return
        case "change":
            change(options.of, options.key, options.value)
            return
    jobs = [job for name, study in STUDIES.items() for job in study() if {name, job.name} & {*options.studies}]
    # What others need comes first, then the first seed of everything; what runs alone comes before all.
    jobs.sort(key=lambda job: (not job.alone, int(found[1]) if (found := re.search(r"\.(\d)$", job.name)) else 0))
    if options.action == "list":
        for job in jobs:
            print(f"{job.name:<34} {'done' if (options.records / f'{job.name}.json').is_file() else 'waiting'}")
        return
    places = {"runs": "runs/small_data", **dict(place.split("=", 1) for place in options.places)}
    deadline = time.monotonic() + 60 * options.minutes
    commit = options.commit or commit_here()
    site = Site(
        places, options.records, commit, hardware_here(), options.jobs, deadline, options.settings, options.lines
    )
    sys.exit(0 if Scheduler(jobs, site).run() else 1)


if __name__ == "__main__":
    main()
