"""What `nmt prepare` reports of a corpus: how much text was kept, and how the vocabulary fits it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from nmt.config import CorpusConfig
from nmt.data.subwords import list_characters
from nmt.preparation.tally import Tally
from nmt.textfile import SAVE_AS_UTF8
from nmt.wording import brief, percent


def summary(
    corpus: CorpusConfig, manifest: dict[str, Any], dropped: str, num_wanted: int, notes: Sequence[str], encoded: Tally
) -> Iterator[str]:
    """Yield a summary in a few lines.

    `dropped` describes what the filters dropped, `num_wanted` is the number of pairs to hold out, and `encoded` has the
    counts of encoding.
    """
    name = corpus.name
    in_bytes = encoded.characters.get("in_bytes", Counter())
    yield (
        f"{name}: {manifest['pairs_read']:,} pairs read, {manifest['pairs_kept']:,} kept"
        + (f", {manifest['held_out']:,} held out" if manifest["held_out"] else "")
        + (f"; dropped: {dropped}" if dropped else "")
    )
    if parts := manifest.get("parts"):
        counts = {part["name"]: manifest["shards"][part["shards"]]["pairs"] for part in parts}
        yield f"{name}: pairs by {'direction' if corpus.directions else 'tag'}: {_counts(counts)}"
    if manifest["held_out"] > num_wanted:
        more = manifest["held_out"] - num_wanted
        yield (
            f"{name}: {more:,} {'copies' if more > 1 else 'copy'} of the held-out pairs removed from the training text"
        )
    if empty := _counts(manifest["empty_rows"]):
        what = "pairs that lack a side" if corpus.directions else "rows left out because they are blank or lack a text"
        yield f"{name}: {what}: {empty}"
    if invalid := _counts(manifest["invalid_utf8_lines"]):
        yield f"{name}: lines that were not valid UTF-8, invalid bytes replaced: {invalid}; {SAVE_AS_UTF8}"
    for note in notes:
        yield f"{name}: {note}"
    if inherited := manifest.get("vocabulary"):
        yield (
            f"vocabulary: {manifest['vocabulary_size']:,} subwords of {inherited['from']}; settings of learning, such "
            "as corpus.subwords.vocab_size, have no effect"
        )
        yield f"{name}: with this vocabulary, {_fit(encoded, in_bytes)}"
    else:
        yield (
            f"vocabulary: {manifest['vocabulary_size']:,} {corpus.subwords.kind} subwords from "
            f"{manifest['vocabulary_sentences']:,} sentences"
        )
    if in_bytes:
        yield (
            f"{len(in_bytes):,} characters, in {manifest['lines_in_bytes']:,} lines, are not in the vocabulary and are "
            f"encoded as bytes: {list_characters(in_bytes)}"
        )
    if shown := _counts(manifest["examples"]):
        yield f"{name}: pairs rewritten: {shown}"
    yield (
        f"{brief(manifest['source_pieces'])} source and {brief(manifest['target_pieces'])} target "
        f"subwords, {manifest['seconds']:.0f} s"
    )


def _fit(encoded: Tally, in_bytes: Counter[str]) -> str:
    """Return how the vocabulary cuts the text."""
    counts = encoded.counts
    share = in_bytes.total() / max(counts["characters"], 1)
    return (
        f"{counts['pieces'] / max(counts['words'], 1):.2f} subwords per word, {percent(share)} of the characters are "
        "encoded as bytes"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
