"""`nmt prepare --scores`: what every rule measures in each pair, so that thresholds can be chosen from one pass."""

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from nmt.config import CorpusConfig
from nmt.corpus.pairs import ReadReport, Rows
from nmt.corpus.rules import Candidate, HeldOutTexts, Rules
from nmt.corpus.sources import units
from nmt.data.kinds import Kind
from nmt.preparation.blocks import blocks, num_rows_of
from nmt.preparation.cleaning import normalised
from nmt.preparation.filtered import Tick
from nmt.preparation.workers import shared_out

_TO_BLANK = str.maketrans("\t\n", "  ")
_AT = (0.01, 0.05, 0.5, 0.95, 0.99)
_MOST_SAMPLED = 1_000_000  # values per rule from which shares are estimated


class _Numbered(NamedTuple):
    name: str
    first_row: int
    rows: Rows


class _Scorer:
    """Scores the pairs of a block; call it with one."""

    def __init__(self, corpus: CorpusConfig, held_out: HeldOutTexts) -> None:
        self._corpus, self._rules, self._kinds = corpus, Rules(corpus, held_out), Kind.of(corpus)

    def __call__(self, block: _Numbered) -> tuple[bytes, dict[str, np.ndarray]]:
        lines: list[str] = []
        values: dict[str, list[float]] = {}
        for kind in self._kinds:
            if kind.tag != block.rows.tag:
                continue
            direction = kind.direction or self._corpus.sides
            sides = normalised(self._corpus, block.rows, direction)
            scores: Sequence[float | None] = block.rows.scores or [None] * num_rows_of(block.rows)
            for row, (source, target, score) in enumerate(zip(*sides, scores, strict=True), start=block.first_row + 1):
                if kind.direction and not (source.strip() and target.strip()):
                    continue
                found = self._rules.scores(Candidate(source, target, direction, score))
                for name, value in found.items():
                    values.setdefault(name, []).append(value)
                figures = (f"{value:.6g}" for value in found.values())
                texts = (text.translate(_TO_BLANK) for text in (source, target))
                lines.append("\t".join((block.name, str(row), str(direction), *figures, *texts)))
        text = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        return text, {name: np.array(each, dtype=np.float32) for name, each in values.items()}


def write_scores(
    corpus: CorpusConfig, held_out: HeldOutTexts, stream: BinaryIO, processes: int, tick: Tick
) -> Iterator[str]:
    """Write a line per training pair to `stream`: its file, row, direction, what each rule measures, its two texts.

    The first line has the names, and TABs separate fields. Then yield a line per rule for the user: how its values are
    distributed.
    """
    names = Rules(corpus, held_out).names
    stream.write("\t".join(("file", "row", "direction", *names, "source", "target")).encode() + b"\n")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    num_pairs = 0
    for text, values in shared_out(_Scorer, (corpus, held_out), _numbered(corpus), processes):
        stream.write(text)
        size = len(next(iter(values.values()), ()))
        num_pairs += size
        for name, each in values.items():
            if num_pairs <= _MOST_SAMPLED:
                found[name].append(each)
        tick(f"{num_pairs:,} pairs scored", num_pairs / corpus.max_pairs if corpus.max_pairs else None)
    yield f"{num_pairs:,} pairs scored; values below which 1, 5, 50, 95 and 99 % of them are:"
    for name, parts in found.items():
        joined = np.concatenate(parts) if parts else np.zeros(0)
        known = joined[~np.isnan(joined)]  # without corpus.train.scores, there are none of min_score
        if len(known):
            at = np.quantile(known, _AT)
            line = f"  {name}: {', '.join(f'{value:.3g}' for value in at)}"
            above = int((known > 0).sum())
            # Of most rules, nearly all values are 0, and each pair with another value would be dropped.
            yield line + (f"; above 0: {above:,} of {len(known):,}" if above and not at[2] else "")


def _numbered(corpus: CorpusConfig) -> Iterator[_Numbered]:
    left = corpus.max_pairs
    for unit in units(corpus, "train"):
        if corpus.max_pairs and left <= 0:
            return
        first = 0
        for rows in blocks(unit.read(ReadReport()), left):
            yield _Numbered(unit.name, first, rows)
            first += num_rows_of(rows)
        left -= first if corpus.max_pairs else 0
