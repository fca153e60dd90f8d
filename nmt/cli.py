"""The command line: nmt prepare | train | translate | evaluate | experts | export | cost.

The only file that knows Hydra. Results go to standard output, everything else to standard error. A mistake of the
user's is told in one line: status 2 for usage and configuration, 3 for text, 4 for a run, checkpoint or vocabulary.
"""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn

# Before PyTorch is loaded: OpenMP threads that wait should soon sleep. Spinning on shared cores made training ten times
# slower; never spinning costs a third on cores of one's own.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# PyTorch warns every process that we look for unused parameters without having any; nmt/training/update.py says why.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmt.commands import say
from nmt.config import Config
from nmt.errors import CheckpointError, ProcessError, UserError, exit_status
from nmt.resources import resource_dir
from nmt.run import RunDirectory, flatten

_USAGE = """\
usage: nmt COMMAND ...

  nmt prepare corpus=NAME [key=value ...]        read, filter and encode a corpus
  nmt train [--processes N|gpu] experiment=NAME [key=value ...]
                                                 train a run, or go on with it
  nmt translate RUN [INPUT] [-o OUTPUT] [decoding.key=value ...]
                                                 translate a file, line by line
  nmt evaluate RUN [--source F --reference F] [decoding.key=value ...]
                                                 BLEU, chrF and perplexity of a test set
  nmt experts RUN                                how the experts share the work
  nmt export RUN DIR [decoding.checkpoint=..]    one folder to hand on: parameters, vocabulary, model card
  nmt cost experiment=NAME [key=value ...] | RUN what training takes: operations, memory, time

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
  nmt prepare corpus=files corpus.name=mine 'corpus.train.source=[a.en]' 'corpus.train.target=[a.de]' ...

nmt prepare corpus=NAME --cfg job prints every setting.
"""

_TRAIN_HELP = """\
usage: nmt train [--processes N|gpu] experiment=NAME [key=value ...]

Train a run in runs/NAME; the same command goes on where it stopped. The corpus is prepared first if it is not.
Experiments: {experiments}.

  nmt train experiment=demo
  nmt train experiment=europarl_en_fr_moe_32 run.name=try1 training.max_steps=1000
  nmt train experiment=demo run.name='demo-${{model.moe.num_experts}}' --multirun model.moe.num_experts=4,8,16
  nmt train experiment=demo --cfg job            print every setting and stop
  nmt train --processes gpu experiment=wmt14_en_de_moe_32

--processes gpu trains on all GPUs of this host, one process on each; --processes 2 in two processes. Over several
hosts, torchrun starts `-m nmt.cli train ...` (scripts/slurm.sh).

Settings are documented in nmt/config/.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "prepare": _prepare,
        "train": _train,
        **{name: partial(_run_command, name) for name in ("translate", "evaluate", "experts", "export")},
        "cost": _cost,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        close = difflib.get_close_matches(arguments[0], commands, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _complain(f"unknown command {arguments[0]!r}{hint} Commands: {', '.join(commands)}", 2)
    try:
        commands[arguments[0]](arguments[1:])
        sys.stdout.flush()
    except (HydraException, OmegaConfBaseException) as error:
        return _complain(_config_message(error), 2)
    except ValueError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0" and not isinstance(error, ProcessError):
            # Every process finds the same mistake; the main one tells it.
            return exit_status(error)
        return _complain(str(error), exit_status(error))
    except BrokenPipeError:
        # The reader of our output went away (| head): nothing is wrong, and nobody is there to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as error:
        return _complain(f"{error.filename or 'I/O'}: {error.strerror or error}", 6)
    return 0


def _complain(message: str, status: int) -> int:
    print("nmt: " + " ".join(message.split()), file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------ configuration


def _compose(command: str, arguments: list[str], help_text: str, job: Callable[[Config], None]) -> None:
    """Let Hydra compose the configuration from conf/ and `arguments`, and run `job` on it (once per --multirun)."""
    conf = resource_dir("conf")
    if {"-h", "--help"} & set(arguments):
        names = {group: _names(conf / group) for group in ("corpus", "experiment")}
        print(help_text.format(corpora=names["corpus"], experiments=names["experiment"]), end="")
        return
    # Errors must reach us instead of being printed by Hydra.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="schema", node=Config)

    failures: list[Exception] = []

    def task(composed: DictConfig) -> None:
        # An error that left here would make Hydra print a line of its own. It ends a --multirun.
        if failures:
            return
        try:
            config = OmegaConf.to_object(composed)
            assert isinstance(config, Config)
            job(config)
        except Exception as error:
            failures.append(error)

    before, sys.argv = sys.argv, [f"nmt {command}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(task)()
    finally:
        sys.argv = before
    if failures:
        raise failures[0]


def compose_config(overrides: list[str]) -> Config:
    """The configuration that `nmt train OVERRIDES` would use: for scripts and tests."""
    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        config = OmegaConf.to_object(hydra.compose("config", overrides))
    assert isinstance(config, Config)
    return config


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def _config_message(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one line, with the full key and the nearest known one."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: {text}"
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text += f"\n{error.__cause__}"
    known = list(flatten(Config().to_dict()))
    key = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text)
    if key and re.search(r"not in|Could not override|No match", text) and key[1] not in known:
        close = difflib.get_close_matches(key[1], known, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unknown setting {key[1]}{hint} (--cfg job prints all of them)"
    dropped = r"^\s*(object_type|reference_type|Config search path|To append|provider=|Hydra search path).*"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.match(dropped, line)]
    message = " ".join(line for line in lines if not line.startswith("full_key:"))
    return f"{key[1]}: {message}" if key else message


def _run_config(run: RunDirectory, overrides: list[str]) -> Config:
    """The configuration that a run was started with, `decoding.*` and `evaluation.*` overridden."""
    for override in overrides:
        if not override.startswith(("decoding.", "evaluation.")):
            raise UserError(f"{override}: only decoding.* and evaluation.* may be changed for a trained run")
    try:
        stored = OmegaConf.load(run.config_path)
        if not stored:
            raise ValueError("it is empty")
        merged = OmegaConf.merge(OmegaConf.structured(Config), stored)
    except Exception as error:
        raise CheckpointError(f"{run.config_path} is damaged: {str(error).splitlines()[0]}") from error
    try:
        changes = OmegaConf.from_dotlist(overrides)
    except yaml.YAMLError as error:
        raise UserError(f"{' '.join(overrides)}: a value is not valid YAML") from error
    config = OmegaConf.to_object(OmegaConf.merge(merged, changes))
    assert isinstance(config, Config)
    return config


# ----------------------------------------------------------------------------------------------------- commands


def _prepare(arguments: list[str]) -> None:
    from nmt.data.prepare import prepare

    _compose("prepare", arguments, _PREPARE_HELP, lambda config: print(prepare(config.corpus, say).path))


def _train(arguments: list[str]) -> None:
    from nmt.commands.launch import launch, num_processes
    from nmt.commands.train import train

    wanted, arguments = _take_option("--processes", arguments)
    processes = num_processes(wanted) if wanted is not None else 1

    def job(config: Config) -> None:
        if processes == 1:
            train(config)
        else:
            launch(config, list(HydraConfig.get().overrides.task), processes)

    _compose("train", arguments, _TRAIN_HELP, job)


def _take_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """(value of an option of ours, what is left for Hydra)."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
        if argument == name:
            if index + 1 == len(arguments):
                raise UserError(f"{name} needs a value")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def _run_command(command: str, arguments: list[str]) -> None:
    """A command on a trained run: its options, the run, and the run's configuration with key=value changes applied."""
    # Loaded when asked for: nobody should wait for torch to read a help text of another command.
    module = import_module(f"nmt.commands.{command}")
    overrides = [each for each in arguments if re.match(r"[a-z_][a-z_0-9]*(\.[a-z_0-9]+)+=", each)]
    options = module.parser().parse_args([each for each in arguments if each not in overrides])
    run = RunDirectory.existing(options.run)
    module.run(options, run, _run_config(run, overrides))


def _cost(arguments: list[str]) -> None:
    """Of a run, or of settings as `nmt train` takes them."""
    module = import_module("nmt.commands.cost")
    options, others = module.parser().parse_known_args(arguments)
    if "=" in options.run:
        _compose("cost", module.overrides(options, others), "", partial(module.estimate, options))
    else:
        _run_command("cost", arguments)


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
    _main_of_several() if "RANK" in os.environ else sys.exit(main())
