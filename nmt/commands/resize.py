"""nmt experts RUN --grow | --prune | --merge ... -o NEWRUN."""

import argparse

from nmt.config import Config
from nmt.run import RunDirectory


def resize(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Write a new run with more or fewer experts."""
    raise NotImplementedError
