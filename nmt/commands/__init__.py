"""The commands with their own options, one file each.

A command file has `parser()`, for its options and help, and `run`, which executes it: `run(options, run, config)` if it
needs a trained run, else `run(options)`. `config` is the run's configuration with the user's changes to `decoding.*`.
`show` prints results to standard output, `say` prints other lines to standard error.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from nmt.config import Config
from nmt.config.reading import known_settings
from nmt.errors import UserError
from nmt.terminal import printable, written

ON_SETTINGS = ("prepare", "train", "distill", "cost")
"""Commands that compose their settings; train and cost also take RUN, and distill TEACHER."""
ON_RUNS = ("translate", "score", "evaluate", "experts", "export")
"""Commands that take RUN."""
ON_SYSTEMS = ("compare",)
"""Commands that take several runs or files of translations."""
PLAIN = ("runs", "settings", "completion")
"""Commands that need neither a run nor settings."""


class _Once(argparse.Action):
    """Store the value of an option. Reject an option that is given twice, as one of the values would be ignored."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and getattr(namespace, self.dest, self.default) is not self.default:
            raise argparse.ArgumentError(self, "it is given twice: give it once")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Options of a command. Its first argument is RUN, unless `takes_run` is false. Mistakes are UserErrors."""

    def __init__(self, command: str, description: str, examples: str, takes_run: bool = True) -> None:
        super().__init__(
            prog=f"nmt {command}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("action", None, _Once)
        if takes_run:
            self.add_argument("run", metavar="RUN", help="folder of a run, or its name in runs/")

    def add_output(self) -> None:
        """Add the option -o of commands that write lines."""
        self.add_argument(
            "-o",
            "--output",
            default="-",
            metavar="OUTPUT",
            help="a file, which appears when complete; .gz, .xz, .zst and .bz2 are compressed (default: standard "
            "output)",
        )

    def add_direction(self) -> None:
        """Add the options that choose a direction of a run, and a tag (`nmt.commands.direction`)."""
        self.add_argument(
            "--from", metavar="LANGUAGE", help="language of the source, for a run of several directions, such as en"
        )
        self.add_argument("--to", metavar="LANGUAGE", help="language of the translation, such as fr")
        self.add_argument(
            "--tag", default="", metavar="NAME", help="domain or origin of the text, for a run that has learned tags"
        )

    def options(self) -> list[str]:
        """Return all options, long and short."""
        return list(self._option_string_actions)

    def choices(self) -> dict[str, list[str]]:
        """Return the values of each option that only takes some."""
        return {name: list(each.choices) for name, each in self._option_string_actions.items() if each.choices}

    def sort(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return (options with their values, other words), both in order. After --, everything is a word."""
        options: list[str] = []
        words: list[str] = []
        values = 0
        for index, argument in enumerate(arguments):
            if argument == "--" and not values:
                return options, [*words, *arguments[index + 1 :]]
            if values:
                options.append(argument)
                values -= 1
            elif argument.startswith("-") and argument != "-":
                options.append(argument)
                action = self._option_string_actions.get(argument)
                values = 1 if action is not None and action.nargs is None else 0
            else:
                words.append(argument)
        return options, words

    def error(self, message: str) -> NoReturn:
        """Raise UserError, instead of argparse's own exit, with a suggestion of what was meant."""
        hint = ""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            known = {option: option for option in self._option_string_actions}
            known |= {key.partition(".")[2]: f"{key}=.." for key in known_settings(Config) if is_setting(f"{key}=1")}
            close = difflib.get_close_matches(word, known, 1, cutoff=0.7)
            # An option of another toolkit, such as --beam, may begin like a setting of nmt.
            begun = sorted(key for key in known if word.startswith("--") and key.startswith(word[2:].replace("-", "_")))
            if close or (begun and len(word) > len("--")):
                hint = f"; did you mean {known[close[0] if close else begun[0]]}?"
            elif not word.startswith("-") and "-o" in known:
                hint = "; name the output with -o"
        raise UserError(f"{message}{hint} (try {self.prog} --help)")


def is_setting(word: str) -> bool:
    """Return True if a word is a setting such as decoding.beam_size=8. Names of files may have = too."""
    key, equals, _ = word.partition("=")
    section = key.split(".")[0]
    if not (equals and re.fullmatch(r"\w+(\.\w+)+", key) and section in {each.name for each in fields(Config)}):
        return False
    return key in known_settings(Config) or not Path(word).exists()


def show(result: object = "") -> None:
    """Print a result to standard output."""
    written(lambda: print(printable(str(result)), flush=True))


def say(line: str) -> None:
    """Print a line for the user to standard error."""
    written(lambda: print(printable(line), file=sys.stderr, flush=True))
