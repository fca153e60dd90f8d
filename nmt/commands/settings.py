"""nmt settings: print all settings with types, defaults and meanings."""

import argparse
import shutil
import textwrap

from nmt.commands import Parser, show
from nmt.config.describe import settings

_WIDEST = 120


def parser() -> Parser:
    """Options of `nmt settings`."""
    parser = Parser(
        "settings",
        "Print every setting that KEY=VALUE can change: its key, type and default, and what it means.",
        "  nmt settings\n  nmt settings decoding\n  nmt settings training.max_steps",
        takes_run=False,
    )
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only settings that begin with this")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the settings whose keys begin with `options.prefix`."""
    width = min(shutil.get_terminal_size().columns or _WIDEST, _WIDEST)
    for setting in settings(options.prefix):
        show(f"{setting.key} ({setting.type}, default {setting.default})")
        show(textwrap.fill(setting.text, width, initial_indent="    ", subsequent_indent="    "))
