"""The mirror of wmt/wmt14 made from local text: its layout, and that `nmt prepare` reads it."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nmt.cli import main as nmt
from nmt.compose import compose_config
from nmt.corpus.sources import read_pairs
from tests.scripts import load_script

WORDS = {"en": "a small dog sees the old house and a car", "de": "ein kleiner Hund sieht das alte Haus und Auto"}


@pytest.fixture(scope="module")
def mirror_main() -> Callable[[list[str]], int]:
    module = load_script("scripts/make_wmt14_mirror.py")
    main: Callable[[list[str]], int] = module.main
    return main


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """train of 60 pairs (one language gzipped), more of 20, dev and test of 5."""
    for name, count in {"train": 60, "more": 20, "dev": 5, "test": 5}.items():
        for language, words in WORDS.items():
            rotated = (words.split() * 2, len(words.split()))
            lines = [f"{name} {i} " + " ".join(rotated[0][i % rotated[1] :][:6]) for i in range(count)]
            content = "".join(f"{line}\n" for line in lines).encode()
            if (name, language) == ("train", "de"):
                (tmp_path / "train.de.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / f"{name}.{language}").write_bytes(content)
    return tmp_path


def arguments(texts: Path, *more: str) -> list[str]:
    given = [str(texts / "mirror")]
    for option, names in {
        "--train": ("train.en", "train.de.gz"),
        "--dev": ("dev.en", "dev.de"),
        "--test": ("test.en", "test.de"),
    }.items():
        given += [option, *(str(texts / name) for name in names)]
    return [*given, *more]


def test_layout(texts: Path, mirror_main: Callable[[list[str]], int]) -> None:
    """File names, the struct column in the order of the subset's name, several training files, the card."""
    second = ["--train", str(texts / "more.en"), str(texts / "more.de")]
    assert mirror_main(arguments(texts, *second)) == 0
    folder = texts / "mirror" / "de-en"
    rows = {split: f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}
    assert sorted(path.name for path in folder.iterdir()) == sorted(rows.values())
    table = pq.read_table(folder / rows["train"])
    assert table.num_rows == 80
    assert str(table.schema.field("translation").type) == "struct<de: string, en: string>"
    last = table.column("translation")[79].as_py()
    assert last["en"].startswith("more 19 ")
    assert last["de"].startswith("more 19 ")
    card = (texts / "mirror" / "README.md").read_text()
    assert "- config_name: de-en\n" in card
    assert "  - split: validation\n    path: de-en/validation-*\n" in card


def test_max_pairs_and_second_subset(texts: Path, mirror_main: Callable[[list[str]], int]) -> None:
    """--max-pairs cuts the training text alone; a second subset joins the first one's card."""
    assert mirror_main(arguments(texts)) == 0
    assert mirror_main(arguments(texts, "--languages", "en", "fr", "--subset", "fr-en", "--max-pairs", "7")) == 0
    card = (texts / "mirror" / "README.md").read_text()
    assert card.count("config_name") == 2
    source = f"corpus.source={texts / 'mirror'}"
    french = compose_config(["corpus=wmt14_en_fr", source]).corpus
    assert [len(list(read_pairs(french, split))) for split in ("train", "dev", "test")] == [7, 5, 5]
    german = compose_config(["corpus=wmt14_en_de", source]).corpus
    pairs = list(read_pairs(german, "train"))
    assert len(pairs) == 60
    assert pairs[1].source == "train 1 small dog sees the old house"
    assert pairs[1].target == "train 1 kleiner Hund sieht das alte Haus"


def test_prepare_reads_the_mirror(
    texts: Path, mirror_main: Callable[[list[str]], int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert mirror_main(arguments(texts)) == 0
    capfd.readouterr()
    settings = [f"corpus.source={texts / 'mirror'}", f"corpus.directory={texts / 'prepared'}"]
    status = nmt(["prepare", "corpus=wmt14_en_de", *settings, "corpus.subwords.vocab_size=96"])
    out, err = capfd.readouterr()
    assert (status, Path(out.strip()).parent) == (0, texts / "prepared"), err
    assert "60 pairs read, 60 kept" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "{texts}/dev.en", "{texts}/train.de.gz"], "dev.en"),
        (["--train", "{texts}/none.en", "{texts}/dev.de"], "none.en"),
        (["--subset", "fr-en"], "--subset fr-en does not name the languages en and de"),
    ],
)
def test_mistakes(
    texts: Path,
    mirror_main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    """Files that do not pair, are missing, or a subset of other languages: one line and status 3."""
    assert mirror_main(arguments(texts, *(each.format(texts=texts) for each in more))) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(texts.glob("mirror/**/*.tmp"))
