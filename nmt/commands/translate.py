"""nmt translate: a file, line by line."""

import argparse
import time
from collections import Counter

from nmt.commands import Parser, say
from nmt.config import Config
from nmt.data.subwords import list_characters
from nmt.decoding.lines import LineReader, open_input, open_output
from nmt.decoding.translator import Translator
from nmt.run import RunDirectory


def parser() -> Parser:
    """Options of `nmt translate`."""
    parser = Parser(
        "translate",
        "Translate text, one sentence a line; line n of the output translates line n of the input.",
        "  nmt translate runs/demo input.en -o output.de\n"
        "  echo 'The train leaves at 14:35.' | nmt translate demo\n"
        "  nmt translate demo input.en decoding.beam_size=8 decoding.checkpoint=average",
    )
    parser.add_argument("input", nargs="?", default="-", metavar="INPUT", help="a file (default: standard input)")
    parser.add_argument("-o", "--output", default="-", metavar="OUTPUT", help="a file (default: standard output)")
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Translate `options.input` to `options.output`, window by window."""
    with open_input(options.input) as stream, open_output(options.output, options.input) as output:
        translator = Translator.load(run, config)
        reader = LineReader(stream, window=32 * config.decoding.batch_sentences)
        started = time.perf_counter()
        unlearned: Counter[str] = Counter()
        num_unlearned = 0
        for window in reader:
            translations = translator.translate(window)
            output.write("".join(f"{translation.text}\n" for translation in translations).encode())
            output.flush()
            for translation in translations:
                unlearned.update(translation.unlearned)
                num_unlearned += bool(translation.unlearned)
    seconds = time.perf_counter() - started
    say(f"{reader.num_lines:,} lines in {seconds:.1f} s ({reader.num_lines / max(seconds, 1e-9):,.1f} lines/s)")
    if reader.num_invalid:
        say(f"{reader.num_invalid:,} lines held bytes that are not UTF-8; they were replaced by U+FFFD")
    if num_unlearned:
        say(
            f"{num_unlearned:,} lines held characters that are unknown to the model, check these lines: "
            f"{list_characters(unlearned)}"
        )
    if translator.num_long_lines:
        limit = config.decoding.max_source_pieces
        say(f"{translator.num_long_lines:,} lines had more than {limit} pieces; they were translated in parts")
