"""nmt experts RUN --explain SENTENCE."""

import argparse

from nmt.config import Config
from nmt.run import RunDirectory


def explain(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """The experts of every token of a sentence, and what each contributed."""
    raise NotImplementedError
