"""Libraries that only some commands need: the extras of the package, and the error if one is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from nmt.errors import MissingExtraError

EXTRAS = {
    "train": ("hydra", "omegaconf", "datasets", "pyarrow", "tensorboard"),
    "phrasebook": ("babel", "num2words"),
    "language": ("py3langid",),
    "plots": ("matplotlib",),
}
"""Modules that each extra of pyproject.toml installs. Translating and scoring need none of them."""


@contextmanager
def named_extras(task: str) -> Iterator[None]:
    """Raise a MissingExtraError, which names `task` and the extra, if a module of an extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
        if extra is None:
            raise
        raise MissingExtraError(
            f"{task} needs {module}, which is not installed: pip install 'nmt-moe[{extra}]'"
        ) from error
