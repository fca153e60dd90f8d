"""Where the files that travel with the code lie: the Hydra configuration and the phrasebook.

In a clone they stand at the top level, where a person edits them; in a wheel they are bundled inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The folder `name` ("conf" or "data/phrasebook"), from the wheel if we run from one, else from the clone.

    Raises FileNotFoundError if neither has it (a broken installation).
    """
    for root in (_PACKAGE / "_bundled", _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"the installation lacks its folder {name!r}: reinstall the package")
