"""Find the files that come with the code: the Hydra configuration and the phrasebook.

In a clone they are at the top level, where people edit them; in a wheel they are inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Return the folder `name` ("conf" or "data/phrasebook"), from the wheel if we run from one, else from the clone.

    Raises FileNotFoundError if it is missing from both (a broken installation).
    """
    for root in (_PACKAGE / "_bundled", _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"the folder {name!r} of the installation is missing: reinstall the package")
