"""nmt settings: print all settings with types, defaults and meanings, or the choices in a group."""

import argparse
import shutil
import textwrap

from nmt.commands import Parser, show
from nmt.config.choices import choices, find_places, known_groups
from nmt.config.describe import settings

_WIDEST = 120
_NO_SETTINGS = "experiment"
"""The group that has no settings of its own: an experiment changes those of the others."""


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
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the choices in the group `options.prefix`, then the settings whose keys begin with it."""
    prefix: str = options.prefix
    if prefix in known_groups():
        for choice in choices(prefix, find_places()):
            _show(choice.word if choice.place.own else f"{choice.word} (in {choice.place.path / prefix})", choice.text)
    for setting in [] if prefix == _NO_SETTINGS else settings(prefix):
        _show(f"{setting.key} ({setting.type}, default {setting.default})", setting.text)


def _show(title: str, text: str) -> None:
    width = min(shutil.get_terminal_size().columns or _WIDEST, _WIDEST)
    show(title)
    if text:
        show(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
