"""The cost of preparing a large corpus: seconds, memory of all processes, disk, and the ratio to SentencePiece alone.

    python -m scripts.bench.prepare make --pairs 36000000 --source a.en.gz --target a.fr.gz --to big
    python -m scripts.bench.prepare run big --processes 2

`make` varies real text: variant v of a pair has two letters more at the end of a word on each side. So all pairs
differ, and new words keep coming, as in more real text. `run` prepares it with `nmt prepare` and prints a table. Its
baseline is SentencePiece's own C++ encoder on as many threads, on a sample of the same text, in the same call.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

VOWELS, CONSONANTS = "aeiouy", "nrstlk"
FILES = 8
SAMPLE = 100_000  # sentences of each side that SentencePiece encodes
HELD_OUT = 2_000
LANGUAGES = ("en", "fr")


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
    for language, paths in zip(LANGUAGES, (sources, targets), strict=True):
        texts = list(lines_of(paths))
        with gzip.open(folder / f"train-{share.number}.{language}.gz", "wt", 1, "utf-8", newline="\n") as output:
            for variant, count in zip(share.variants, share.pairs, strict=True):
                for start in range(0, count, 10_000):
                    some = texts[start : min(start + 10_000, count)]
                    output.write("".join(f"{varied(text, variant)}\n" for text in some))


def make(options: argparse.Namespace) -> None:
    folder = Path(options.to)
    folder.mkdir(parents=True, exist_ok=True)
    sources, targets = ([Path(name) for name in names] for names in (options.source, options.target))
    num_text = sum(1 for _ in lines_of(sources))
    work = shares(options.pairs, num_text)
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(write_share, work, *([each] * len(work) for each in (sources, targets, folder))))
    for language, paths in zip(LANGUAGES, (sources, targets), strict=True):
        # Text to score with needs not be new here.
        held_out = list(islice(lines_of(paths), HELD_OUT))
        (folder / f"dev.{language}").write_text("".join(f"{line}\n" for line in held_out), encoding="utf-8")
    print(f"{options.pairs:,} pairs in {folder}, {size_of(folder) / 1e9:.2f} GB")


def settings_of(folder: Path, output: Path) -> list[str]:
    """Settings of `nmt prepare` for a folder that `make` wrote."""
    source, target = LANGUAGES
    names = {each: sorted(path.name for path in folder.glob(f"train-*.{each}.gz")) for each in LANGUAGES}
    return [
        "corpus=files",
        "corpus.name=bench",
        f"corpus.root={folder}",
        f"corpus.directory={output}",
        f"corpus.source_language={source}",
        f"corpus.target_language={target}",
        f"corpus.train.source=[{','.join(names[source])}]",
        f"corpus.train.target=[{','.join(names[target])}]",
        f"corpus.dev.source=[dev.{source}]",
        f"corpus.dev.target=[dev.{target}]",
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


def memory_of(pids: Sequence[int]) -> tuple[int, int]:
    """(sum of resident memory, sum in which shared pages count once) in bytes."""
    sums = {"Rss": 0, "Pss": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        for name in sums:
            sums[name] += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    return sums["Rss"], sums["Pss"]


def sentencepiece_seconds(folder: Path, vocabulary: Path, threads: int) -> float:
    """Seconds per sentence of SentencePiece's own encoder, from lists of texts to lists of ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    sides = [sorted(folder.glob(f"train-*.{language}.gz"))[-1:] for language in LANGUAGES]
    texts = list(chain.from_iterable(islice(lines_of(paths), SAMPLE) for paths in sides))
    processor.encode(texts[:1000], out_type=int, num_threads=threads)
    began = time.perf_counter()
    for start in range(0, len(texts), 50_000):
        processor.encode(texts[start : start + 50_000], out_type=int, num_threads=threads)
    return (time.perf_counter() - began) / len(texts)


def run(options: argparse.Namespace) -> None:
    folder, output = Path(options.folder), Path(options.output or f"{options.folder}-prepared")
    command = [sys.executable, "-m", "nmt", "prepare", "--processes", str(options.processes)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, *settings_of(folder, output), *options.more], stdout=subprocess.PIPE, text=True
    )
    peak_rss = peak_pss = peak_disk = 0
    looked = 0.0
    while process.poll() is None:
        rss, pss = memory_of(tree(process.pid))
        peak_rss, peak_pss = max(peak_rss, rss), max(peak_pss, pss)
        if time.perf_counter() - looked > 5:
            looked = time.perf_counter()
            peak_disk = max(peak_disk, size_of(output) if output.exists() else 0)
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    assert process.stdout
    printed = process.stdout.read().split()
    if process.returncode:
        sys.exit(f"nmt prepare ended with status {process.returncode}")
    prepared = Path(printed[-1])
    report = json.loads((prepared / "report" / "prepare.json").read_text())
    shards = sum(path.stat().st_size for path in prepared.glob("train.*"))
    alone = sentencepiece_seconds(folder, prepared / "subwords.model", options.processes) * 2 * report["pairs_read"]
    record = {
        "pairs": report["pairs_read"],
        "kept": report["pairs_kept"],
        "processes": options.processes,
        "seconds": {**report["seconds"], "all": round(seconds, 1)},
        "sentencepiece_seconds": round(alone, 1),
        "encoding_speed": round(alone / report["seconds"]["encode"], 2),
        "whole_over_sentencepiece": round(seconds / alone, 2),
        "peak_rss_mib": round(peak_rss / 2**20),
        "peak_pss_mib": round(peak_pss / 2**20),
        "peak_disk_over_shards": round(max(peak_disk, size_of(output)) / shards, 2),
        "disk_over_shards": round(size_of(output) / shards, 2),
        "command": "python -m scripts.bench.prepare run",
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "commit": commit(),
    }
    print(table(record))
    if options.record:
        Path(options.record).write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def table(record: dict[str, Any]) -> str:
    """The figures of a run, one per line."""
    pairs, seconds = record["pairs"], record["seconds"]
    lines = [f"{pairs:,} pairs, {record['kept']:,} kept, {record['processes']} processes"]
    lines += [f"  {stage:12} {each:8.1f} s  {pairs / max(each, 0.1):12,.0f} pairs/s" for stage, each in seconds.items()]
    memory = f"{record['peak_rss_mib']:8,} MiB in all processes, {record['peak_pss_mib']:,} MiB with shared pages once"
    disk = f"{record['peak_disk_over_shards']:8.2f} times the arrays, {record['disk_over_shards']:.2f} at the end"
    lines += [
        f"  SentencePiece alone would encode for {record['sentencepiece_seconds']:,.1f} s",
        f"  encoding     {record['encoding_speed']:8.2f} times as fast as SentencePiece alone",
        f"  whole        {record['whole_over_sentencepiece']:8.2f} times the seconds of SentencePiece alone",
        f"  memory       {memory} (the most)",
        f"  disk         {disk} (the most)",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="make a large corpus from real text")
    making.add_argument("--pairs", type=int, required=True)
    making.add_argument("--source", nargs="+", required=True, help="files of the source side, .gz")
    making.add_argument("--target", nargs="+", required=True)
    making.add_argument("--to", required=True, help="folder to write")
    making.add_argument("--processes", type=int, default=os.cpu_count())
    making.set_defaults(run=make)
    running = commands.add_parser("run", help="prepare it and measure")
    running.add_argument("folder")
    running.add_argument("--processes", type=int, default=os.cpu_count())
    running.add_argument("--output", help="where to prepare (default: FOLDER-prepared)")
    running.add_argument("--record", help="a JSON file for the figures")
    running.add_argument("more", nargs="*", help="more settings, such as corpus.punctuation=moses")
    running.set_defaults(run=run)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
