"""The commands with options of their own, one file each.

A command file has `parser()`, its options and help, and `run`, which does it: `run(options, run, config)` where a
trained run is needed, `run(options)` elsewhere. `config` is the run's own, with `decoding.*` and `evaluation.*` as the
user changed them. Results go to standard output, `say` to standard error.
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
from nmt.terminal import printable

ON_SETTINGS = ("prepare", "train", "cost")
"""Commands that compose their settings; train and cost also take RUN."""
ON_RUNS = ("translate", "evaluate", "experts", "export")
"""Commands that take RUN."""
PLAIN = ("runs", "settings", "completion")
"""Commands that need neither."""


class _Once(argparse.Action):
    """Store the value of an option. Given twice, it is refused: one of the two would be dropped without a word."""

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
    """Options of a command, which begins with RUN unless `takes_run` is false. A mistake is a UserError."""

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

    def options(self) -> list[str]:
        """All options, long and short."""
        return list(self._option_string_actions)

    def sort(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """(options with their values, the words that are neither), both in order. After -- all are words."""
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
        """UserError instead of argparse's own exit, with what was probably meant."""
        hint = ""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            known = {option: option for option in self._option_string_actions}
            known |= {key.partition(".")[2]: f"{key}=.." for key in known_settings(Config) if is_setting(f"{key}=1")}
            close = difflib.get_close_matches(word, known, 1, cutoff=0.7)
            # An option of another toolkit's may begin like a setting of ours: --beam.
            begun = sorted(key for key in known if word.startswith("--") and key.startswith(word[2:].replace("-", "_")))
            if close or (begun and len(word) > len("--")):
                hint = f"; did you mean {known[close[0] if close else begun[0]]}?"
            elif not word.startswith("-") and "-o" in known:
                hint = "; where the result goes is said by -o"
        raise UserError(f"{message}{hint} (try {self.prog} --help)")


def is_setting(word: str) -> bool:
    """Whether a word among files is a setting such as decoding.beam_size=8: files may have = in their names too."""
    key, equals, _ = word.partition("=")
    section = key.split(".")[0]
    if not (equals and re.fullmatch(r"\w+(\.\w+)+", key) and section in {each.name for each in fields(Config)}):
        return False
    return key in known_settings(Config) or not Path(word).exists()


def show(result: object = "") -> None:
    """A result, for standard output."""
    print(printable(str(result)), flush=True)


def say(line: str) -> None:
    """A line for the person, beside the results."""
    print(printable(line), file=sys.stderr, flush=True)
