"""nmt translate: translate a file line by line."""

import argparse
import gc
import hashlib
import io
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from nmt.commands import Parser, say
from nmt.commands.direction import asked_direction, directions_of
from nmt.config import Config, Direction
from nmt.data.subwords import list_characters, one_line
from nmt.decoding.loading import others_of
from nmt.decoding.parts import Rank
from nmt.decoding.translation import Options, Translation
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.run import RunDirectory
from nmt.streams.alignments import AlignmentLines
from nmt.streams.flagged import FlaggedLines
from nmt.streams.halt import Halt, Sink, Source
from nmt.streams.lines import (
    Piece,
    Window,
    open_input,
    read_lines,
    read_records,
    read_whole_lines,
    shown,
    windows,
    with_kept_prefixes,
    with_prefixes,
)
from nmt.streams.nbest import NumberedLines
from nmt.streams.output import Output, open_output
from nmt.streams.records import has_records, record_line
from nmt.streams.translating import JoinedLines, translate_stream
from nmt.text.term_files import read_terms
from nmt.textfile import TextReader
from nmt.wording import counted

_NOT_OF_TEXT = ("run", "input", "output", "resume", "strict", "device", "batch_tokens", "from", "to", "tag")
"""Options and settings that do not change translations, or that `_made_by` names in another way."""
_SAMPLES = 32  # draws per line for --mbr


def parser() -> Parser:
    """Options of `nmt translate`."""
    parser = Parser(
        "translate",
        "Translate text, one sentence per line. Line n of the output translates line n of the input. A line that is "
        "too long for the model is translated in parts.",
        "  nmt translate runs/demo input.en -o output.de\n"
        "  echo 'The train leaves at 14:35.' | nmt translate demo\n"
        "  nmt translate demo input.en.gz -o output.de.gz decoding.beam_size=8 decoding.checkpoint=average\n"
        "  nmt translate demo input.jsonl -o output.jsonl --n-best 3\n"
        "  nmt translate many input.en -o output.fr --from en --to fr",
    )
    parser.add_argument(
        "input",
        nargs="?",
        default="-",
        metavar="INPUT",
        help="a file, which may be compressed with gzip, xz, zstd or bzip2 (default: standard input, whose lines are "
        "translated as soon as no more arrive)",
    )
    parser.add_output()
    parser.add_direction()
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse bytes that are not text, naming the line (default: U+FFFD replaces them, and they are counted)",
    )
    parser.add_argument(
        "--paragraphs",
        action="store_true",
        help="translate each sentence of a line by itself (default: only in lines that are too long for the model)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep complete lines in OUTPUT.part after an interruption, and resume from them if they are there",
    )
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help='input and output are JSON Lines: an object per line, whose "text" is translated (default: those whose '
        "names end in .jsonl)",
    )
    _add_results(parser)
    return parser


def _add_results(parser: Parser) -> None:
    """Add the options on more results, and on text that translations must have."""
    parser.add_argument(
        "--n-best",
        type=int,
        default=1,
        metavar="N",
        help="the N best translations of each line, or N draws; in plain text, a line each: number ||| text ||| score",
    )
    parser.add_argument(
        "--mbr",
        choices=("chrf", "bleu"),
        help="of several draws, choose the one that agrees most with all of them (minimum Bayes risk); needs "
        "decoding.temperature",
    )
    parser.add_argument("--samples", type=int, metavar="N", help=f"draws for --mbr (default: {_SAMPLES})")
    parser.add_argument(
        "--pieces", action="store_true", help="in JSON Lines: subwords of translations with their log-probabilities"
    )
    parser.add_argument(
        "--words", action="store_true", help="in JSON Lines: words of translations with their log-probabilities"
    )
    parser.add_argument(
        "--prefixes",
        metavar="FILE",
        help="begin the translation of each line with a line of FILE; a blank one leaves it free",
    )
    parser.add_argument(
        "--checks",
        metavar="FILE",
        help="write the lines with flags, what to check in them: JSON Lines with line, source, translation and flags; "
        "counts per kind are printed",
    )
    parser.add_argument(
        "--alignments",
        metavar="FILE",
        help="write which words come from which, a line for each line: 0-1 is source word 0 and output word 1 (the "
        "Pharaoh format)",
    )
    parser.add_argument(
        "--soft-alignments",
        action="store_true",
        help="in JSON Lines: these pairs of words, and the weights of all pairs",
    )
    parser.add_argument(
        "--terms",
        metavar="FILE",
        help="required translations of terms: a .tsv or .csv file of source terms and translations, or a .tbx file",
    )


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Translate `options.input` to `options.output`, window by window."""
    lines = JoinedLines(_form(options))
    alignments, flagged = AlignmentLines(), FlaggedLines()
    direction = asked_direction(options, directions_of(run, config))
    terms = read_terms(Path(options.terms), *direction) if options.terms else None
    with (
        Halt() as halt,
        open_input(options.input) as source,
        open_input(_prefixes(options)) as prefixes,
        open_output(options.output, source, prefixes, resume=options.resume) as output,
        _side_files(options, source) as beside,
    ):
        translator = Translator.load(run, config)
        # A third of the host's time for a line would go to looking again at what stays until the end.
        gc.freeze()
        aligned = "alignments" in beside or options.soft_alignments
        rank, n_best = _mbr(options, config, direction.target)
        chosen = replace(translator.options, n_best=n_best, paragraphs=options.paragraphs, alignments=aligned)
        chosen = replace(chosen, direction=direction, tag=options.tag)
        read = Source(source, halt)
        reader, blocks = _reading(options, translator.language(chosen))(read, options.input, options.strict)
        if options.prefixes:
            begun = TextReader(Source(prefixes, halt), shown(options.prefixes), strict=options.strict)
            blocks = with_prefixes(blocks, reader, begun)
        check = partial(translator.encode_prefix, options=chosen)
        blocks = with_kept_prefixes(blocks, shown(options.prefixes or options.input), check)
        if output.partial:
            output.partial.begin(_made_by(options, run, config, translator, direction))
            blocks = output.partial.rest(blocks)
            if output.partial.num_lines:
                say(f"resuming after {_lines(output.partial.num_lines)} in {output.partial.path}")
        num_before = output.partial.num_lines if output.partial else 0
        sink = Sink(output.stream, halt) if output.live else output.stream
        num_written = 0

        def write(pieces: list[Piece], found: list[Translation]) -> None:
            nonlocal num_written
            text = lines.add(pieces, found).encode()
            if output.partial:
                output.partial.write(pieces, text)
            else:
                sink.write(text)
            for name, file in beside.items():
                file.write((alignments if name == "alignments" else flagged).add(pieces, found).encode())
            num_written = lines.num_lines

        started = time.perf_counter()
        try:
            with _Progress(source, output, options.output == "-") as progress:
                translate_stream(translator, windows(blocks, read), write, halt.set, chosen, progress.tell, terms, rank)
        except BaseException as error:
            # After an error at the first new line, such as another input, the same command may never resume.
            if output.partial and output.partial.num_lines > num_before:
                say(f"{_lines(output.partial.num_lines)} kept in {output.partial.path}: the same command resumes")
            elif isinstance(error, KeyboardInterrupt):
                kept = "they were written" if output.live else f"{options.output} was not written"
                say(f"{_lines(num_written)} translated so far; {kept}")
            raise
    _report(lines, reader, translator, chosen, time.perf_counter() - started)
    if options.checks:
        say(flagged.summary())


def _report(lines: JoinedLines, reader: TextReader, translator: Translator, chosen: Options, seconds: float) -> None:
    """Print how many lines were translated, and what to check in them."""
    say(f"{_lines(lines.num_lines)} in {seconds:.1f} s ({lines.num_lines / max(seconds, 1e-9):,.1f} lines/s)")
    if note := reader.replaced():
        say(note)
    if lines.num_unlearned:
        unknown = list_characters(lines.unlearned)
        say(f"{_lines(lines.num_unlearned)} with characters that the model never saw in training, check: {unknown}")
    if lines.num_long and chosen.paragraphs:
        say(f"{_lines(lines.num_long)} translated sentence by sentence")
    elif lines.num_long:
        longest, asked = translator.max_pieces(chosen), chosen.max_source_pieces
        why = "decoding.max_source_pieces" if longest == asked else "the longest line of the training text"
        say(f"{_lines(lines.num_long)} longer than {longest} subwords ({why}) translated in parts")
    if lines.num_cut_off:
        limit = f"decoding.max_length_ratio={chosen.max_length_ratio:g}"
        limit += f", decoding.max_length={chosen.max_length}" if chosen.max_length else ""
        say(f"{_lines(lines.num_cut_off)} cut off at the maximum length ({limit}), maybe repetitive: check them")


@contextmanager
def _side_files(options: argparse.Namespace, source: BinaryIO) -> Iterator[dict[str, BinaryIO]]:
    """Open the files of --alignments and --checks, as far as they are asked for."""
    given = [(name, getattr(options, name)) for name in ("alignments", "checks") if getattr(options, name) is not None]
    taken = {os.path.realpath(options.output): "the output"}
    with ExitStack() as stack:
        opened: dict[str, BinaryIO] = {}
        for name, path in given:
            place = os.path.realpath(path)
            if place in taken:
                raise UserError(f"--{name} {path} is {taken[place]}: name another file")
            if options.resume:
                raise UserError(f"--{name} with --resume would lack the lines that are there already: leave one out")
            taken[place] = f"the file of --{name}"
            opened[name] = stack.enter_context(open_output(path, source)).stream
        yield opened


def _prefixes(options: argparse.Namespace) -> str:
    """Return the file of `--prefixes`, or an empty one."""
    if options.prefixes is None:
        return os.devnull
    if _in_records(options):
        raise UserError('--prefixes is for plain text: objects of JSON Lines have a field "prefix"')
    if options.prefixes == options.input:
        raise UserError(f"--prefixes {options.prefixes} is the input: name another file")
    return str(options.prefixes)


def _mbr(options: argparse.Namespace, config: Config, language: str) -> tuple[Rank | None, int]:
    """Return (what orders the translations of a line into `language`, None for their scores; how many there are)."""
    if options.mbr is None:
        if options.samples is not None:
            raise UserError("--samples is for --mbr: give --mbr chrf too, or --n-best for several translations")
        most = config.decoding.beam_size
        if config.decoding.temperature == 0.0 and options.n_best > most:
            raise UserError(f"--n-best {options.n_best} must be at most decoding.beam_size={most}: raise that, too")
        return None, options.n_best
    if config.decoding.temperature == 0.0:
        raise UserError("--mbr chooses among draws: set decoding.temperature=1, or another temperature")
    if options.n_best > 1:
        raise UserError("--mbr gives one translation: leave out --n-best; --samples is the number of draws")
    # Imported here because they load sacreBLEU, which takes time.
    from nmt.evaluation.mbr import by_agreement
    from nmt.evaluation.tokenizers import bleu_tokenizer

    tokenizer = bleu_tokenizer(config.evaluation.tokenize, language).name
    return by_agreement(options.mbr, tokenizer), _SAMPLES if options.samples is None else options.samples


def _made_by(
    options: argparse.Namespace, run: RunDirectory, config: Config, translator: Translator, direction: Direction
) -> dict[str, str]:
    """Return what decides the text of translations: a file is resumed only if all of it is the same."""
    models = [(run, config), *others_of(config.decoding)]
    hashes = [checkpoint.fingerprint for run, config in models for checkpoint in run.chosen(config.decoding)]
    steps = ", ".join(map(str, translator.steps))
    own = {f"--{key.replace('_', '-')}": value for key, value in vars(options).items() if key not in _NOT_OF_TEXT}
    settings = {f"decoding.{key}": value for key, value in asdict(config.decoding).items() if key not in _NOT_OF_TEXT}
    if options.terms:
        own["--terms"] += f" (sha256 {hashlib.sha256(Path(options.terms).read_bytes()).hexdigest()[:12]})"
    kind = "JSON Lines" if _in_records(options) else "text"
    made_by = {"checkpoint": f"step {steps} ({', '.join(hashes)})", "input": kind}
    if translator.directions and translator.directions.are_several:
        made_by["direction"] = str(direction)
    if options.tag:
        made_by["--tag"] = options.tag
    return made_by | {key: str(value) for key, value in (own | settings).items()}


def _in_records(options: argparse.Namespace) -> bool:
    """Return whether the input is JSON Lines."""
    return options.jsonl or has_records(options.input)


def _reading(
    options: argparse.Namespace, language: str
) -> Callable[[Source, str, bool], tuple[TextReader, Iterator[list[Piece]]]]:
    """Return the function that reads the input, whose language is `language`."""
    if _in_records(options):
        return read_records
    # A line of JSON Lines has all of its text, and so has each of several translations.
    return (
        read_whole_lines
        if has_records(options.output) or options.n_best > 1
        else partial(read_lines, language=language)
    )


def _form(options: argparse.Namespace) -> Callable[[Piece, Translation], str] | None:
    """Return the function that makes an output line; None for lines of plain text that may come in pieces."""
    if options.jsonl or has_records(options.output):
        return lambda piece, found: record_line(
            piece.record,
            piece.text,
            found.to_dict(
                hypotheses=options.n_best > 1,
                pieces=options.pieces,
                words=options.words,
                alignments=options.soft_alignments,
            ),
        )
    for name in ("pieces", "words", "soft_alignments"):
        if vars(options)[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} needs JSON Lines: name the output .jsonl, or give --jsonl")
    if options.n_best > 1:
        if options.resume:
            raise UserError("--resume with --n-best needs JSON Lines: name the output .jsonl")
        return NumberedLines()
    # The text of a record may have line breaks.
    return (lambda _piece, found: one_line(found.text)) if has_records(options.input) else None


def _lines(count: int) -> str:
    return counted(count, "line")


class _Progress:
    """A progress line on a terminal; nothing elsewhere."""

    def __init__(self, source: io.BufferedReader, output: Output, to_standard_output: bool) -> None:
        size = _size(source)
        # Not shown between lines that the user types, or between the translations.
        seen = sys.stderr.isatty() and not source.isatty() and not (to_standard_output and output.stream.isatty())
        left = "{percentage:3.0f}% {desc}, {remaining} left" if size else "{desc}"
        # If a terminal reports 0 columns and rows, tqdm would show nothing.
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
        self._started = time.perf_counter()

    def tell(self, window: Window, done: float) -> None:
        """Show that the fraction `done` of a window is translated, and everything before it."""
        lines, num_bytes = (round(before + done * (end - before)) for before, end in (window.lines, window.num_bytes))
        speed = lines / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_description_str(f"{_lines(lines)}, {speed:,.1f} lines/s", refresh=False)
        if self._bar.total:
            self._bar.n = num_bytes
        self._bar.refresh()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _size(stream: io.BufferedReader) -> int | None:
    """Return the size of a file in bytes; None for any other stream."""
    try:
        found = os.fstat(stream.fileno())
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
