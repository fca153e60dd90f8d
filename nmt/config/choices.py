"""The YAML files that words such as experiment=demo choose, and the folders in which they are looked up."""

from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from nmt.resources import resource_dir


class Place(NamedTuple):
    """A folder of YAML files; `own` is True for the program's own."""

    path: Path
    own: bool = False

    def names(self, group: str) -> list[str]:
        """The choices in a group, in order of the alphabet."""
        return sorted(path.stem for path in (self.path / group).glob("*.yaml"))

    def has(self, name: str) -> bool:
        """True if there is a file for `name`, such as experiment/demo."""
        return (self.path / f"{name}.yaml").is_file()


class Choice(NamedTuple):
    """One choice in a group, as text."""

    word: str
    """What to type: experiment=demo."""
    text: str
    """The comment on top of its file, in one paragraph; empty if there is none."""
    place: Place
    """Where the file is."""


def find_places(folder: Path | None = None) -> list[Place]:
    """The folders in which files are looked up, in order: `folder`, conf/ of the working directory, our own."""
    own = resource_dir("conf")
    given = [] if folder is None else [folder]
    here = [Path("conf")] if Path("conf").is_dir() and not own.samefile("conf") else []
    return [*map(Place, [*given, *here]), Place(own, own=True)]


def known_groups() -> list[str]:
    """The groups: experiment, corpus, model, ..."""
    return sorted(path.name for path in resource_dir("conf").iterdir() if path.is_dir())


def choices(group: str, where: list[Place]) -> list[Choice]:
    """All choices in a group: the program's own first. A file that is hidden by another of its name is left out."""
    found: dict[str, Choice] = {}
    for place in reversed(where):
        for name in place.names(group):
            found[name] = Choice(f"{group}={name}", _head(place.path / group / f"{name}.yaml"), place)
    return list(found.values())


def _head(file: Path) -> str:
    """The comment lines on top of a file, without its `# @package` line; empty if it cannot be read."""
    comments: list[str] = []
    with suppress(OSError), file.open(encoding="utf-8-sig", errors="replace") as lines:
        comments = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    return " ".join(line for line in comments if line and not line.startswith("@package"))
