"""Read lines of text, by one rule for all commands: `nmt prepare`, `nmt translate`, `nmt evaluate`.

The line rule: b"\\n" is the only separator of lines, and a "\\r" before it is part of the separator. Every other
character is part of a line, even U+2028, U+0085 and NUL: splitting at them would pair all later lines with wrong
translations. A last line without "\\n" counts unless it is empty. A BOM at the start of the file belongs to no line.

Compression is detected from the first bytes; file names do not matter. Text is UTF-8, or UTF-16 that begins with a BOM.
Other data, such as UTF-16 without a BOM or an archive, are rejected with advice on how to convert them. U+FFFD replaces
broken bytes, and their lines are counted, or refused on request. Memory grows neither with the length of a line nor
with the decompressed size of a file.
"""

import bz2
import codecs
import errno
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nmt.errors import DataError
from nmt.files import open_regular
from nmt.wording import counted

MOST_BYTES = 1 << 22
"""Maximum bytes of a line that is read whole."""
_BLOCK = 1 << 16
_MOST_XZ_BYTES = 1 << 28  # of memory; xz -9 needs 65 MiB
_BOM = b"\xef\xbb\xbf"
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a skippable frame, with which pzstd begins
    b"BZh": "bzip2",
}
SAVE_AS_UTF8 = "save the text as UTF-8"
"""What to do about bytes that are not text."""
_UNPACK = "unpack the text files in it"
_EXPORT = "export it as text, one sentence per line, in UTF-8"
_REFUSED = {
    b"PK\x03\x04": ("a zip archive or an office document", f"{_UNPACK}, or save it as text"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unpack it"),
    b"\x1f\x9d": ("compressed by compress", "unpack it"),
    b"PAR1": (
        "a Parquet file",
        "name it in corpus.train.pairs, with the ending .parquet",
    ),
    b"%PDF-": ("a PDF document", _EXPORT),
    b"{\\rtf": ("an RTF document", _EXPORT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an office document", _EXPORT),
}
_UTF32_BOM = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
_UTF16_BOM = (b"\xff\xfe", b"\xfe\xff")
# First elements of files of segments, after an optional prolog of XML or SGML. Nothing is tried in two ways (*+): the
# number of ways would double with each comment.
_MARKUP = re.compile(
    rb"\A\s*+(<\?xml[^>]*+>\s*+)?+(?:<!--(?:(?!-->).)*+-->\s*+)*+(?:<!doctype\s++|<)"
    rb"(tmx|xliff|srcset|refset|tstset|mteval|tbx|martif)\b",
    re.IGNORECASE | re.DOTALL,
)
_SEGMENTS = {
    "tmx": "write its segments to a .tsv file, source TAB target",
    "xliff": "write its segments to a .tsv file, source TAB target",
    "tbx": "write its terms to a .tsv file, source TAB target",
    "martif": "write its terms to a .tsv file, source TAB target",
}
_TAKE_OUT_SEGMENTS = "take its sentences out: sed -n 's/<seg[^>]*>\\(.*\\)<.seg>/\\1/p' FILE.sgm > FILE.txt"


class Stream(Protocol):
    """The method that binary files, standard input and io.BytesIO have in common."""

    def read1(self, size: int, /) -> bytes: ...


class TextReader:
    """Read the lines of a binary stream, without their ends. Nothing is read before it is requested.

    `name` names the stream in errors, for example "corpus.train.source: train.en". Iteration and `blocks` raise
    DataError if the stream is not UTF-8 text, contains damaged compressed data, or cannot be read.
    """

    def __init__(
        self,
        stream: Stream,
        name: str,
        most_bytes: int = MOST_BYTES,
        strict: bool = False,
        markup: bool = False,
        several: bool = False,
    ) -> None:
        """Read `stream`; with `strict`, a line with bytes that are not text raises DataError.

        `markup`: files of segments, such as TMX, are read too, as the lines that they are. `several`: a file of one
        line, without a line end but with several carriage returns, raises DataError, since it must have been lines.
        """
        self.name = name
        self.most_bytes = most_bytes
        self.strict = strict
        self._markup, self._several = markup, several
        self.num_lines = 0
        """Lines read to their end."""
        self.num_invalid = 0
        """Lines, or parts of a line, with bytes that are not UTF-8 or UTF-16; U+FFFD replaces these."""
        self.first_invalid = 0
        """Number of the first such line, from 1."""
        self._stream = stream
        self._kind = "text"
        self._encoding = "UTF-8"

    def __iter__(self) -> Iterator[str]:
        """Yield whole lines. Raises DataError for a line of more than `most_bytes` bytes."""
        for lines in self.whole_blocks():
            yield from lines

    def whole_blocks(self) -> Iterator[list[str]]:
        """Yield the lines that one read completes. Raises DataError for a line of more than `most_bytes` bytes."""
        for lines, whole in self.blocks():
            if not whole:
                raise DataError(
                    f"{self.name} line {self.num_lines + 1} has more than {self.most_bytes:,} bytes: "
                    "a line is one sentence; correct or remove it"
                )
            yield lines

    def blocks(self) -> Iterator[tuple[list[str], bool]]:
        """Yield (lines, whole) as soon as their bytes arrive: all lines that one read of the stream completes.

        If `whole` is False, `lines` is one part of a line of more than `most_bytes` bytes, and its next part follows.
        The last part counts as a whole line. Parts end after a blank if possible, otherwise between two characters.
        """
        rest: list[bytes] = []  # start of a line whose end has not arrived
        size = 0
        for block in self._read():
            end = block.rfind(b"\n") + 1
            if end:
                lines = b"".join([*rest, block[:end]])
                rest, size = [], 0
                yield from self._lines(lines)
            if end < len(block):
                rest.append(block[end:])
                size += len(block) - end
            while size > self.most_bytes:
                part, left = _cut(b"".join(rest), self.most_bytes)
                self._check_returns(part)
                rest, size = [left], len(left)
                yield [self._text(part, self.num_lines + 1)], False
        if size:
            line = b"".join(rest)
            self._check_returns(line)
            yield from self._lines(line + b"\n")

    def _check_returns(self, unended: bytes) -> None:
        """Raise DataError if a file without any line end has several carriage returns, and so must not be one line."""
        if self._several and not self.num_lines and unended.rstrip(b"\r").count(b"\r") > 1:
            raise DataError(f"{self.name} has carriage returns as line ends: convert it (tr '\\r' '\\n' < FILE > NEW)")

    def _lines(self, data: bytes) -> Iterator[tuple[list[str], bool]]:
        """Yield the lines in `data`, which ends with a line end."""
        first_end = data.index(b"\n")
        while first_end > self.most_bytes:  # only the first line can span several blocks
            part, data = _cut(data, self.most_bytes)
            first_end -= len(part)
            yield [self._text(part, self.num_lines + 1)], False
        data = data.replace(b"\r\n", b"\n")
        try:
            lines = data.decode("utf-8").split("\n")
            lines.pop()
        except UnicodeDecodeError:
            numbered = enumerate(data.split(b"\n")[:-1], self.num_lines + 1)
            lines = [self._text(line, number) for number, line in numbered]
        self.num_lines += len(lines)
        yield lines, True

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.count_invalid(number, f"bytes that are not {self._encoding}", SAVE_AS_UTF8)
            return line.decode("utf-8", errors="replace")

    def count_invalid(self, number: int, what: str, remedy: str = "correct it") -> None:
        """Count line `number` as one with `what` in it, which U+FFFD replaces. DataError if the reader is strict."""
        if self.strict:
            raise DataError(f"{self.name} line {number} has {what}: {remedy}; without --strict, U+FFFD replaces them")
        self.first_invalid = self.first_invalid or number
        self.num_invalid += 1

    def replaced(self) -> str:
        """Return a note on what U+FFFD has replaced, and what to do; empty if that is nothing."""
        if not self.num_invalid:
            return ""
        lines = counted(self.num_invalid, "line")
        return f"{lines} with bytes that are not {self._encoding}; they were replaced by U+FFFD: {SAVE_AS_UTF8}"

    def _read(self) -> Iterator[bytes]:
        """Yield non-empty blocks of decompressed bytes in UTF-8, without the BOM."""
        size = min(_BLOCK, self.most_bytes)
        try:
            head, stream = _begin(self._stream, size)
            self._kind = _compression(head)
            if self._kind != "text":
                head, stream = _begin(_decompressed(_Joined(head, stream), self._kind), size)
            self._check(head)
            if head.startswith(_UTF16_BOM):
                self._encoding = "UTF-16"
                blocks = _utf8(head, stream, size)
                head = next(blocks, b"")
                self._check(head)
            else:
                blocks = iter(lambda: stream.read1(size), b"")
                head = head.removeprefix(_BOM)
            yield from filter(None, [head])
            yield from blocks
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            problem = "cannot be read" if self._kind == "text" else f"is damaged {self._kind} data"
            remedy = "check the file" if self._kind == "text" else "get or compress it again"
            reason = getattr(error, "strerror", None) or error
            place = f" after line {self.num_lines:,}" if self.num_lines else ""
            raise DataError(f"{self.name} {problem}{place} ({reason}): {remedy}") from error

    def _check(self, head: bytes) -> None:
        """Raise DataError if the first bytes show that the data are not text."""
        if wide := "UTF-32" if head.startswith(_UTF32_BOM) else _wide(head):
            raise DataError(f"{self.name} is {wide}, not UTF-8: convert it (iconv -f {wide} -t UTF-8 FILE > NEW)")
        if (kind := _compression(head)) != "text":
            raise DataError(f"{self.name} is compressed twice (the inner format is {kind}): decompress it once")
        for magic, (what, remedy) in _REFUSED.items():
            if head.startswith(magic):
                raise DataError(f"{self.name} is {what}, not text: {remedy}")
        if not self._markup and (found := _MARKUP.match(head.removeprefix(_BOM))):
            element = found[2].decode().lower()
            remedy = _SEGMENTS.get(element, _TAKE_OUT_SEGMENTS)
            raise DataError(f"{self.name} is a file of <{element}> markup, not of one sentence per line: {remedy}")


@contextmanager
def open_text(path: Path, key: str, most_bytes: int = MOST_BYTES, several: bool = False) -> Iterator[TextReader]:
    """Open a reader of the regular file at `path`, named by the setting `key`. Raises DataError like `open_input`."""
    with open_input(path, key) as stream:
        yield TextReader(stream, f"{key}: {path}", most_bytes, several=several)


def open_input(path: Path, key: str) -> io.BufferedReader:
    """Open the regular file at `path`, named by the setting `key`.

    Raises DataError if it is not a regular file, such as a pipe, or cannot be read.
    """
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        cause: Exception = error
        problem = "does not exist: correct the name"
        problem += ", or set corpus.root to the folder it is in" if key.startswith("corpus.") else ""
    except IsADirectoryError as error:
        cause, problem = error, "is a folder: name the files in it"
    except (OSError, ValueError) as error:
        cause = error
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error}): check its name and permissions"
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            problem = "is a pipe or a device, but is read more than once: write it to a file first"
    raise DataError(f"{key}: {path} {problem}") from cause


class _Joined(io.RawIOBase):
    """A stream whose first bytes were already read."""

    def __init__(self, head: bytes, stream: Stream) -> None:
        super().__init__()
        self._head = head
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = self._head or self._stream.read1(len(buffer))
        taken = data[: len(buffer)]
        self._head = data[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


class _Xz(io.RawIOBase):
    """Decompresses xz with a bound on memory, which a file may ask for at will."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream
        self._decompressor = lzma.LZMADecompressor(memlimit=_MOST_XZ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = b""
        while not data:
            if self._decompressor.eof:
                # Another stream may follow, after a padding of zeros.
                rest = self._decompressor.unused_data.lstrip(b"\0") or self._stream.read1(_BLOCK).lstrip(b"\0")
                if not rest:
                    return 0
                self._decompressor = lzma.LZMADecompressor(memlimit=_MOST_XZ_BYTES)
            elif self._decompressor.needs_input:
                rest = self._stream.read1(_BLOCK)
                if not rest:
                    raise EOFError("it ends before its end marker")
            else:
                rest = b""
            data = self._decompressor.decompress(rest, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _begin(stream: Stream, size: int) -> tuple[bytes, Stream]:
    """Return (the first bytes, the stream after them). Reads only as much as identifies the compression."""
    head = b""
    while any(magic.startswith(head) for magic in (*_MAGIC, *_UTF32_BOM, *_UTF16_BOM, _BOM) if len(head) < len(magic)):
        block = stream.read1(size)
        if not block:
            break
        head += block
    return head, stream


def _compression(head: bytes) -> str:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "text")


def _decompressed(raw: _Joined, kind: str) -> Stream:
    buffered = io.BufferedReader(raw, _BLOCK)
    if kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BLOCK)
    if kind == "xz":
        return io.BufferedReader(_Xz(buffered), _BLOCK)
    if kind == "bzip2":
        return bz2.BZ2File(buffered)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(buffered, "zstd"), _BLOCK)


def _utf8(head: bytes, stream: Stream, size: int) -> Iterator[bytes]:
    """Yield non-empty blocks of the UTF-8 of text in UTF-16, of which `head` is the start with its BOM.

    Half a character becomes a byte that UTF-8 does not have, so that its line counts as invalid.
    """
    decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
    block = head
    while block:
        yield from filter(None, [decoder.decode(block).encode(errors=_LONE_SURROGATE)])
        block = stream.read1(size)
    if decoder.getstate()[0]:
        yield _INVALID


def _invalid(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    return _INVALID * (error.end - error.start), error.end


_INVALID = b"\xff"
_LONE_SURROGATE = "nmt.textfile"
codecs.register_error(_LONE_SURROGATE, _invalid)


def _wide(head: bytes) -> str:
    """Return UTF-16LE or the like if bytes at the start are NUL in the pattern of Western text, otherwise "".

    UTF-16 with a BOM is none of these.
    """
    if head.startswith(_UTF16_BOM):
        return ""
    sample = head[: len(head[:1024]) // 4 * 4]
    nuls = [place for place in range(4) if sample[place::4].count(0) > 0.4 * len(sample) / 4]
    names = {"UTF-16LE": [1, 3], "UTF-16BE": [0, 2], "UTF-32LE": [1, 2, 3], "UTF-32BE": [0, 1, 2]}
    return next((name for name, places in names.items() if places == nuls and len(sample) >= 16), "")


def _cut(line: bytes, most: int) -> tuple[bytes, bytes]:
    """Split a line into (a part of at most `most` bytes, the rest)."""
    end = line.rfind(b" ", 0, most) + 1
    if not end:
        end = most
        # Bytes 10xxxxxx continue a character, which has at most three of them.
        while most - end < 3 and end > 1 and line[end] & 0xC0 == 0x80:
            end -= 1
    return line[:end], line[end:]
