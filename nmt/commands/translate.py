"""nmt translate: a file, line by line."""

import argparse
import io
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from nmt.commands import Parser, say
from nmt.config import Config
from nmt.data.subwords import list_characters
from nmt.decoding.translator import Translator
from nmt.run import RunDirectory
from nmt.streams.lines import Piece, open_input, text_reader, windows
from nmt.streams.output import Output, open_output
from nmt.streams.translating import JoinedLines, translate_stream


def parser() -> Parser:
    """Options of `nmt translate`."""
    parser = Parser(
        "translate",
        "Translate text, one sentence a line; line n of the output translates line n of the input. A line that is "
        "longer than the model can take is translated in parts.",
        "  nmt translate runs/demo input.en -o output.de\n"
        "  echo 'The train leaves at 14:35.' | nmt translate demo\n"
        "  nmt translate demo input.en.gz -o output.de.gz decoding.beam_size=8 decoding.checkpoint=average",
    )
    parser.add_argument(
        "input",
        nargs="?",
        default="-",
        metavar="INPUT",
        help="a file, which may be compressed by gzip, xz, zstd or bzip2 (default: standard input, each line of which "
        "is answered as soon as no more come)",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="OUTPUT",
        help="a file, which appears when it is complete; .gz, .bz2 and .xz are compressed (default: standard output)",
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Translate `options.input` to `options.output`, window by window."""
    lines = JoinedLines()
    with open_input(options.input) as source, open_output(options.output, source) as output:
        translator = Translator.load(run, config)
        reader = text_reader(source, options.input)
        started = time.perf_counter()
        try:
            with _Progress(source, output, options.output == "-") as progress:
                read = windows(reader, source, most_lines=32 * config.decoding.batch_sentences)
                for text in translate_stream(translator, progress.over(read, lines), lines, progress=progress.tell):
                    output.stream.write(text.encode())
                    if output.live:
                        output.stream.flush()
        except KeyboardInterrupt:
            kept = "they are written" if output.live else f"{options.output} was not written"
            say(f"{_lines(lines.num_lines)} translated so far; {kept}")
            raise
    seconds = time.perf_counter() - started
    say(f"{_lines(reader.num_lines)} in {seconds:.1f} s ({reader.num_lines / max(seconds, 1e-9):,.1f} lines/s)")
    if reader.num_invalid:
        say(f"{_lines(reader.num_invalid)} held bytes that are not UTF-8, which were replaced by U+FFFD")
    if lines.num_unlearned:
        unknown = list_characters(lines.unlearned)
        say(f"{_lines(lines.num_unlearned)} held characters that are unknown to the model, check: {unknown}")
    if lines.num_long:
        longest, asked = translator.max_pieces(), config.decoding.max_source_pieces
        why = "decoding.max_source_pieces" if longest == asked else "the longest line of the training text"
        say(f"{_lines(lines.num_long)} longer than {longest} pieces ({why}) translated in parts")
    if lines.num_cut_off:
        ratio = f"decoding.max_length_ratio={config.decoding.max_length_ratio:g}"
        say(f"{_lines(lines.num_cut_off)} cut off at the greatest length ({ratio}), perhaps repeating: check them")


def _lines(count: int) -> str:
    return f"{count:,} line{'' if count == 1 else 's'}"


class _Progress:
    """On a terminal, a line that says how far the translation is; nothing anywhere else."""

    def __init__(self, source: io.BufferedReader, output: Output, to_standard_output: bool) -> None:
        size = _size(source)
        # Nobody wants it between their own lines, or between the translations.
        seen = sys.stderr.isatty() and not source.isatty() and not (to_standard_output and output.stream.isatty())
        left = "{percentage:3.0f}% {desc}, {remaining} left" if size else "{desc}"
        # Where a terminal says that it has 0 columns and rows, tqdm would show nothing.
        columns, rows = shutil.get_terminal_size()
        self._bar = tqdm(
            total=size,
            desc=_lines(0),
            bar_format=left,
            leave=False,
            disable=not seen,
            file=sys.stderr,
            ncols=columns,
            nrows=rows,
        )
        self._source = source if size else None
        self._started = time.perf_counter()
        self._lines = self._window = 0
        self._read = (0, 0)

    def over(self, source: Iterator[list[Piece]], done: JoinedLines) -> Iterator[list[Piece]]:
        """The windows of `source`, each noted as it comes; `done`: the lines before it."""
        for window in source:
            self._lines, self._window = done.num_lines, len(window)
            if self._source:
                self._read = (self._read[1], self._source.tell())
            yield window

    def tell(self, share: float) -> None:
        """So much of the window is done."""
        lines = self._lines + round(share * self._window)
        speed = lines / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_description_str(f"{_lines(lines)}, {speed:,.1f} lines/s", refresh=False)
        before, after = self._read
        self._bar.n = round(before + share * (after - before))
        self._bar.refresh()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _size(stream: io.BufferedReader) -> int | None:
    """Bytes of a file; None for any other stream."""
    try:
        found = os.fstat(stream.fileno())
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
