"""scripts/bench/prepare.py: the text that it makes, what it sees of processes, and a preparation that it measures."""

import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from scripts.bench import prepare as bench

NUM_TEXT, NUM_PAIRS = 6000, 20_000


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made-up text, one file per language."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=generator.randrange(1, 9))) for _ in range(3000)]
    paths = {}
    for language in bench.LANGUAGES:
        paths[language] = folder / f"own.{language}.gz"
        with gzip.open(paths[language], "wt", encoding="utf-8") as stream:
            for _ in range(NUM_TEXT):
                stream.write(" ".join(generator.choices(words, k=generator.randrange(5, 10))) + "\n")
    return paths


def made(text: dict[str, Path], folder: Path, processes: int, pairs: int = NUM_PAIRS) -> Path:
    files = ["--source", str(text["en"]), "--target", str(text["fr"])]
    bench.main(["make", "--pairs", str(pairs), *files, "--to", str(folder), "--processes", str(processes)])
    return folder


def pairs_in(folder: Path) -> list[tuple[str, str]]:
    sides = [list(bench.lines_of(sorted(folder.glob(f"train-*.{language}.gz")))) for language in bench.LANGUAGES]
    return list(zip(*sides, strict=True))


def test_all_pairs_differ_and_are_the_same_each_time(text, tmp_path, capsys):
    once, again = made(text, tmp_path / "once", 1), made(text, tmp_path / "again", 2)
    pairs = pairs_in(once)
    assert len(pairs) == len(set(pairs)) == NUM_PAIRS
    sources, targets = zip(*pairs, strict=True)
    assert len(set(sources)) == len(set(targets)) == NUM_PAIRS
    assert {path.name: path.read_bytes() for path in once.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }
    real = list(zip(*(bench.lines_of([text[language]]) for language in bench.LANGUAGES), strict=True))
    assert pairs[:NUM_TEXT] == real  # number 0
    assert f"corpus.root={once}" in capsys.readouterr().out


def test_new_words_keep_coming(text, tmp_path):
    words: set[str] = set()
    counts = []
    for path in sorted(made(text, tmp_path, 1).glob("train-*.en.gz")):
        words.update(word for line in bench.lines_of([path]) for word in line.split())
        counts.append(len(words))
    assert all(later > 1.05 * before for before, later in pairwise(counts))


@pytest.mark.parametrize("variant", [0, 1, 6, 35, 36, 50, 1000])
def test_a_variant_changes_the_end_of_one_word(variant):
    words, found = ["so", "it", "is"], bench.varied("so it is", variant).split()
    changed = [(word, other) for word, other in zip(words, found, strict=True) if word != other]
    assert len(changed) == bool(variant)
    assert all(other.startswith(word) for word, other in changed)


def test_many_variants_differ():
    assert len({bench.varied("so it is", variant) for variant in range(500)}) == 500


@pytest.mark.parametrize("pairs", [1, 5999, 6000, 6001, 20_000, 100_000])
def test_shares_have_all_pairs(pairs):
    shares = bench.shares(pairs, NUM_TEXT)
    assert sum(sum(share.pairs) for share in shares) == pairs
    variants = [variant for share in shares for variant in share.variants]
    assert len(variants) == len(set(variants)) == -(-pairs // NUM_TEXT)


def test_files_that_differ_in_their_lines_are_refused(text, tmp_path):
    more = [str(text["fr"])] * 2
    with pytest.raises(SystemExit, match="6,000 and 12,000 lines"):
        bench.main(
            ["make", "--pairs", "5", "--source", str(text["en"]), "--target", *more, "--to", str(tmp_path / "x")]
        )


@pytest.mark.parametrize("wrong", ["--unknown", "training.max_steps=3", "x"])
def test_an_unknown_argument_is_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["run", str(tmp_path / "none"), "corpus.name=other", wrong])
    assert "usage:" in capsys.readouterr().err


def test_memory_is_that_of_a_process_and_all_below_it():
    size = 100 << 20
    inner = f"a = bytearray(b'a') * {size}; print(flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        alone, everything = [process.pid], bench.tree(process.pid)
        assert len(everything) == 2
        for exact in (False, True):
            assert bench.memory_of(everything, exact) - bench.memory_of(alone, exact) > size
        assert bench.memory_of(everything, exact=True) < bench.memory_of(everything, exact=False) < 3 * size
        process.communicate(b"\n")
    assert bench.memory_of(everything, exact=False) == 0


def test_a_peak_counts_for_the_stage_in_which_it_was(tmp_path):
    peaks = bench.Peaks(0, tmp_path)
    peaks.rss = [(0.5, 7 << 20), (2.0, 5 << 20), (4.5, 9 << 20), (6.5, 3 << 20), (9.5, 1 << 20)]
    assert peaks.by_stage({"read": 5.0, "encode": 1.0, "finish": 3.0}, 10.0) == {"read": 9, "encode": 3, "finish": 1}


@pytest.mark.slow
def test_a_preparation_is_measured(text, tmp_path, capsys):
    folder = made(text, tmp_path / "made", 1)
    arguments = ["run", str(folder), "--processes", "2", "--record", str(tmp_path / "record.json")]
    bench.main([*arguments, "corpus.subwords.vocab_size=200"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["pairs"] == NUM_PAIRS
    assert 0 < record["kept"] <= NUM_PAIRS
    stages = record["seconds"]
    assert {"read", "vocabulary", "encode", "all"} <= stages.keys()
    assert sum(stages.values()) - stages["all"] <= stages["all"] + 0.1 * len(stages)
    assert 0.1 < record["cpu_seconds"] < 100 * stages["all"]
    assert 50 < record["peak_pss_mib"] < 10_000
    assert 50 < max(record["peak_rss_mib_by_stage"].values()) == record["peak_rss_mib"] < 10_000
    assert record["peak_disk_over_shards"] >= record["disk_over_shards"] >= 1
    assert record["shards_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "made-prepared").glob("bench-*/train.*")
    )
    assert record["sentencepiece_output"] in bench.OUTPUTS
    assert record["sentencepiece_seconds"] > 0
    assert record["command"].endswith("corpus.subwords.vocab_size=200")
    assert f"{NUM_PAIRS:,} pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made-prepared exists: remove it"):
        bench.main(arguments)
