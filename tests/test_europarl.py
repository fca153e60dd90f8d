"""Europarl as the experiments name it, cut from the public files: what is left out, held out, and twice the same."""

import gzip
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from nmt.compose import compose_config
from nmt.corpus.sources import source_files
from tests.scripts import load_script

NAMES = ["train-0", "train-1", "train-2", "train-3", "dev", "test"]
ORDINARY = [(f"sentence number {i} is here", f"la phrase numéro {i} est ici") for i in range(200)]
ODD = [
    ("", "rien"),
    ("   ", "rien"),
    ("something", ""),
    ("w " * 101, "m " * 101),
    ("one", "un deux trois"),
    ("one two three", "un"),
]
# The same English with several French sentences: never on both sides of a cut.
REPEATED = [("I declare the session resumed .", f"je déclare {i} reprise la session .") for i in range(40)]


@pytest.fixture(scope="module")
def europarl() -> ModuleType:
    return load_script("scripts/make_europarl.py")


def write(folder: Path, pairs: list[tuple[str, str]]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"europarl-v7.fr-en.{language}" for language in ("en", "fr")]
    for side, path in enumerate(paths):
        path.write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return [str(path) for path in paths]


def cut(europarl: ModuleType, folder: Path, pairs: list[tuple[str, str]], *options: str) -> dict[str, list]:
    """The pairs of each file."""
    given = write(folder / "in", pairs)
    assert europarl.main([*given, str(folder / "out"), "--held-out", "20", *options]) == 0
    found = {}
    for name in NAMES:
        sides = [gzip.decompress((folder / "out" / f"{name}.{each}.gz").read_bytes()) for each in ("en", "fr")]
        found[name] = list(zip(*(side.decode().split("\n")[:-1] for side in sides), strict=True))
    assert not list((folder / "out").glob("*.part"))
    return found


def test_every_ordinary_pair_goes_to_one_place_and_odd_ones_to_none(europarl: ModuleType, tmp_path: Path) -> None:
    found = cut(europarl, tmp_path, [*ODD, *ORDINARY, *ORDINARY[:50], *ODD])
    assert Counter(pair for pairs in found.values() for pair in pairs) == Counter(ORDINARY)
    assert (len(found["dev"]), len(found["test"])) == (20, 20)
    assert {len(found[name]) for name in NAMES[:4]} == {40}
    for pairs in found.values():
        assert pairs == sorted(pairs, key=ORDINARY.index)


def test_no_sentence_is_both_trained_on_and_held_out(europarl: ModuleType, tmp_path: Path) -> None:
    found = cut(europarl, tmp_path, [*ORDINARY, *REPEATED])
    held_out = found["dev"] + found["test"]
    trained = [pair for name in NAMES[:4] for pair in found[name]]
    assert any(pair in REPEATED for pair in held_out)
    for side in (0, 1):
        assert not {pair[side] for pair in trained} & {pair[side] for pair in held_out}


def test_the_same_text_gives_the_same_bytes_and_the_rest_of_it_the_same_places(
    europarl: ModuleType, tmp_path: Path
) -> None:
    one = cut(europarl, tmp_path / "one", ORDINARY, "--train", "100")
    two = cut(europarl, tmp_path / "two", ORDINARY, "--train", "100")
    for name in NAMES:
        for language in ("en", "fr"):
            file = Path("out") / f"{name}.{language}.gz"
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sum(len(one[name]) for name in NAMES[:4]) == 100
    turned = cut(europarl, tmp_path / "three", ORDINARY[::-1], "--train", "100")
    assert {name: set(pairs) for name, pairs in turned.items()} == {name: set(pairs) for name, pairs in two.items()}


def test_they_are_the_files_that_the_corpus_names(europarl: ModuleType, tmp_path: Path) -> None:
    cut(europarl, tmp_path, ORDINARY)
    corpus = compose_config(["corpus=europarl_en_fr", f"corpus.root={tmp_path}/out"]).corpus
    assert sorted(path.name for path in source_files(corpus)) == sorted(p.name for p in (tmp_path / "out").iterdir())


def test_sides_of_different_length_are_refused_in_a_line(
    europarl: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    english, french = write(tmp_path, ORDINARY)
    Path(french).write_text("un\n")
    assert europarl.main([english, french, str(tmp_path / "out")]) == 3
    assert capfd.readouterr().err.startswith("make_europarl: ")
    assert not (tmp_path / "out").exists()
