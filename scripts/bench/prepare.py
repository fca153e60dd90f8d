"""The cost of preparing a large corpus: seconds, memory of all processes, disk, and the ratio to SentencePiece alone.

    python -m scripts.bench.prepare make --pairs 36000000 --source a.en.gz --target a.fr.gz --to big
    python -m scripts.bench.prepare run big --processes 2
    python -m scripts.bench.prepare run big --record figures.json corpus.punctuation=moses

`make` varies real text: in variant v of a pair, one word on each side has another ending. So all pairs differ, and new
words keep coming, as in more real text. Of a million pairs of Europarl, 36 million make 1.8 million different English
words and 2.4 million French ones. Heaps' law forecasts 1.3 and 1.6 million, from the growth within the real text.

`run` prepares the text with `nmt prepare` and prints a table. Its baseline is SentencePiece's own C++ encoder on as
many threads, on a sample of the same text, in the same call: the fastest of its outputs, per subword.
"""

import argparse
import gzip
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

VOWELS, CONSONANTS = "aeiouy", "nrstlk"
FILES = 8
SAMPLE = 100_000  # sentences of each side that SentencePiece encodes
AT_ONCE = 50_000  # sentences per call of SentencePiece
OUTPUTS = ("int", "numpy", "serialized_proto")
HELD_OUT = 2_000
LANGUAGES = ("en", "fr")
EVERY = 0.2  # seconds between two looks at the resident memory
ROOT = Path(__file__).parents[2]


def varied(text: str, variant: int) -> str:
    """Variant number `variant` of a sentence; number 0 is the sentence itself. All variants differ."""
    if not variant:
        return text
    words = text.split(" ")
    kind = variant % len(CONSONANTS)
    place = (7 * kind + len(words) // 2) % len(words)
    count, rest = divmod(variant // len(CONSONANTS), len(VOWELS))
    words[place] += VOWELS[rest] + CONSONANTS[kind] + "x" * count
    return " ".join(words)


def lines_of(paths: Sequence[Path]) -> Iterator[str]:
    """The lines of some .gz files, one after the other."""
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.rstrip("\n")


class Share(NamedTuple):
    """The variants that one file has."""

    number: int
    variants: list[int]
    pairs: list[int]
    """How many pairs of each variant."""


def shares(num_pairs: int, num_text: int) -> list[Share]:
    """Divide the pairs among the files: file n has variants n, n + FILES, ..."""
    found = [Share(number, [], []) for number in range(FILES)]
    for variant in range(-(-num_pairs // num_text)):
        share = found[variant % FILES]
        share.variants.append(variant)
        share.pairs.append(min(num_text, num_pairs - variant * num_text))
    return [share for share in found if share.variants]


def write_share(share: Share, sources: Sequence[Path], targets: Sequence[Path], folder: Path) -> None:
    """Write the file of a share on each side. The same share gives the same bytes."""
    for language, paths in zip(LANGUAGES, (sources, targets), strict=True):
        texts = list(lines_of(paths))
        path = folder / f"train-{share.number}.{language}.gz"
        with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as output:
            for variant, count in zip(share.variants, share.pairs, strict=True):
                for start in range(0, count, 10_000):
                    some = texts[start : min(start + 10_000, count)]
                    output.write("".join(f"{varied(text, variant)}\n" for text in some).encode())


def make(options: argparse.Namespace) -> None:
    """Write a corpus of the given size into a folder, and print the settings to prepare it with."""
    folder = Path(options.to)
    folder.mkdir(parents=True, exist_ok=True)
    sources, targets = ([Path(name) for name in names] for names in (options.source, options.target))
    num_text, num_targets = (sum(1 for _ in lines_of(paths)) for paths in (sources, targets))
    if num_text != num_targets or not num_text:
        sys.exit(f"the files have {num_text:,} and {num_targets:,} lines: give files that translate each other")
    work = shares(options.pairs, num_text)
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(write_share, work, *([each] * len(work) for each in (sources, targets, folder))))
    for language, paths in zip(LANGUAGES, (sources, targets), strict=True):
        # Text to score with needs not be new here.
        lines = lines_of(paths)
        for split in ("dev", "test"):
            held_out = "".join(f"{line}\n" for line in islice(lines, HELD_OUT))
            (folder / f"{split}.{language}").write_text(held_out, encoding="utf-8")
    print(f"{options.pairs:,} pairs in {folder}, {size_of(folder) / 1e9:.2f} GB. Prepare them with:")
    print(shlex.join(["nmt", "prepare", *settings_of(folder, folder.with_name(f"{folder.name}-prepared"))]))


def settings_of(folder: Path, output: Path) -> list[str]:
    """Settings of `nmt prepare` for a folder that `make` wrote."""
    source, target = LANGUAGES
    names = {each: sorted(path.name for path in folder.glob(f"train-*.{each}.gz")) for each in LANGUAGES}
    splits = [split for split in ("dev", "test") if all((folder / f"{split}.{each}").is_file() for each in LANGUAGES)]
    return [
        "corpus=files",
        "corpus.name=bench",
        f"corpus.root={folder}",
        f"corpus.directory={output}",
        f"corpus.source_language={source}",
        f"corpus.target_language={target}",
        f"corpus.train.source=[{','.join(names[source])}]",
        f"corpus.train.target=[{','.join(names[target])}]",
        *(
            f"corpus.{split}.{side}=[{split}.{language}]"
            for split in splits
            for side, language in (("source", source), ("target", target))
        ),
        "corpus.filters.identical=true",
        "corpus.filters.duplicates=true",
        "corpus.filters.max_words=100",
        "corpus.filters.max_length_ratio=2.5",
        "corpus.subwords.kind=bpe",
        "corpus.subwords.vocab_size=32000",
    ]


def size_of(folder: Path) -> int:
    """Bytes on disk below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def tree(root: int) -> list[int]:
    """Ids of a process and all below it."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += parents.get(found[-1], [])
    return found


def memory_of(pids: Sequence[int], exact: bool) -> int:
    """Sum of the processes' resident memory in bytes; `exact`: a page that several of them share counts once."""
    total = 0
    for pid in pids:
        try:
            if exact:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            else:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


class Peaks:
    """What a process and all below it take: looked at again and again while it runs."""

    def __init__(self, pid: int, output: Path) -> None:
        self._pid, self._output = pid, output
        self._began = self._looked = time.perf_counter()
        self._pids = [pid]
        self._slowest = 0.0
        self.rss: list[tuple[float, int]] = []
        """(seconds since the beginning, bytes) of all looks."""
        self.pss = self.disk = 0

    def look(self) -> None:
        """Look at the resident memory, and once per second at the rest, which takes longer."""
        now = time.perf_counter()
        if now - self._looked > max(1.0, 50 * self._slowest):
            self._pids = tree(self._pid)
            self.pss = max(self.pss, memory_of(self._pids, exact=True))
            self.disk = max(self.disk, size_of(self._output))
            self._looked = time.perf_counter()
            # The looks must not slow down what they measure.
            self._slowest = max(self._slowest, self._looked - now)
        self.rss.append((now - self._began, memory_of(self._pids, exact=False)))

    def by_stage(self, seconds: dict[str, float], all_seconds: float) -> dict[str, int]:
        """The most resident memory in MiB, by stage. The time before the first stage counts as part of it."""
        begun = all_seconds - sum(seconds.values())
        ends = list(accumulate(seconds.values(), initial=begun))[1:]
        found = dict.fromkeys(seconds, 0)
        for moment, size in self.rss:
            stage = list(seconds)[min(bisect(ends, moment), len(ends) - 1)]
            found[stage] = max(found[stage], round(size / 2**20))
        return found


class Alone(NamedTuple):
    """SentencePiece's own encoder on a sample."""

    output: str
    """The fastest of its outputs."""
    seconds_per_subword: float


def sentencepiece_alone(folder: Path, vocabulary: Path, threads: int) -> Alone:
    """Time SentencePiece's encoder on lists of texts, with each of its outputs, twice; the best time counts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    sides = [sorted(folder.glob(f"train-*.{language}.gz"))[-1:] for language in LANGUAGES]
    texts = list(chain.from_iterable(islice(lines_of(paths), SAMPLE) for paths in sides))
    num_subwords = sum(map(len, processor.encode(texts, out_type=int, num_threads=threads)))
    times = dict.fromkeys(OUTPUTS, float("inf"))
    for output in 2 * OUTPUTS:
        began = time.perf_counter()
        for start in range(0, len(texts), AT_ONCE):
            kind = int if output == "int" else output
            processor.encode(texts[start : start + AT_ONCE], out_type=kind, num_threads=threads)
        times[output] = min(times[output], time.perf_counter() - began)
    fastest = min(OUTPUTS, key=times.__getitem__)
    return Alone(fastest, times[fastest] / num_subwords)


def run(options: argparse.Namespace) -> None:
    """Prepare a folder of `make` in a process of its own, watch it, and print and record the figures."""
    folder, output = Path(options.folder), Path(options.output or f"{options.folder}-prepared")
    if output.exists() and not options.reuse:
        sys.exit(f"{output} exists: remove it, or give --reuse to measure what is done with what is there")
    command = [sys.executable, "-m", "nmt", "prepare", "--processes", str(options.processes)]
    spent = _cpu_seconds()
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, *settings_of(folder, output), *options.more],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    peaks = Peaks(process.pid, output)
    while process.poll() is None:
        peaks.look()
        time.sleep(EVERY)
    seconds = time.perf_counter() - began
    spent = _cpu_seconds() - spent
    assert process.stdout
    printed = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"nmt prepare ended with status {process.returncode}")
    prepared = Path(printed[-1])
    report = json.loads((prepared / "report" / "prepare.json").read_text(encoding="utf-8"))
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    shards = sum(path.stat().st_size for path in prepared.glob("train.*"))
    alone = sentencepiece_alone(folder, prepared / "subwords.model", options.processes)
    alone_seconds = alone.seconds_per_subword * (manifest["source_pieces"] + manifest["target_pieces"])
    end_disk = size_of(output)
    record = {
        "pairs": report["pairs_read"],
        "kept": report["pairs_kept"],
        "processes": options.processes,
        "seconds": {**report["seconds"], "all": round(seconds, 1)},
        "cpu_seconds": round(spent, 1),
        "sentencepiece_seconds": round(alone_seconds, 1),
        "sentencepiece_output": alone.output,
        "encoding_speed": round(alone_seconds / max(report["seconds"]["encode"], 0.1), 2),
        "whole_over_sentencepiece": round(seconds / alone_seconds, 2),
        "peak_rss_mib": round(max((size for _, size in peaks.rss), default=0) / 2**20),
        "peak_rss_mib_by_stage": peaks.by_stage(report["seconds"], seconds),
        "peak_pss_mib": round(peaks.pss / 2**20),
        "peak_disk_over_shards": round(max(peaks.disk, end_disk) / shards, 2),
        "disk_over_shards": round(end_disk / shards, 2),
        "shards_bytes": shards,
        "command": shlex.join(["python", "-m", "scripts.bench.prepare", *options.arguments]),
        "hardware": hardware(),
        "commit": commit(),
    }
    print(table(record))
    if options.record:
        Path(options.record).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cpu_seconds() -> float:
    """Seconds of computing of all processes that have ended below this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def hardware() -> str:
    """The processor of this machine, and how many cores of it are here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else 'processor unknown'}"


def commit() -> str:
    """The commit of this code; empty in no git repository."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    state = subprocess.run([*git, "status", "--porcelain", "nmt", "conf"], capture_output=True, check=False)
    return found.stdout.strip() + (" with changes" if state.stdout else "")


def table(record: dict[str, Any]) -> str:
    """The figures of a run, one per line."""
    pairs, seconds = record["pairs"], record["seconds"]
    lines = [f"{pairs:,} pairs, {record['kept']:,} kept, {record['processes']} processes; {record['hardware']}"]
    for stage, each in seconds.items():
        peak = record["peak_rss_mib_by_stage"].get(stage, record["peak_rss_mib"])
        lines.append(f"  {stage:12} {each:8.1f} s  {pairs / max(each, 0.1):12,.0f} pairs/s  {peak:7,} MiB at most")
    peak, pss = record["peak_rss_mib"], record["peak_pss_mib"]
    lines += [
        f"  SentencePiece alone would encode for {record['sentencepiece_seconds']:,.1f} s "
        f"(its fastest output: {record['sentencepiece_output']})",
        f"  encoding     {record['encoding_speed']:8.2f} times as fast as SentencePiece alone",
        f"  whole        {record['whole_over_sentencepiece']:8.2f} times the seconds of SentencePiece alone",
        f"  processors   {record['cpu_seconds']:8,.1f} s of computing",
        f"  memory       {peak:8,} MiB at most in all processes; {pss:,} MiB if shared pages count once",
        f"  disk         {record['peak_disk_over_shards']:8.2f} times the arrays at most, "
        f"{record['disk_over_shards']:.2f} at the end",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="make a large corpus from real text")
    making.add_argument("--pairs", type=int, required=True)
    making.add_argument("--source", nargs="+", required=True, help="files of the source side, .gz")
    making.add_argument("--target", nargs="+", required=True)
    making.add_argument("--to", required=True, help="folder to write")
    making.add_argument("--processes", type=int, default=os.cpu_count())
    making.set_defaults(run=make)
    running = commands.add_parser(
        "run", help="prepare it and measure", epilog="More settings follow, such as corpus.punctuation=moses."
    )
    running.add_argument("folder")
    running.add_argument("--processes", type=int, default=os.cpu_count())
    running.add_argument("--output", help="where to prepare (default: FOLDER-prepared)")
    running.add_argument("--record", help="a JSON file for the figures")
    running.add_argument("--reuse", action="store_true", help="allow a folder that exists")
    running.set_defaults(run=run)
    # As positional arguments, settings could not follow options.
    options, more = parser.parse_known_args(arguments)
    if wrong := [each for each in more if options.run is make or not each.startswith("corpus.")]:
        parser.error(f"unknown: {wrong[0]}")
    options.more = more
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
