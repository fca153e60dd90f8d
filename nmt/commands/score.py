"""nmt score: the log-probability of given translations, line by line."""

import argparse
import json
import math
import time
from dataclasses import replace

from nmt.commands import Parser, say
from nmt.commands.direction import asked_direction, directions_of
from nmt.config import Config
from nmt.data.held_out import LONGEST_SIDE
from nmt.decoding.scoring import PairScore, perplexity_per
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.run import RunDirectory
from nmt.streams.halt import Halt, Sink, Source
from nmt.streams.lines import open_input, shown
from nmt.streams.output import open_output
from nmt.streams.pairs import pair_windows, score_stream
from nmt.streams.records import has_records
from nmt.textfile import TextReader
from nmt.wording import counted

_COLUMNS = ("log_prob", "word_perplexity")


def parser() -> Parser:
    """Options of `nmt score`."""
    parser = Parser(
        "score",
        "Print log P(target | source), in nats, and the perplexity per word of each pair of lines: two columns, "
        "separated by a tab. Line n of the output is for line n of both files.",
        "  nmt score runs/demo input.en translation.de\n"
        "  nmt score demo corpus.en.gz corpus.de.gz -o scores.tsv.gz --header\n"
        "  nmt score demo input.en translation.de -o scores.jsonl --words\n"
        "  nmt score many input.en translation.fr --from en --to fr",
    )
    parser.add_argument("source", metavar="SOURCE", help="a file as for nmt translate; - is standard input")
    parser.add_argument("target", metavar="TARGET", help="the translations, line by line")
    parser.add_output()
    parser.add_direction()
    parser.add_argument(
        "--words",
        action="store_true",
        help="a third column: log-probabilities of the words of TARGET, which blanks separate, and of its end",
    )
    parser.add_argument("--header", action="store_true", help="begin with a line that names the columns")
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help="JSON Lines instead of columns: an object per pair (default: if OUTPUT ends in .jsonl)",
    )
    parser.add_argument("--strict", action="store_true", help="refuse bytes that are not text, naming the line")
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Score the pairs of `options.source` and `options.target`, window by window."""
    if options.source == options.target == "-":
        raise UserError("SOURCE and TARGET cannot both be standard input: name a file for one of them")
    records = options.jsonl or has_records(options.output)
    if records and options.header:
        raise UserError("--header is for columns: the objects of JSON Lines name their fields")
    direction = asked_direction(options, directions_of(run, config))
    total = _Total()
    with (
        Halt() as halt,
        open_input(options.source) as source,
        open_input(options.target) as target,
        open_output(options.output, source, target) as output,
    ):
        translator = Translator.load(run, config)
        readers = [
            TextReader(Source(stream, halt), shown(path), strict=options.strict)
            for stream, path in ((source, options.source), (target, options.target))
        ]
        sink = Sink(output.stream, halt) if output.live else output.stream
        if options.header:
            sink.write(("\t".join([*_COLUMNS, *["word_log_probs"] * options.words]) + "\n").encode())

        def write(scores: list[PairScore]) -> None:
            lines = [_record(each, options.words) if records else _row(each, options.words) for each in scores]
            sink.write("".join(f"{line}\n" for line in lines).encode())
            total.add(scores)

        started = time.perf_counter()
        chosen = replace(translator.options, direction=direction, tag=options.tag)
        score_stream(translator, pair_windows(*readers), write, halt.set, chosen)
    total.report(time.perf_counter() - started)
    for reader in readers:
        if note := reader.replaced():
            say(f"{reader.name}: {note}")


class _Total:
    """Counts and sums of all pairs."""

    def __init__(self) -> None:
        self.pairs = self.pieces = self.words = self.cut = 0
        self.log_prob = 0.0

    def add(self, scores: list[PairScore]) -> None:
        """Count some pairs."""
        self.pairs += len(scores)
        self.pieces += sum(len(each.pieces) for each in scores)
        self.words += sum(len(each.words) for each in scores)
        self.cut += sum(not each.complete for each in scores)
        self.log_prob += math.fsum(each.log_prob for each in scores)

    def report(self, seconds: float) -> None:
        """Print speed, perplexity, and how many pairs were too long."""
        say(f"{counted(self.pairs, 'pair')} in {seconds:.1f} s ({self.pairs / max(seconds, 1e-9):,.1f} pairs/s)")
        if self.pairs:
            per_piece, per_word = (perplexity_per(self.log_prob, count) for count in (self.pieces, self.words))
            say(f"perplexity {per_piece:,.3f} per subword, {per_word:,.2f} per word")
        if self.cut:
            long = f"more than {LONGEST_SIDE:,} subwords on a side"
            say(f"{counted(self.cut, 'pair')} with {long}: only the beginning was scored")


def _row(score: PairScore, words: bool) -> str:
    """Return the columns of a pair."""
    columns = [f"{score.log_prob:.6f}", f"{score.word_perplexity:.6g}"]
    if words:
        columns.append(" ".join(f"{each.log_prob:.6f}" for each in score.words))
    return "\t".join(columns)


def _record(score: PairScore, words: bool) -> str:
    return json.dumps(score.to_dict(words=words), ensure_ascii=False)
