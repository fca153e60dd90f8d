"""nmt settings: print all settings with types, defaults and meanings, or the choices in a group."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

from nmt.commands import Parser, show
from nmt.config import Config
from nmt.config.choices import Choice, choices, find_places, known_groups
from nmt.config.describe import settings
from nmt.config.reading import known_settings
from nmt.cost.operations import model_cost
from nmt.errors import UserError
from nmt.wording import millions

_WIDEST = 120
_NO_SETTINGS = "experiment"
"""The group that has no settings of its own: an experiment changes those of the others."""
_FIGURES = re.compile(r" ?\S+ parameters, \S+ ops/timestep\.$")
"""What the comments of the program's own experiments end with."""

Compose = Callable[[str, Path | None], Config | None]
"""Returns the configuration of a word such as experiment=demo, with files of a folder; None if it is of another run."""


def parser() -> Parser:
    """Options of `nmt settings`."""
    parser = Parser(
        "settings",
        "Print every setting that KEY=VALUE can change: its key, type and default, and what it means.\n"
        "With the name of a group, such as experiment, print its choices first.",
        "  nmt settings\n  nmt settings experiment\n  nmt settings decoding\n  nmt settings training.max_steps",
        takes_run=False,
    )
    parser.add_argument(
        "prefix",
        nargs="?",
        default="",
        metavar="PREFIX",
        help=f"only settings that begin with this; or a group: {', '.join(known_groups())}",
    )
    parser.add_argument(
        "--config-dir",
        type=Path,
        metavar="DIR",
        help="also print the choices in DIR, which takes precedence over conf/ in the working directory",
    )
    return parser


def run(options: argparse.Namespace, compose: Compose) -> None:
    """Print the choices in the group `options.prefix`, then the settings whose keys begin with it.

    `compose` gives the networks of experiments, and raises ValueError for one that cannot be used.
    """
    prefix: str = options.prefix
    folder: Path | None = options.config_dir
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not a folder")
    _reject_value(prefix)
    if prefix in known_groups():
        for choice in choices(prefix, find_places(folder)):
            if prefix == _NO_SETTINGS and not (choice.place.own or choice.problem):
                choice = _measured(choice, compose, folder)
            title = choice.word if choice.place.own else f"{choice.word} (in {choice.place.path / prefix})"
            _show(title, f"broken: {choice.problem}" if choice.problem else choice.text)
    for setting in [] if prefix == _NO_SETTINGS else settings(prefix):
        _show(f"{setting.key} ({setting.type}, default {setting.default})", setting.text)


def _reject_value(prefix: str) -> None:
    """Raise UserError for GROUP=NAME or KEY=VALUE, with the commands that take it."""
    name, equals, _ = prefix.partition("=")
    if not equals:
        return
    uses = f"nmt train {prefix} --cfg job prints all settings with it, and nmt cost {prefix} estimates the cost"
    if name in known_groups():
        raise UserError(f"{prefix} is no group: nmt settings {name} prints all choices, {uses}")
    if name in known_settings(Config):
        raise UserError(f"{prefix} has a value: nmt settings {name} prints what the setting means, {uses}")


def _measured(choice: Choice, compose: Compose, folder: Path | None) -> Choice:
    """Return an experiment with the figures of its network, or with the problem that it has if nothing is added."""
    try:
        config = compose(choice.word, folder)
    except ValueError as error:
        return choice._replace(problem=str(error))
    if config is None:
        return choice
    cost = model_cost(config.model, config.corpus.subwords.num_pieces)
    figures = f"{millions(cost.num_parameters)} parameters, {millions(cost.ops_per_timestep)} ops/timestep."
    return choice._replace(text=f"{_FIGURES.sub('', choice.text)} {figures}".strip())


def _show(title: str, text: str) -> None:
    width = min(shutil.get_terminal_size().columns or _WIDEST, _WIDEST)
    show(title)
    if text:
        show(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
