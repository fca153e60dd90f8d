"""Text as lines: the line rule against a plain split, compressions and what is no text by content, bounded memory."""

import bz2
import gzip
import io
import lzma
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nmt.errors import DataError
from nmt.textfile import _MAGIC, _REFUSED, _UTF16_BOM, _UTF32_BOM, TextReader, open_input, open_text

ODD = "tab\tNUL\x00 CR\r mid\r dle \x0b\x0c\x1c\x85\u2028\u2029 end"


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


class Dribble(io.BytesIO):
    """A pipe of which every read brings a few bytes."""

    def read1(self, _size: int | None = -1, /) -> bytes:
        return super().read1(3)


def refusal(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        list(TextReader(io.BytesIO(data), "x.en"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("x.en")
    return message


def plain_lines(data: bytes) -> list[str]:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r").decode(errors="replace") for line in lines]


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=15), st.text("aü\n\r\x85\u2028\x00\ufeff", max_size=20).map(str.encode)))
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf\n")
@example(b"a\r\n\r\nb\r")
@example(b"a\r\r\nb\xff\xfe\n\xc3")
@example(b"\n")
@example(b"B")
@example(b"BZ\n")
def test_lines_are_those_of_a_plain_split(data: bytes) -> None:
    assume(not data.startswith((*_MAGIC, *_UTF16_BOM, *_UTF32_BOM, *_REFUSED)))
    for stream in (io.BytesIO(data), Dribble(data)):
        reader = TextReader(stream, "x")
        lines = list(reader)
        assert lines == plain_lines(data)
        assert reader.num_lines == len(lines)
        broken = sum(b"\xef\xbf\xbd" not in data and "\ufffd" in line for line in lines)
        assert reader.num_invalid >= broken
        assert (reader.num_invalid == 0) == (data.decode(errors="ignore").encode() == data)


@settings(max_examples=200)
@given(st.text("aü東\n\r\x85\u2028\x00\ufeff𝄞", max_size=20), st.sampled_from(["utf-16-le", "utf-16-be"]))
def test_utf16_with_a_bom_is_the_same_text(text: str, encoding: str) -> None:
    data = "\ufeff".encode(encoding) + text.encode(encoding)
    assume(not data.startswith(_UTF32_BOM))
    for stream in (io.BytesIO(data), Dribble(data), io.BytesIO(gzip.compress(data))):
        reader = TextReader(stream, "x")
        assert list(reader) == plain_lines(b"\xef\xbb\xbf" + text.encode())
        assert reader.num_invalid == 0


@pytest.mark.parametrize("end", [b"\x00", b"\x00\xd8", b"\x00\xd8b\x00", b"\x00\xdc"], ids=repr)
def test_half_a_character_of_utf16_is_replaced_and_counted(end: bytes) -> None:
    data = "a\nü".encode("utf-16") + end
    for stream in (io.BytesIO(data), Dribble(data)):
        reader = TextReader(stream, "x")
        assert list(reader) == ["a", f"ü\ufffd{'b' * (b'b' in end)}"]
        assert reader.num_invalid == 1
    with pytest.raises(DataError, match="x line 2 has bytes that are not UTF-16"):
        list(TextReader(io.BytesIO(data), "x", strict=True))


@pytest.mark.parametrize("kind", COMPRESS)
def test_compression_is_told_by_the_first_bytes(kind: str) -> None:
    data = "\n".join([ODD, "two", "", "größer", *map(str, range(20000))]).encode()
    packed = COMPRESS[kind](data)
    assert list(TextReader(io.BytesIO(packed), "x")) == plain_lines(data)
    assert list(TextReader(Dribble(packed), "x")) == plain_lines(data)
    # Several members one after the other, as `cat a.gz b.gz` makes, are one text.
    assert list(TextReader(io.BytesIO(packed + COMPRESS[kind](b"\nend")), "x"))[-1] == "end"
    assert list(TextReader(io.BytesIO(COMPRESS[kind](b"")), "x")) == []


@pytest.mark.parametrize("kind", COMPRESS)
def test_damaged_archives_are_refused(kind: str) -> None:
    packed = COMPRESS[kind]("\n".join(f"line {number * number}" for number in range(9999)).encode())
    assert f"is damaged {kind} data" in refusal(packed[: len(packed) // 2])
    assert f"is damaged {kind} data" in refusal(packed[:-4])
    if kind != "zstd":  # whose checksum this library leaves out
        damaged = packed[:100] + b"nonsense" + packed[108:]
        assert f"is damaged {kind} data" in refusal(damaged)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.en", "text")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("A line.\nAnother line.\n".encode("utf-32"), ["UTF-32", "iconv"]),
        ("A line.\nAnother line.\n".encode("utf-16-le"), ["UTF-16LE", "iconv -f UTF-16LE"]),
        ("A line.\nAnother line.\n".encode("utf-16-be"), ["UTF-16BE", "iconv"]),
        ("A line.\nAnother line.\n".encode("utf-32-le"), ["UTF-32LE", "iconv"]),
        (gzip.compress("A line of text.\n".encode("utf-16-le")), ["UTF-16LE", "iconv"]),
        ('<?xml version="1.0" encoding="utf-16"?>\n<tmx version="1.4">'.encode("utf-16"), ["<tmx>", ".tsv"]),
        (gzip.compress(gzip.compress(b"A line.\n")), ["compressed twice"]),
        (zipped(), ["zip", "unpack"]),
        (b"PAR1\x15\x04\x15", ["Parquet", "corpus.train.pairs"]),
        (b"%PDF-1.7\n", ["PDF"]),
        (b'<srcset setid="newstest2014" srclang="any">\n<doc>\n<seg id="1">A</seg>', ["<srcset>", "sed"]),
        (b'<!DOCTYPE mteval SYSTEM "x.dtd">\n<mteval>\n<refset>', ["<mteval>", "sed"]),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a\nb -->\n<tmx version="1.4">', ["<tmx>", ".tsv"]),
        (b'<?xml version="1.0"?><xliff version="1.2">', ["<xliff>", ".tsv"]),
    ],
    # Compressed data hold the time, and processes that share the tests must call them alike.
    ids=[f"case{number}" for number in range(14)],
)
def test_what_is_no_text_is_refused_with_a_remedy(data: bytes, parts: list[str]) -> None:
    message = refusal(data)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("line", ["<b>bold</b>", "<tmxes are rare", "PK", "BZ", "\x00", "a\x00b", "%PDF", "東京\x00"])
def test_odd_text_is_text(line: str) -> None:
    assert list(TextReader(io.BytesIO(f"{line}\n".encode()), "x")) == [line]


def test_lines_come_as_soon_as_they_are_there() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb", buffering=0) as sink:
        blocks = TextReader(stream, "x").blocks()
        sink.write(b"B\nZ\nhalf")
        assert next(blocks) == (["B", "Z"], True)
        sink.write(b" done\n")
        assert next(blocks) == (["half done"], True)


def test_strict_names_the_first_line_with_bytes_that_are_not_text() -> None:
    assert list(TextReader(io.BytesIO("ä\n\ufffd\n".encode()), "x", strict=True)) == ["ä", "\ufffd"]
    for data, number in ((b"a\n\xff\n\xff\n", 2), (b"\xff", 1), (b"a\n" * 50_000 + b"\xc3", 50_001)):
        for stream in (io.BytesIO(data), Dribble(data)):
            with pytest.raises(
                DataError, match=f"x line {number} has bytes that are not UTF-8: save the text as UTF-8;"
            ):
                list(TextReader(stream, "x", strict=True))
    with pytest.raises(DataError, match="x line 2 has bytes"):  # in a part of a long line
        list(TextReader(io.BytesIO(b"a\n" + b"b" * 20 + b"\xff" + b"b" * 20), "x", 9, strict=True).blocks())


@settings(max_examples=300)
@given(st.text("aaü東 \n", max_size=60), st.integers(4, 9))
def test_long_lines_come_in_parts(text: str, most: int) -> None:
    reader = TextReader(io.BytesIO(text.encode()), "x", most)
    lines = [""]
    for block, whole in reader.blocks():
        assert whole or len(block) == 1
        assert all(len(line.encode()) <= most for line in block)
        for line in block:
            lines[-1] += line
            if whole:
                lines.append("")
    assert lines == [*plain_lines(text.encode()), ""]
    assert reader.num_invalid == 0
    long = [number for number, line in enumerate(plain_lines(text.encode()), 1) if len(line.encode()) > most]
    if long:
        with pytest.raises(DataError, match=rf"x line {long[0]} has more than {most} bytes"):
            list(TextReader(io.BytesIO(text.encode()), "x", most))


def test_parts_end_after_a_blank() -> None:
    parts = [lines for lines, _ in TextReader(io.BytesIO(b"some words in a line\n"), "x", 9).blocks()]
    assert parts == [["some "], ["words in "], ["a line"]]


@pytest.mark.parametrize("kind", COMPRESS)
def test_memory_has_a_bound(kind: str) -> None:
    packed = COMPRESS[kind](b"a" * 30_000_000)
    list(TextReader(io.BytesIO(COMPRESS[kind](b"a")), "x"))  # imports
    tracemalloc.start()
    reader = TextReader(io.BytesIO(packed), "x", 1 << 18)
    num_parts = sum(len(lines) for lines, _ in reader.blocks())
    with pytest.raises(DataError, match="x line 1 has more than 262,144 bytes"):
        list(TextReader(io.BytesIO(packed), "x", 1 << 18))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_parts == -(-30_000_000 // (1 << 18))
    assert peak < 12_000_000  # 8 MB are the dictionary of xz


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, part in (
        ("pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("folder", "is a folder"),
        ("none", "does not exist: .*set corpus.root"),
        ("nul\x00", "cannot be read"),
    ):
        with pytest.raises(DataError, match=f"corpus.dev.source: .*{part}"):
            open_input(tmp_path / name, "corpus.dev.source")
    (tmp_path / "a.en").write_bytes(b"one\r\ntwo")
    with open_text(tmp_path / "a.en", "corpus.dev.source") as reader:
        assert list(reader) == ["one", "two"]


@pytest.mark.parametrize("comment", [b"<!-- a -->", b"<!---->\n", b"<!-- -- > "])
def test_comments_are_searched_for_markup_in_one_way(comment: bytes) -> None:
    # Twice the time for each comment, if one may end where the next one does.
    assert len(list(TextReader(io.BytesIO(comment * 5000 + b"text\n"), "x"))) >= 1
    assert "<tmx>" in refusal(b"<!-- a -->\n" * 5000 + b"<tmx>")


@pytest.mark.parametrize(
    "data",
    [b"a\rb\rc\rd\r", b"a\rb\rc", "a\rb\rc\r".encode("utf-16"), gzip.compress(b"a\r\rb\rc"), b"line\r" * (1 << 20)],
    ids=[f"case{number}" for number in range(5)],
)
def test_carriage_returns_as_line_ends_are_refused_on_request(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^x has carriage returns as line ends: .*tr '\\r' '\\n' < FILE > NEW\)$"):
        list(TextReader(io.BytesIO(data), "x", several=True))
    if len(data) < 1 << 20:  # otherwise they are letters
        assert len(list(TextReader(io.BytesIO(data), "x"))) == 1


@pytest.mark.parametrize(
    "data", [b"", b"a\rb", b"a\rb\r", b"a\r\r\r", b"a\rb\rc\rd\n", b"a\nb\rc\rd\re", b"a\r\nb\r\n"]
)
def test_carriage_returns_that_are_no_line_ends(data: bytes) -> None:
    assert list(TextReader(io.BytesIO(data), "x", several=True)) == list(TextReader(io.BytesIO(data), "x"))
