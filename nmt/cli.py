"""The command line: nmt prepare | train | translate | score | evaluate | compare | experts | export | cost.

Results go to standard output, everything else to standard error. A user's mistake is reported in one line: status 2 for
usage and configuration, 3 for text, 4 for a run, checkpoint or vocabulary.
"""

import difflib
import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Set before PyTorch is loaded: waiting OpenMP threads should sleep soon. Spinning made training ten times slower on
# shared cores; never spinning makes it slower by a third on unshared ones.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN keeps the code of its last 1,024 products, one per shape. A search has thousands, and they took 300 MB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
# PyTorch warns in each process that it finds no unused parameters; nmt/training/update.py explains why it looks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import nmt
from nmt.commands import ON_RUNS, ON_SYSTEMS, PLAIN, is_setting, say, show
from nmt.errors import CheckpointError, ProcessError, UserError, exit_status
from nmt.extras import named_extras
from nmt.process import ended_by_signals, launched, launched_rank
from nmt.wording import counted

# Commands import what they need themselves, so that a help text does not wait for PyTorch.
if TYPE_CHECKING:
    from nmt.compose import Asked, Job
    from nmt.config import Config

# A process that does not report a mistake gives the main one this long to do so.
_REPORTING_SECONDS = 2.0

_USAGE = """\
usage: nmt COMMAND ...

  nmt prepare corpus=NAME [key=value ...]        read, filter and encode a corpus
  nmt train [--processes N|gpu] experiment=NAME [key=value ...]
                                                 train a new run, or resume it
  nmt train RUN [key=value ...]                  resume a run with its own settings
  nmt distill TEACHER experiment=NAME [key=value ...]
                                                 train a student on a teacher's translations
  nmt translate RUN [INPUT] [-o OUTPUT] [decoding.key=value ...]
                                                 translate a file, line by line
  nmt score RUN SOURCE TARGET [-o OUTPUT]        log-probability of given translations, line by line
  nmt evaluate RUN [--source F --reference F] [decoding.key=value ...]
                                                 BLEU, chrF and perplexity of test sets
  nmt compare A B [C ...] [--source F --reference F]
                                                 translations of several runs or files, side by side
  nmt experts RUN                                how the experts share the work
  nmt export RUN DIR [decoding.checkpoint=..]    one folder to share: parameters, vocabulary, model card
  nmt cost experiment=NAME [key=value ...] | RUN cost of training: operations, memory, time
  nmt runs [FOLDER]                              every run: state, step, best score, size
  nmt settings [PREFIX | GROUP]                  every setting: key, type, default, meaning; choices of a group
  nmt completion bash|zsh|fish                   completion for your shell
  nmt --version

nmt COMMAND --help shows examples. RUN is the folder of a run or of an exported model, or a name in runs/.
"""

_TRAIN_HELP = """\
usage: nmt train [--processes N|gpu] experiment=NAME [key=value ...]
       nmt train [--processes N|gpu] RUN [key=value ...]

Train a new run in runs/NAME, or resume it from its newest checkpoint if it exists. With RUN, the run's own settings
are used and need not be given again. The corpus is prepared first if necessary.
Experiments, which `nmt settings experiment` describes: {experiments}.

  nmt train experiment=demo
  nmt train runs/demo training.max_steps=1400
  nmt train experiment=europarl_en_fr_moe_32 run.name=try1 training.max_steps=1000
  nmt train experiment=demo run.name='demo-${{model.moe.num_experts}}' --multirun model.moe.num_experts=4,8,16
  nmt train --processes gpu experiment=wmt14_en_de_moe_32

--processes gpu trains on all GPUs of this host, with one process per GPU; --processes 2 trains in two processes. On
several hosts, start `-m nmt.cli train ...` with torchrun (scripts/slurm.sh).
"""

_SETTINGS_HELP = """
`nmt settings` prints all settings, their defaults and what they mean. corpus=mine reads conf/corpus/mine.yaml in the
working directory; conf/experiment, model, training and decoding work in the same way.

  --config-dir DIR   also look in DIR, before conf/ in the working directory
  --multirun         run every combination of comma-separated values, one after the other
  --cfg job          print all settings and stop
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    _secure_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "prepare": _prepare,
        "train": _train,
        "distill": _distill,
        **{name: partial(_run_command, name) for name in ON_RUNS},
        "cost": _cost,
        **{name: partial(_plain_command, name) for name in (*ON_SYSTEMS, *PLAIN)},
        "settings": _settings,
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
        # Training handles signals itself: it saves before it ends.
        ending = nullcontext() if arguments[0] in ("train", "distill") else ended_by_signals()
        with ending, named_extras(f"nmt {arguments[0]}"):
            commands[arguments[0]](arguments[1:])
            sys.stdout.flush()
    except ValueError as error:
        if launched_rank() != 0 and not isinstance(error, ProcessError):
            # All processes find the same mistake; only the main one reports it. The launcher ends all processes as soon
            # as one has ended, which must not be before that.
            time.sleep(_REPORTING_SECONDS)
            return exit_status(error)
        return _complain(str(error), exit_status(error))
    except BrokenPipeError as error:
        # The reader of the output has closed it (| head), which is not an error.
        _abandon_output()
        return exit_status(error)
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
    """Reserve the descriptors of closed standard streams, and print characters that an encoding lacks as escapes.

    Otherwise, files opened later could get these descriptors. A closed input is opened for writing and a closed output
    for reading, so that using it is an error and nothing is lost silently. Output to a closed standard error is
    discarded.
    """
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        # open returns the lowest free descriptor: this one.
        os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _abandon_output() -> None:
    """Discard the output that is still buffered, which would fail again at the end of the program."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------- commands on settings


def _asked(command: str, arguments: list[str], own_options: str = "") -> "Asked":
    """Return what the arguments ask to compose. UserError for an option that the command does not have."""
    from nmt.compose import OPTIONS, asked

    request = asked(arguments)
    for word in request.words:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}; nmt {command} takes {own_options}{OPTIONS} and --help")
    return request


def _do(request: "Asked", job: Callable[["Job"], None]) -> None:
    """Call `job` for each configuration of a request, or print it with --cfg job."""
    from nmt.compose import jobs, settings_text

    # All configurations are composed first, so that a mistake in the last one is found before the first job starts.
    for each in jobs(request):
        if request.only_print:
            print(settings_text(each.config), end="")
        else:
            job(each)


def _names_run(request: "Asked") -> bool:
    """Return True if the first word is a run: a name or a path, which may contain =.

    A word that is not a run but almost a setting, such as `demo` for `experiment=demo`, is left to composing, which
    rejects it. UserError for a run with options of composing.
    """
    from nmt.compose import OPTIONS, Asked, meant

    first = request.words[0] if request.words else "="
    if _is_change(first):
        return False
    if meant(first) and not any(path.exists() for path in (Path(first), Path("runs") / first)):
        return False
    if request != Asked(request.words):
        raise UserError(f"{OPTIONS} are for settings: {first} is a run")
    return True


def _is_change(word: str) -> bool:
    """Return True for a word such as KEY=VALUE or +KEY=VALUE, which cannot be a run."""
    key, equals, _ = word.partition("=")
    return word.startswith(("+", "~")) or (bool(equals) and "/" not in key)


def _help(text: str, arguments: list[str]) -> bool:
    """Print `text` as help if the arguments ask for help. Return True if they do."""
    if not {"-h", "--help"} & set(arguments):
        return False
    from nmt.compose import choices_text

    print(text.format(corpora=choices_text("corpus"), experiments=choices_text("experiment")) + _SETTINGS_HELP, end="")
    return True


def _prepare(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        from nmt.commands.prepare import HELP

        _help(HELP, arguments)
        return
    wanted, arguments = _take_option("--processes", arguments)
    scores, arguments = _take_option("--scores", arguments)

    def job(job: "Job") -> None:
        from nmt.commands.prepare import num_processes, run

        run(job.config.corpus, num_processes(wanted), scores)

    _do(_asked("prepare", arguments, "--processes N, --scores FILE, "), job)


def _train(arguments: list[str]) -> None:
    if _help(_TRAIN_HELP, arguments):
        return
    wanted, arguments = _take_option("--processes", arguments)
    processes = 1
    if wanted is not None:
        from nmt.commands.launch import num_processes

        processes = num_processes(wanted)

    def begin(config: "Config", words: list[str]) -> None:
        # Imported here because it takes seconds; mistakes in settings are reported first.
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


def _distill(arguments: list[str]) -> None:
    """Run `nmt distill` on a teacher and on settings as for `nmt train`, except for decoding.*: the teacher's."""
    from nmt.commands import distill
    from nmt.compose import asked

    parser = distill.parser()
    request = asked(arguments)
    given, words = parser.sort(request.words)
    if words and _is_change(words[0]):
        raise UserError(f"{words[0]}: the teacher comes first, as in nmt distill RUN {words[0]}")
    options = parser.parse_args([*given, "--", *words[:1]])
    changes = [word for word in words[1:] if word.startswith("decoding.")]
    settings = [word for word in words[1:] if word not in changes]
    _do(
        request._replace(words=settings),
        lambda job: distill.distill(options, changes, job.config, job.arguments),
    )


def _take_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return (value of an option or None, the other arguments)."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            value, rest = argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
        elif argument == name:
            if index + 1 == len(arguments):
                raise UserError(f"{name} needs a value")
            value, rest = arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        else:
            continue
        if any(each == name or each.startswith(f"{name}=") for each in rest):
            raise UserError(f"{name} is given twice: give it once")
        return value, rest
    return None, arguments


# --------------------------------------------------------------------------------------------------- commands on runs


def _run_command(command: str, arguments: list[str]) -> None:
    """Run a command on a trained run, with its options and the run's configuration with key=value changes."""
    module = import_module(f"nmt.commands.{command}")
    parser = module.parser()
    given, words = parser.sort(arguments)
    settings = [word for word in words if is_setting(word)]
    options = parser.parse_args([*given, "--", *(word for word in words if word not in settings)])

    if options.run is None:
        # nmt evaluate scores translations made elsewhere.
        if settings:
            raise UserError(f"{settings[0]}: without RUN, there are no settings")
        from nmt.config import Config

        module.run(options, None, Config())
        return
    from nmt.run import RunDirectory

    run = RunDirectory.existing(options.run)
    config = run.config(settings)
    if config.decoding.ensemble and command in ("experts", "export"):
        raise UserError(f"nmt {command} takes one model, not an ensemble: give decoding.ensemble=[]")
    if command in ON_RUNS and config.decoding.checkpoint == "average":
        there, wanted = len(run.chosen(config.decoding)), config.decoding.average_checkpoints
        if there < wanted:
            say(f"decoding.average_checkpoints={wanted}: {run.path} has only {counted(there, 'checkpoint')}")
    module.run(options, run, config)


def _plain_command(command: str, arguments: list[str]) -> None:
    """Run a command that reads its runs and settings, if it takes any, itself."""
    module = import_module(f"nmt.commands.{command}")
    parser = module.parser()
    given, words = parser.sort(arguments)
    module.run(parser.parse_args([*given, "--", *words]))


def _settings(arguments: list[str]) -> None:
    from nmt.commands import settings

    parser = settings.parser()
    given, words = parser.sort(arguments)
    settings.run(parser.parse_args([*given, "--", *words]), _composed_alone)


def _composed_alone(word: str, folder: Path | None) -> "Config | None":
    """Return the configuration of one word. None if it needs a run, or if Hydra is not installed, which composes."""
    try:
        from nmt.compose import Asked, NoNetworkError, jobs
    except ImportError:
        return None
    try:
        # That a file hides another one is reported when it is used.
        with redirect_stderr(io.StringIO()):
            [job] = jobs(Asked([word], folder))
    except (NoNetworkError, CheckpointError):
        return None
    return job.config


def _cost(arguments: list[str]) -> None:
    """Run `nmt cost` on a run, or on settings as for `nmt train`."""
    from nmt.commands import cost

    parser = cost.parser()
    given, words = parser.sort(arguments)
    if words and not _is_change(words[0]) and {each for each in given if each.startswith("-")} <= {*parser.options()}:
        places = (Path(words[0]), Path("runs") / words[0])
        if any((place / "config.yaml").exists() for place in places):
            # A run needs no composing, and so no Hydra, which may not be installed where models are only used.
            _run_command("cost", arguments)
            return
    from nmt.compose import asked

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
    """Run `main` as a program, and exit with its status."""
    if launched():
        _main_of_several()
    sys.exit(main())


def _main_of_several() -> NoReturn:
    """Run `main` in a process that torchrun started, and exit with its status whatever happened to other processes.

    After an error, threads of PyTorch may still be running. Python's normal exit then sometimes aborts the process with
    a signal ("terminate called without an active exception").
    """
    try:
        status = main()
    except SystemExit:
        raise  # the run was stopped and has saved
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
