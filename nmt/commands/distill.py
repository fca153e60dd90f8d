"""nmt distill: train a student on the translations of a teacher, mixed with the references.

The text is made first, in parts (nmt/students). Then the student is trained as by `nmt train`, with that text in
`corpus.mixture`. The same command resumes both.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from nmt.commands import Parser, say, show
from nmt.commands.launch import check_processes, launch, num_processes, run_together
from nmt.commands.prepare import prepare_corpus
from nmt.commands.train import check_resumable, run_of, train
from nmt.config import Config
from nmt.data.mixture import check_teacher
from nmt.decoding.directions import Directions
from nmt.errors import UserError
from nmt.process import ended_by_signals, worker
from nmt.run import RunDirectory
from nmt.students.parts import Make
from nmt.students.taught import lesson_of, lessons, only_part, taught_corpus, taught_path
from nmt.students.teacher import CHOICES, Teacher


def parser() -> Parser:
    """Options of `nmt distill`."""
    parser = Parser(
        "distill",
        "Train a student on the translations of a teacher and on the references, half and half. The teacher, a run or "
        "an exported model, first translates the training sources of the student's corpus. The settings are those of "
        "nmt train, except that decoding.* are those of the teacher's search. The same command resumes an interrupted "
        "one.",
        "  nmt distill runs/demo experiment=demo run.name=student model.moe.num_experts=0\n"
        "  nmt distill demo experiment=demo run.name=student model=small decoding.beam_size=8 --choose chrf\n"
        "  nmt distill demo experiment=demo run.name=student model=small --word-level training.teacher_weight=0.7\n"
        "  nmt distill --processes gpu demo experiment=demo run.name=student 'decoding.ensemble=[demo-32]'",
        takes_run=False,
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder of a run or an exported model, or its name in runs/")
    parser.add_argument(
        "--choose",
        choices=CHOICES,
        default="best",
        help="which translation in the teacher's beam becomes the target: the best, or the one most like the reference "
        "by chrF or BLEU (default: best)",
    )
    parser.add_argument(
        "--word-level",
        action="store_true",
        help="store the teacher's most probable subwords at each position of the new targets too, for "
        "training.teacher_weight. The teacher must have the student's vocabulary",
    )
    parser.add_argument("--only-text", action="store_true", help="make the text, print its folder and stop")
    parser.add_argument(
        "--processes",
        metavar="N|gpu",
        default="1",
        help="translate and train in N processes, or in one per GPU. The same command on other hosts that share the "
        "files helps to translate",
    )
    return parser


def distill(options: argparse.Namespace, changes: Sequence[str], config: Config, words: list[str]) -> None:
    """Make the text and train the student, whose settings `config` are composed of `words`.

    `changes` are the settings decoding.* of the teacher.
    """
    if config.corpus.mixture:
        raise UserError(
            "corpus.mixture is made by nmt distill: leave it out; for a mixture of your own, make the text with "
            "--only-text, and give its folder to nmt train"
        )
    processes = num_processes(options.processes)
    log = _say_nothing if worker() else say
    with ended_by_signals():
        run = RunDirectory.existing(options.teacher)
        own = run.config(changes)
        if not options.only_text:
            # A missing name shows before the corpus is prepared.
            run_of(config)
        prepared = prepare_corpus(config.corpus, log)
        directions = Directions.of(own, run.corpus_info(), str(run.path), str(run.corpus_path))
        directions.check(only_part(prepared).direction)
        lesson = lesson_of(prepared, run, own, options.choose, options.word_level)
        path = taught_path(prepared, lesson)
        config = _mixed(config, path)
        if not options.only_text:
            # A mistake shows at once, and not when all is translated.
            check_resumable(run_of(config), config)
            check_processes(config, processes)
            if options.word_level:
                check_teacher("--word-level stores a teacher's probabilities", config.corpus, config.training)
        if path.exists():
            log(f"{path} has the teacher's text")
        elif processes > 1:
            chosen = ["--choose", options.choose, "--only-text", *(["--word-level"] if options.word_level else [])]
            run_together(["distill", options.teacher, *words, *changes, *chosen], processes)

        def teacher() -> Make:
            return lessons(Teacher(run, own, options.choose), prepared, options.word_level)

        taught_corpus(prepared, lesson, teacher, log)
    if options.only_text:
        show(path)
        return
    words = [*words, f"corpus.mixture={{{path}: 1}}"]
    say(f"the student is trained as by {shlex.join(['nmt', 'train', *words])}")
    if processes > 1:
        launch(config, words, processes)
    else:
        show(train(config).path)


def _mixed(config: Config, path: Path) -> Config:
    """Return the settings with a taught corpus mixed in, as many pairs of it as of the references."""
    settings = config.to_dict()
    settings["corpus"]["mixture"] = {str(path): 1.0}
    return Config.from_dict(settings)


def _say_nothing(_line: str) -> None:
    pass
