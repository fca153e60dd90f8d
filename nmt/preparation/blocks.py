"""Cut the rows of a corpus into blocks: the pieces of work that processes share, and that a restart need not repeat.

Where blocks begin depends on the text alone, and so does all that is made of them.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from nmt.corpus.pairs import Rows

BLOCK_ROWS = 50_000
_BLOCK_CHARACTERS = 1 << 24  # fewer rows make a block if their texts are long


def blocks(rows: Iterable[Rows], limit: int = 0) -> Iterator[Rows]:
    """Yield the rows in blocks, whatever chunks they come in. All rows of a block have one tag.

    `limit`: rows at most; 0: all.
    """
    held: list[Rows] = []
    num_rows = num_characters = 0
    left = limit or float("inf")
    for chunk in rows:
        sizes = _sizes(chunk)
        start = 0
        while start < min(len(sizes), left):
            ends = num_characters + np.cumsum(sizes[start : start + BLOCK_ROWS - num_rows])
            room = int(np.searchsorted(ends, _BLOCK_CHARACTERS, side="right"))
            full = room < len(ends) or num_rows + room == BLOCK_ROWS
            if held and (held[0].tag != chunk.tag or not room):
                yield _joined(held)
                held, num_rows, num_characters = [], 0, 0
                continue
            taken = int(min(max(room, 1), left - start))
            held.append(_slice(chunk, start, start + taken))
            num_rows, num_characters, start = num_rows + taken, int(ends[taken - 1]), start + taken
            if full:
                yield _joined(held)
                held, num_rows, num_characters = [], 0, 0
        left -= start
        if left <= 0:
            break
    if held:
        yield _joined(held)


def num_rows_of(rows: Rows) -> int:
    """Return the number of rows."""
    return len(next(iter(rows.texts.values()), ()))


def _sizes(rows: Rows) -> np.ndarray:
    """Return the characters of each row."""
    count = num_rows_of(rows)
    return sum(
        (np.fromiter(map(len, texts), np.int64, count) for texts in rows.texts.values()), np.zeros(count, np.int64)
    )


def _slice(rows: Rows, start: int, end: int) -> Rows:
    if start == 0 and end >= num_rows_of(rows):
        return rows
    texts = {language: each[start:end] for language, each in rows.texts.items()}
    return rows._replace(texts=texts, domains=rows.domains[start:end], scores=rows.scores[start:end])


def _joined(held: list[Rows]) -> Rows:
    if len(held) == 1:
        return held[0]
    texts = {language: [text for rows in held for text in rows.texts[language]] for language in held[0].texts}
    scores = [score for rows in held for score in rows.scores]
    domains = [domain for rows in held for domain in rows.domains or [""] * num_rows_of(rows)]
    return Rows(texts, domains if any(domains) else [], held[0].tag, scores)
