"""The YAML files that words such as experiment=demo choose, and the folders in which they are looked up."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import Config
from nmt.config.reading import parse_yaml, typed_settings
from nmt.resources import resource_dir

BAD_NAME = "a name has only letters, digits, _, . and -: rename the file"
"""What is wrong with a file for which `is_name` is false."""


class Place(NamedTuple):
    """A folder of YAML files; `own` is True for the program's own."""

    path: Path
    own: bool = False

    def names(self, group: str) -> list[str]:
        """The choices in a group, in order of the alphabet. Raises OSError if its folder cannot be read."""
        return [path.stem for path in self.files(group) if is_name(path.stem)]

    def files(self, group: str) -> list[Path]:
        """The YAML files of a group, including those whose names cannot be typed; hidden files are left out."""
        try:
            found = sorted((self.path / group).iterdir(), key=lambda path: path.stem)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [path for path in found if path.match("[!.]*.yaml") and path.is_file()]

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
    problem: str = ""
    """Why the file cannot be used, in one line; empty if it can."""


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
    """All choices in a group: the program's own first. A file that is hidden by another of its name is left out.

    Raises OSError if the folder of a group cannot be read.
    """
    found: dict[str, Choice] = {}
    for place in reversed(where):
        for file in place.files(group):
            found[file.stem] = _choice(group, file, place)
    return list(found.values())


def is_name(text: str) -> bool:
    """True if a choice may have this name."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def read_file(file: Path, group: str) -> tuple[str, dict[str, Any]]:
    """Return the package of a file, as Hydra calls the section of its settings, and its settings with their types.

    `group` is empty for conf/config.yaml. Raises ValueError if the file cannot be used.
    """
    text = _text(file)
    # An experiment may change all settings, any other file only those of its group.
    package = _package(text) or ("_global_" if group in ("", "experiment") else group)
    return package, _typed_file(parse_yaml(text), package.removeprefix("_global_"))


def _choice(group: str, file: Path, place: Place) -> Choice:
    word, text = f"{group}={file.stem}", ""
    try:
        text = _head(_text(file))
        read_file(file, group)
    except ValueError as error:
        return Choice(word, text, place, str(error))
    except OSError as error:
        return Choice(word, text, place, f"it cannot be read ({error.strerror})")
    return Choice(word, text, place, "" if is_name(file.stem) else BAD_NAME)


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8: save the file as UTF-8") from error


def _head(text: str) -> str:
    """The comment lines on top of a file, without its `# @package` line."""
    comments = (line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))
    return " ".join(line for line in comments if line and not line.startswith("@package"))


def _package(text: str) -> str:
    """The name in the line `# @package NAME` on top of a file; empty if there is none."""
    lines = (line.strip() for line in text.splitlines())
    for line in takewhile(lambda line: not line or re.match(r"#\s*@", line), lines):
        if re.match(r"#\s*@package\b", line):
            words = line.partition("@package")[2].split()
            if len(words) != 1:
                raise ValueError(f"{line} is not # @package NAME, where NAME is a section such as model, or _global_")
            return words[0]
    return ""


def _typed_file(content: Any, section: str) -> dict[str, Any]:
    """Return the content of a file with its settings checked as those of `section`, and its list of defaults."""
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError("it has no settings, which are written KEY: VALUE")
    defaults = {name: content.pop(name) for name in ("defaults",) if name in content}
    sections = section.split(".") if section else []
    for name in reversed(sections):
        content = {name: content}
    content = typed_settings(Config, content, unresolved=True)
    for name in sections:
        content = content[name]
    return defaults | content
