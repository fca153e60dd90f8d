"""The commands that work on a trained run, one file each.

A command file has `parser()`, its options and help, and `run(options, run, config)`, which does it: `config` is the
run's own, with `decoding.*` and `evaluation.*` as the user changed them. Results go to standard output, `say` to
standard error.
"""

import argparse
import sys
from typing import Any, NoReturn

from nmt.errors import UserError


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
    """Options of a command that takes RUN. A mistake is a UserError."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"nmt {command}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("action", None, _Once)
        self.add_argument("run", metavar="RUN", help="folder of a run, or its name in runs/")

    def error(self, message: str) -> NoReturn:
        """UserError instead of argparse's own exit."""
        raise UserError(f"{message} (try {self.prog} --help)")


def say(line: str) -> None:
    """A line for the person, beside the results."""
    print(line, file=sys.stderr, flush=True)
