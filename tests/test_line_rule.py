"""The line rule for any bytes: one line out for each line in, in order, equal for equal lines, in any batches."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmt.data.subwords import one_line
from nmt.decoding.translator import Translator
from nmt.run import RunDirectory
from nmt.streams.halt import Halt, Source
from nmt.streams.lines import read_lines, windows
from nmt.streams.translating import JoinedLines, translate_stream
from tests.toy import ENGLISH

BATCHES = (1, 40, 0)
"""Values of `decoding.batch_tokens`: one sentence, a few, and as many as the program chooses."""
UNITS = [
    *(word.encode() for word in ENGLISH),
    *(each.encode() for each in ("\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x00", "\ufeff", "\u3000")),
    *(
        each.encode()
        for each in ("</s>", "<unk>", "<b>", "&amp;", "%s", "{name}", "[X0X]", "1,234.5", "a@b.de", "東京")
    ),
    *(each.encode() for each in ("é", "e\u0301", "🚂", "\u200d", "ﬁ", ". ", "? ", "!", '"', "(", "…")),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f", b"\x80", b"\xfe\xff", b"\t", b"   ", b"\\n", b"-"),
]


def byte_strings(seed: int, count: int) -> Iterator[bytes]:
    """Yield texts of 0 to 9 lines of random bytes, units that are hard to treat, words, and lines that repeat."""
    rng = np.random.default_rng(seed)

    def line() -> bytes:
        kind = rng.integers(6)
        size = int(rng.integers(7))
        if kind == 0:
            return rng.bytes(size)
        if kind == 1:
            return b" ".join(UNITS[i] for i in rng.integers(len(ENGLISH), size=6 * size))
        return (b" " if kind == 2 else b"").join(UNITS[i] for i in rng.integers(len(UNITS), size=size))

    for _ in range(count):
        known = [line() for _ in range(rng.integers(1, 5))]
        lines = [known[i] for i in rng.integers(len(known), size=rng.integers(8))]
        # The first byte keeps text from beginning like an archive.
        content = b"x" + (b"\r\n" if rng.integers(2) else b"\n").join(lines)
        yield content + b"\n" * int(rng.integers(3))


def translate(translator: Translator, content: bytes, batch_tokens: int, most_lines: int) -> bytes:
    written: list[bytes] = []
    lines = JoinedLines()
    options = replace(translator.options, beam_size=1, max_length=4, retry=False, batch_tokens=batch_tokens)
    with Halt() as halt:
        source = Source(io.BytesIO(content), halt)
        _, blocks = read_lines(source, "bytes", language="en")
        translate_stream(
            translator,
            windows(blocks, source, most_lines),
            lambda pieces, found: written.append(lines.add(pieces, found).encode()),
            halt.set,
            options,
        )
    return b"".join(written)


def check_line_rule(translator: Translator, content: bytes) -> None:
    raw = content.split(b"\n")
    if not raw[-1]:
        raw.pop()
    sources = [line.removesuffix(b"\r").decode(errors="replace") for line in raw]
    outputs = [translate(translator, content, tokens, size) for tokens, size in zip(BATCHES, (64, 3, 1), strict=True)]
    assert outputs[1:] == outputs[:-1]
    text = outputs[0].decode()
    targets = text.split("\n")
    assert targets.pop() == ""
    assert len(targets) == len(sources)
    assert len(text.splitlines()) == len(sources)
    assert len(set(zip(sources, targets, strict=True))) == len(set(sources))
    for source, target in zip(sources, targets, strict=True):
        if not any(character.isalnum() for character in source):
            assert target == one_line(source)
        else:
            assert target.strip()


@pytest.fixture(scope="module")
def translator(run: Path) -> Translator:
    directory = RunDirectory(run)
    return Translator.load(directory, directory.config())


@pytest.mark.slow
def test_the_line_rule_for_some_bytes(translator: Translator) -> None:
    for content in byte_strings(seed=0, count=12):
        check_line_rule(translator, content)


def test_line_breaks_beside_and_in_fields_are_blanks(translator: Translator) -> None:
    check_line_rule(translator, "x the \x1c {name} dog\nx\u2028<b\x85>dog</b>\u2028%s\n\x1c {name}\n".encode())


@pytest.mark.slow
def test_the_line_rule_for_many_bytes(translator: Translator) -> None:
    for content in byte_strings(seed=1, count=200):
        check_line_rule(translator, content)
