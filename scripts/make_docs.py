"""Write the parts of docs/ that come from the code: python scripts/make_docs.py

docs/configuration.md contains the documentation of the settings in nmt/config. In docs/architecture.md, the numbers of
lines are brought up to date.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from nmt.config import Config
from nmt.config.describe import Setting, settings
from nmt.pages.markdown import code
from nmt.pages.tables import markdown_table

ROOT = Path(__file__).parents[1]
CONFIGURATION, ARCHITECTURE = ROOT / "docs" / "configuration.md", ROOT / "docs" / "architecture.md"
CORE = ("data", "decoding", "model", "parallel", "training")
"""Rooms of nmt that all others could be taken away from."""
_INTRODUCTION = """\
# Configuration

Every setting, made from `nmt/config/` by `python scripts/make_docs.py`. `nmt settings [PREFIX]` prints the same.
In names of settings, a piece is a subword.

A setting is `key=value` on the command line, or a line in a YAML file of `conf/`:

```
nmt train experiment=demo training.max_steps=1000 corpus.filters.max_words=80 'model.moe.hidden_sizes=[128,128]'
nmt train experiment=demo --cfg job     # print the settings of this run and stop
nmt settings training.max               # explain the settings that begin so
nmt settings experiment                 # list the experiments, with parameters and operations
```

A misspelt key, a wrong type or a value that contradicts another one is rejected in one line before anything runs.
`nmt train` and `nmt prepare` take all settings. Commands on a trained run take `decoding.` settings.

`conf/` has five groups: `corpus=`, `model=`, `training=`, `decoding=` and `experiment=`. An experiment
chooses among the others and changes what differs. A file `conf/corpus/mine.yaml` in the working directory is
`corpus=mine`, and likewise for the other groups. `--config-dir DIR` adds another folder.
"""


def page() -> str:
    """Return the whole text of docs/configuration.md."""
    sections: dict[str, list[Setting]] = {}
    for setting in settings():
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    names: dict[type, list[str]] = {}
    for name in sections:
        names.setdefault(_class(name), []).append(name)
    lines = (line for kind, each in names.items() for line in _section(kind, each, sections[each[0]]))
    return "\n".join([_INTRODUCTION, *lines])


def _section(kind: type, names: list[str], members: list[Setting]) -> Iterator[str]:
    """Yield the lines for a class of settings. Sections of one class, such as the three splits, share one table."""
    yield from (f"## {', '.join(names)}", "", _escaped(" ".join((kind.__doc__ or "").split())), "")
    prefix = f"{names[0]}." if len(names) > 1 else ""
    rows = (
        (code(each.key.removeprefix(prefix)), code(each.type), code(each.default), _escaped(each.text))
        for each in members
    )
    yield from (*markdown_table(("setting", "type", "default", "meaning"), rows), "")


def _class(section: str) -> type:
    """Return the class of a section such as corpus.filters."""
    kind: type = Config
    for name in section.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def _escaped(text: str) -> str:
    """Escape HTML in text, except in code in backticks."""
    return "".join(_outside(text))


def _outside(text: str) -> Iterator[str]:
    for place, part in enumerate(re.split("(`[^`]*`)", text)):
        yield part if place % 2 else part.replace("<", "&lt;")


def lines_of_rooms() -> dict[str, int]:
    """Lines of Python in each folder of nmt, and in the files beside them ("")."""
    package, counted = ROOT / "nmt", dict[str, int]()
    for path in sorted(package.rglob("*.py")):
        room = "/".join(path.relative_to(package).parts[:-1][:1])
        counted[room] = counted.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return counted


def with_lines(text: str) -> str:
    """The text of docs/architecture.md with the numbers of lines as they are now."""
    rooms = lines_of_rooms()
    counted = {f"`{room}/`" if room else "`*.py`": lines for room, lines in rooms.items()}
    counted |= {"all": sum(rooms.values()), "the core": sum(rooms[room] for room in CORE)}
    for name, lines in counted.items():
        text = re.sub(rf"^(\| {re.escape(name)} \| [^|]+ \|) [\d,]+ \|", rf"\1 {lines:,} |", text, flags=re.MULTILINE)
    return text


def main() -> None:
    """Write both."""
    CONFIGURATION.write_text(page(), encoding="utf-8")
    ARCHITECTURE.write_text(with_lines(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
