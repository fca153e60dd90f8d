"""A tiny run of three directions between three languages."""

from pathlib import Path

import numpy as np

from tests.toy import ENGLISH, GERMAN, train

FRENCH = ["le", "petit", "chien", "court", "sur", "un", "vert", "pré", "ce", "matin", "et", "regarde"]
WORDS = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH}
DIRECTIONS = ("en-de", "de-en", "en-fr")
SPLITS = ("train", "dev", "test")


def write_texts(folder: Path, count: int = 60) -> None:
    """Word for word translations in all languages. Files `bt` are more training text, with a tag."""
    generator = np.random.default_rng(3)
    for split, size in zip(SPLITS, (count, 6, 9), strict=True):
        picks = [generator.integers(0, len(GERMAN), generator.integers(2, 8)) for _ in range(size)]
        for language, words in WORDS.items():
            text = "".join(" ".join(words[pick] for pick in sentence) + "\n" for sentence in picks)
            (folder / f"{split}.{language}").write_text(text)
            if split == "dev":
                (folder / f"bt.{language}").write_text(text)


def settings_of_many() -> list[str]:
    """Settings that make of the toy's corpus one of `DIRECTIONS`."""
    no_files = [f"corpus.{split}.{side}=[]" for split in SPLITS for side in ("source", "target")]
    files = {"train": ("train", "bt"), "dev": ("dev",), "test": ("test",)}
    named = []
    for split, names in files.items():
        of_language = (f"{code}: [{', '.join(f'{name}.{code}' for name in names)}]" for code in WORDS)
        named.append(f"corpus.{split}.texts={{{', '.join(of_language)}}}")
    directions = f"corpus.directions=[{', '.join(DIRECTIONS)}]"
    return [
        "corpus.name=many",
        "corpus.subwords.vocab_size=120",
        *no_files,
        *named,
        'corpus.train.tags=["",bt]',
        directions,
    ]


def train_many(folder: Path, steps: int = 4) -> Path:
    """Train the run `many` in `folder` on text that is written there."""
    write_texts(folder)
    return train(folder, "many", steps, *settings_of_many())


def lines_in(run: Path, direction: str, split: str = "test") -> tuple[list[str], list[str]]:
    """Sources and targets of one direction of a run's own text."""
    names = ("source", "target", "direction")
    columns = [(run / "text" / f"{split}.{name}").read_text().splitlines() for name in names]
    kept = [pair for *pair, each in zip(*columns, strict=True) if each == direction]
    return [source for source, _ in kept], [target for _, target in kept]
