"""nmt prepare: prepare a corpus with a progress bar and a report, or write what its rules measure in each pair."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from nmt.commands import say, show
from nmt.config import CorpusConfig
from nmt.corpus.sources import source_files
from nmt.data.prepared import Prepared
from nmt.errors import DataError, StorageError, UserError
from nmt.pages.preparation import preparation_pages, write_preparation
from nmt.preparation.prepare import prepare
from nmt.preparation.progress import Stages
from nmt.preparation.report import REPORT
from nmt.preparation.scores import write_scores
from nmt.preparation.splits import texts_of_files
from nmt.preparation.workers import available_cores
from nmt.streams.output import open_output
from nmt.terminal import printable
from nmt.textfile import open_input

HELP = """\
usage: nmt prepare corpus=NAME [--processes N] [key=value ...]
       nmt prepare corpus=NAME --scores FILE [key=value ...]

Read sentence pairs, filter them, learn the subword vocabulary and write everything to data/prepared/, with a report.
Work that was done before is not repeated. The same command resumes an interrupted one.
Corpora: {corpora}.

  nmt prepare corpus=phrasebook
  nmt prepare corpus=phrasebook corpus.target_language=fr
  nmt prepare corpus=phrasebook 'corpus.directions=[en-de,de-en,en-fr,fr-en]'
  nmt prepare corpus=multi30k_en_de corpus.root=/data/multi30k
  nmt prepare corpus=wmt14_en_de corpus.subwords.vocab_size=16000
  nmt prepare corpus=files corpus.name=mine 'corpus.train.pairs=[a.tsv]' corpus.dev.from_train=2000
  nmt prepare corpus=files corpus.name=mine 'corpus.train.source=[a.en,b.en]' 'corpus.train.target=[a.de,b.de]' \\
      'corpus.dev.source=[c.en]' 'corpus.dev.target=[c.de]'
  nmt prepare corpus=phrasebook --scores scores.tsv

--processes N      share the work among N processes (default: one per core). The result does not depend on N
--scores FILE      prepare nothing, but write what each rule of corpus.filters measures in each pair, to choose
                   thresholds by; compressed if FILE ends in .gz, .xz, .zst or .bz2; - is standard output
"""
_BAR_SECONDS = 0.3


def num_processes(wanted: str | None) -> int:
    """Return the number that --processes asks for: one per core if it is not given. UserError for another word."""
    if wanted is None:
        return available_cores()
    if not (wanted.isascii() and wanted.isdigit() and int(wanted) > 0):
        raise UserError(f"--processes {wanted} must be a number of at least 1")
    return int(wanted)


def run(corpus: CorpusConfig, processes: int, scores: str | None) -> None:
    """Run `nmt prepare` with these options."""
    if scores is not None:
        _write_scores(corpus, scores, processes)
        return
    prepared = prepare_corpus(corpus, say, processes)
    show(prepared.path)
    from nmt.data.mixture import Corpora  # loads PyTorch, which preparing does not need

    try:
        Corpora(corpus, prepared)
    except DataError as error:
        say(f"only {corpus.name} was prepared, and training would be refused: {error}")


def prepare_corpus(corpus: CorpusConfig, log: Callable[[str], None], processes: int = 0) -> Prepared:
    """Prepare a corpus as `nmt.preparation.prepare.prepare` does, with a progress bar on a terminal, and report on it.

    The pages of the report are written if there are none yet. A report that cannot be written stops nobody from
    training: `log` has the reason.
    """
    with _progress(corpus.name, log) as (stages, above):
        prepared = prepare(corpus, above, processes, stages)
    if not (prepared.path / REPORT).exists():  # of an older version
        return prepared
    pages = preparation_pages(prepared.path)
    try:
        if not all(page.exists() for page in pages):
            write_preparation(prepared.path)
        log(f"{corpus.name}: report: {pages[0]}")
    except (DataError, StorageError) as error:
        log(f"{corpus.name}: there are no pages of its report: {error}")
    return prepared


@contextmanager
def _progress(name: str, log: Callable[[str], None]) -> Iterator[tuple[Stages, Callable[[str], None]]]:
    """Yield (stages that show their progress, a log that leaves it in place)."""
    if log is not say or not sys.stderr.isatty():
        yield Stages(lambda line, _share: log(f"{name}: {line}")), log
        return
    # If a terminal reports 0 columns, tqdm would show nothing.
    columns, _ = shutil.get_terminal_size()
    with tqdm(total=100, bar_format="{desc} |{bar}|", leave=False, file=sys.stderr, ncols=columns, disable=None) as bar:

        def shown(line: str, share: float | None) -> None:
            bar.n = round(100 * (share or 0.0))
            bar.set_description_str(printable(f"{name}: {line}"))

        yield (
            Stages(shown, _BAR_SECONDS),
            lambda line: bar.write(printable(line), file=sys.stderr),
        )


def _write_scores(corpus: CorpusConfig, path: str, processes: int) -> None:
    if not path:
        raise UserError("--scores needs the name of a file, or - for standard output")
    with ExitStack() as held:
        # None of these files may be the output.
        sources = [held.enter_context(open_input(source, "corpus")) for source in source_files(corpus)]
        output = held.enter_context(open_output(path, *sources))
        stages, above = held.enter_context(_progress(corpus.name, say))
        held_out = texts_of_files(corpus)
        for line in write_scores(corpus, held_out, output.stream, processes, stages.begin("scores")):
            above(line)
    if not output.live:
        show(path)
