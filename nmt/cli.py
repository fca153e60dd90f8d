"""The command line: nmt prepare | train | translate | evaluate | experts | export | cost.

Results go to standard output, everything else to standard error. A mistake of the user's is told in one line: status 2
for usage and configuration, 3 for text, 4 for a run, checkpoint or vocabulary.
"""

import difflib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Before PyTorch is loaded: OpenMP threads that wait should soon sleep. Spinning on shared cores made training ten times
# slower; never spinning costs a third on cores of one's own.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# PyTorch warns every process that we look for unused parameters without having any; nmt/training/update.py says why.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import nmt
from nmt.commands import ON_RUNS, PLAIN, is_setting, say, show
from nmt.errors import ProcessError, UserError, exit_status
from nmt.extras import named_extras
from nmt.process import ended_by_signals, launched, launched_rank

# What only some commands need is loaded by them: nobody should wait for PyTorch to read a help text.
if TYPE_CHECKING:
    from nmt.compose import Asked, Job
    from nmt.config import Config

_USAGE = """\
usage: nmt COMMAND ...

  nmt prepare corpus=NAME [key=value ...]        read, filter and encode a corpus
  nmt train [--processes N|gpu] experiment=NAME [key=value ...]
                                                 train a new run, or resume it
  nmt train RUN [key=value ...]                  resume a run with its own settings
  nmt translate RUN [INPUT] [-o OUTPUT] [decoding.key=value ...]
                                                 translate a file, line by line
  nmt evaluate RUN [--source F --reference F] [decoding.key=value ...]
                                                 BLEU, chrF and perplexity of a test set
  nmt experts RUN                                how the experts share the work
  nmt export RUN DIR [decoding.checkpoint=..]    one folder to hand on: parameters, vocabulary, model card
  nmt cost experiment=NAME [key=value ...] | RUN what training takes: operations, memory, time
  nmt runs [FOLDER]                              every run: state, step, best score, size
  nmt settings [PREFIX]                          every setting: key, type, default, meaning
  nmt completion bash|zsh|fish                   completion for your shell
  nmt --version

nmt COMMAND --help shows examples. RUN is the folder of a run, or its name in runs/; an exported folder does as well.
"""

_PREPARE_HELP = """\
usage: nmt prepare corpus=NAME [key=value ...]

Read sentence pairs, filter them, learn the subword vocabulary and write everything to data/prepared/. What is done
already is not done again. Corpora: {corpora}.

  nmt prepare corpus=phrasebook
  nmt prepare corpus=phrasebook corpus.target_language=fr
  nmt prepare corpus=multi30k_en_de corpus.root=/data/multi30k
  nmt prepare corpus=wmt14_en_de corpus.subwords.vocab_size=16000
  nmt prepare corpus=files corpus.name=mine 'corpus.train.pairs=[a.tsv]' corpus.dev.from_train=2000
  nmt prepare corpus=files corpus.name=mine 'corpus.train.source=[a.en,b.en]' 'corpus.train.target=[a.de,b.de]' \\
      'corpus.dev.source=[c.en]' 'corpus.dev.target=[c.de]'
"""

_TRAIN_HELP = """\
usage: nmt train [--processes N|gpu] experiment=NAME [key=value ...]
       nmt train [--processes N|gpu] RUN [key=value ...]

Train a new run in runs/NAME, or resume it from its newest checkpoint if it is there already. With RUN, the run's own
settings are used and need not be given again. The corpus is prepared first if necessary.
Experiments: {experiments}.

  nmt train experiment=demo
  nmt train runs/demo training.max_steps=1400
  nmt train experiment=europarl_en_fr_moe_32 run.name=try1 training.max_steps=1000
  nmt train experiment=demo run.name='demo-${{model.moe.num_experts}}' --multirun model.moe.num_experts=4,8,16
  nmt train --processes gpu experiment=wmt14_en_de_moe_32

--processes gpu trains on all GPUs of this host, one process on each; --processes 2 in two processes. Over several
hosts, torchrun starts `-m nmt.cli train ...` (scripts/slurm.sh).
"""

_SETTINGS_HELP = """
`nmt settings` prints all settings, their defaults and what they mean. A file conf/corpus/mine.yaml in the working
directory is corpus=mine; the same goes for conf/experiment, model, training and decoding.

  --config-dir DIR   look in DIR too, before conf/ of the working directory
  --multirun         take every combination of values that have commas in between, one after the other
  --cfg job          print all settings and stop
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    _secure_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "prepare": _prepare,
        "train": _train,
        **{name: partial(_run_command, name) for name in ON_RUNS},
        "cost": _cost,
        **{name: partial(_plain_command, name) for name in PLAIN},
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_USAGE, end="", flush=True)
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(f"nmt {nmt.__version__}", flush=True)
            return 0
        if arguments[0] not in commands:
            close = difflib.get_close_matches(arguments[0], commands, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"unknown command {arguments[0]!r}{hint} Commands: {', '.join(commands)}")
        # Training has its own way to end: it saves first.
        ending = nullcontext() if arguments[0] == "train" else ended_by_signals()
        with ending, named_extras(f"nmt {arguments[0]}"):
            commands[arguments[0]](arguments[1:])
            sys.stdout.flush()
    except ValueError as error:
        if launched_rank() != 0 and not isinstance(error, ProcessError):
            # Every process finds the same mistake; the main one tells it.
            return exit_status(error)
        return _complain(str(error), exit_status(error))
    except BrokenPipeError:
        # The reader of our output went away (| head): nothing is wrong, and nobody is there to tell.
        _abandon_output()
        return 141
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", exit_status(error))
    except OSError as error:
        if error.errno == errno.EBADF and error.filename is None:
            _abandon_output()
            return _complain("standard input or output is closed", exit_status(error))
        return _complain(f"{error.filename or 'I/O'}: {error.strerror or error}", exit_status(error))
    return 0


def _complain(message: str, status: int) -> int:
    say("nmt: " + " ".join(message.split()))
    return status


def _secure_standard_streams() -> None:
    """Keep files that are opened later off the numbers of streams that are closed, and print what a terminal cannot.

    A closed input or output is opened the wrong way round, so that using it is an error and loses nothing unseen; what
    goes to a closed standard error is nobody's. Characters that an encoding lacks are printed as escapes.
    """
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        # The lowest number that is free is taken: this one.
        os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _abandon_output() -> None:
    """What is still to be written goes nowhere, instead of failing once more at the end of the program."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------- commands on settings


def _asked(command: str, arguments: list[str], own_options: str = "") -> "Asked":
    """What the arguments ask to compose. UserError for an option that the command does not have."""
    from nmt.compose import OPTIONS, asked

    request = asked(arguments)
    for word in request.words:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}; nmt {command} takes {own_options}{OPTIONS} and --help")
    return request


def _do(request: "Asked", job: Callable[["Job"], None]) -> None:
    """Do `job` for each configuration that is asked for."""
    from nmt.compose import jobs, settings_text

    # Mistakes in the last of several are found before the first begins.
    for each in jobs(request):
        if request.only_print:
            print(settings_text(each.config), end="")
        else:
            job(each)


def _names_run(request: "Asked") -> bool:
    """Whether the first word is a run and no setting: a name, or a path, which may have = in it.

    What is no run but almost a setting, such as `demo` for `experiment=demo`, is left for composing to refuse.
    UserError if options of composing come with a run.
    """
    from nmt.compose import OPTIONS, Asked, meant

    first = request.words[0] if request.words else "="
    key, equals, _ = first.partition("=")
    if first.startswith(("+", "~")) or (equals and "/" not in key):
        return False
    if meant(first) and not any(path.exists() for path in (Path(first), Path("runs") / first)):
        return False
    if request != Asked(request.words):
        raise UserError(f"{OPTIONS} are for settings: {first} is a run")
    return True


def _help(text: str, arguments: list[str]) -> bool:
    """Whether help is asked for; prints it then."""
    if not {"-h", "--help"} & set(arguments):
        return False
    from nmt.compose import choices

    print(text.format(corpora=choices("corpus"), experiments=choices("experiment")) + _SETTINGS_HELP, end="")
    return True


def _prepare(arguments: list[str]) -> None:
    if _help(_PREPARE_HELP, arguments):
        return

    def job(job: "Job") -> None:
        from nmt.data.prepare import prepare

        show(prepare(job.config.corpus, say).path)

    _do(_asked("prepare", arguments), job)


def _train(arguments: list[str]) -> None:
    if _help(_TRAIN_HELP, arguments):
        return
    wanted, arguments = _take_option("--processes", arguments)
    processes = 1
    if wanted is not None:
        from nmt.commands.launch import num_processes

        processes = num_processes(wanted)

    def begin(config: "Config", words: list[str]) -> None:
        # Imported here because it takes seconds: mistakes in settings are reported first.
        if processes > 1:
            from nmt.commands.launch import launch

            launch(config, words, processes)
            return
        from nmt.commands.train import train

        run = train(config)
        if launched_rank() == 0:
            show(run.path)

    request = _asked("train", arguments, "--processes N|gpu, ")
    if _names_run(request):
        from nmt.run import RunDirectory

        name, *changes = request.words
        begin(RunDirectory.existing(name).training_config(changes), request.words)
    else:
        _do(request, lambda job: begin(job.config, job.arguments))


def _take_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """(value of an option of ours, what is left)."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
        if argument == name:
            if index + 1 == len(arguments):
                raise UserError(f"{name} needs a value")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


# --------------------------------------------------------------------------------------------------- commands on runs


def _run_command(command: str, arguments: list[str]) -> None:
    """A command on a trained run: its options, the run, and the run's configuration with key=value changes applied."""
    module = import_module(f"nmt.commands.{command}")
    parser = module.parser()
    given, words = parser.sort(arguments)
    settings = [word for word in words if is_setting(word)]
    options = parser.parse_args([*given, "--", *(word for word in words if word not in settings)])

    from nmt.run import RunDirectory

    run = RunDirectory.existing(options.run)
    module.run(options, run, run.config(settings))


def _plain_command(command: str, arguments: list[str]) -> None:
    """A command that needs no run and no configuration."""
    module = import_module(f"nmt.commands.{command}")
    module.run(module.parser().parse_args(arguments))


def _cost(arguments: list[str]) -> None:
    """Of a run, or of settings as `nmt train` takes them."""
    from nmt.commands import cost
    from nmt.compose import asked

    parser = cost.parser()
    request = asked(arguments)
    given, words = parser.sort(request.words)
    if not words or _names_run(request._replace(words=words)):
        _run_command("cost", request.words)
        return
    options, unknown = parser.parse_known_args([*given, words[0]])
    for option in unknown:
        parser.error(f"unknown option {option}")
    _do(request._replace(words=words), lambda job: cost.estimate(options, job.config))


def program() -> NoReturn:
    """`main` as a program of its own, which ends with its status."""
    if launched():
        _main_of_several()
    sys.exit(main())


def _main_of_several() -> NoReturn:
    """`main` in a process that torchrun started: it ends with main's status whatever state the others left it in.

    After an error, threads of PyTorch's that nobody could stop are still there, and Python's way out would now and then
    abort the process with a signal instead ("terminate called without an active exception").
    """
    try:
        status = main()
    except SystemExit:
        raise  # from a run that was stopped, in good order
    except BaseException:
        traceback.print_exc()
        status = 1
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    program()
