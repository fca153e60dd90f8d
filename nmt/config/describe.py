"""All settings, read from the dataclasses, for `nmt settings`, docs/configuration.md and shell completion."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from nmt.config import Config
from nmt.config.choices import known_groups
from nmt.config.reading import known_settings, unknown_setting, written


class Setting(NamedTuple):
    """One setting, as text."""

    key: str
    """The full key: training.max_steps."""
    type: str
    """Its type as Python writes it: int, list[str], float | None."""
    default: str
    """Its default as a command line takes it: 20000, [2048], null."""
    text: str
    """Its documentation, in one paragraph."""


def settings(prefix: str = "") -> list[Setting]:
    """Return all settings whose keys begin with `prefix`, in the order of nmt/config. Raises ValueError if none do."""
    found = [each for each in _settings(Config, "") if each.key.startswith(prefix)]
    if not found:
        raise ValueError(
            unknown_setting(prefix, dict.fromkeys([*known_settings(Config), *_sections(), *known_groups()]))
        )
    return found


def _sections() -> Iterator[str]:
    """Yield the names of all sections: training, model, model.moe, ..."""
    for key in known_settings(Config):
        names = key.split(".")[:-1]
        yield from (".".join(names[: count + 1]) for count in range(len(names)))


def _settings(kind: type, section: str) -> Iterator[Setting]:
    hints, texts = get_type_hints(kind), _docstrings(kind)
    for each in fields(kind):
        key, hint = f"{section}{each.name}", hints[each.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _settings(hint, f"{key}.")
            continue
        default = each.default if each.default_factory is MISSING else each.default_factory()
        yield Setting(key, _type_name(hint), written(default), texts[each.name])


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _docstrings(kind: type) -> dict[str, str]:
    """Return the string that follows each field of a class, joined into one line."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                texts[name] = " ".join(text.split())
    return texts
