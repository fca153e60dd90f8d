"""Texts of other domains that are scored at every validation, so that what training forgets is a number."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.config import Direction
from nmt.data.prepared import find_prepared
from nmt.errors import DataError, UserError
from nmt.run import RunDirectory

_WORSE = 1.1
"""A perplexity this many times its lowest, or the one that was last warned of, is worth a warning."""


class WatchedText(NamedTuple):
    """The dev text of another run, or of a prepared corpus."""

    name: str
    """Name in curves and messages."""
    sources: list[str]
    targets: list[str]
    directions: list[Direction]
    """One per pair."""


def watched_texts(references: Sequence[str], taken: Collection[str]) -> list[WatchedText]:
    """Return the texts of `training.watch`.

    Their names are those of the runs or corpora. If a name is `taken` or there twice, the reference takes its place.
    UserError for a reference without a dev text, or that is given twice. Errors in the folders are those of
    `find_prepared` and `RunDirectory`.
    """
    for reference in references:
        if references.count(reference) > 1:
            raise UserError(f"training.watch has {reference} more than once: leave the others out")
    texts = [_read(reference) for reference in references]
    names = [*taken, *(text.name for text in texts)]
    return [
        text._replace(name=reference) if names.count(text.name) > 1 else text
        for reference, text in zip(references, texts, strict=True)
    ]


def _read(reference: str) -> WatchedText:
    if any((folder / "config.yaml").is_file() for folder in (Path(reference), Path("runs") / reference)):
        run = RunDirectory.existing(reference)
        name, only = run.path.resolve().name, run.config().corpus.direction
        (sources, targets, _), directions = run.text("dev"), run.directions("dev")
    else:
        try:
            prepared = find_prepared(reference)
        except DataError as error:
            raise DataError(f"training.watch: {error}") from error
        corpus = prepared.manifest["corpus"]
        name, only = corpus["name"], Direction(corpus["source_language"], corpus["target_language"])
        (sources, targets, _), directions = prepared.text("dev"), prepared.directions("dev")
    if not sources:
        raise UserError(f"training.watch: {reference} has no dev text: name the run or prepared corpus that has it")
    return WatchedText(name, sources, targets, directions or [only] * len(sources))


class Lowest(NamedTuple):
    """The lowest perplexity of a watched text so far."""

    perplexity: float
    step: int
    warned: float = 0.0
    """The perplexity that was last warned of since then; 0: none was."""


def forgotten(lowest: dict[str, Lowest], name: str, perplexity: float, step: int) -> str | None:
    """Record the perplexity of a watched text at a step. Return a warning if the text is being forgotten.

    That is: it is more than 10 % above its lowest, and above what was warned of before.
    """
    best = lowest.get(name)
    if best is None or perplexity < best.perplexity:
        lowest[name] = Lowest(perplexity, step)
        return None
    if not perplexity > _WORSE * (best.warned or best.perplexity):
        return None
    lowest[name] = best._replace(warned=perplexity)
    above = 100 * (perplexity / best.perplexity - 1)
    return (
        f"warning: dev perplexity of {name} is {perplexity:.2f}, {above:.0f} % above its best ({best.perplexity:.2f} "
        f"at step {best.step:,}): training forgets it; mix in more of its text (corpus.mixture), or lower "
        "training.learning_rate"
    )
