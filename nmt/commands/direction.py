"""The direction and the tag that the options --from, --to and --tag choose."""

import argparse

from nmt.commands import say
from nmt.config import Config, Direction
from nmt.decoding.directions import Directions
from nmt.errors import UserError
from nmt.run import RunDirectory


def directions_of(run: RunDirectory, config: Config) -> Directions:
    """Return what a run translates. CheckpointError or DataError if its corpus.json is damaged."""
    return Directions.of(config, run.corpus_info(), str(run.path), str(run.corpus_path))


def is_given(options: argparse.Namespace) -> bool:
    """Return whether --from or --to is given."""
    return not (getattr(options, "from") is None and options.to is None)


def asked_direction(options: argparse.Namespace, directions: Directions) -> Direction:
    """Return the direction that the options choose, and note it if the run was not trained on it.

    UserError, which lists what there is, for a direction or tag that the run does not have, and if several fit.
    """
    check_tag(options, directions)
    found = directions.choose(getattr(options, "from"), options.to)
    if directions.is_zero_shot(found):
        say(f"zero-shot: {directions.name} was not trained from {found.source} to {found.target}")
    return found


def check_tag(options: argparse.Namespace, directions: Directions) -> None:
    """Raise UserError for a tag that the run does not have."""
    if options.tag and options.tag not in directions.symbols.tags:
        known = ", ".join(directions.symbols.tags) or "none"
        raise UserError(f"--tag {options.tag}: {directions.name} was not trained with this tag; it has: {known}")
