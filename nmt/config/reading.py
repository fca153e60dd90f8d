"""Convert settings written in YAML or on a command line into typed objects.

The type of a setting alone decides how its value is read, never how the value looks: `2024_11_26`, `1e3`, `no` and
`true` are text if the setting is text. Every mistake raises a ValueError of one line that names the full key.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from nmt.errors import UserError

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LONGEST_SHOWN = 80

T = TypeVar("T")


class UnknownSettingError(UserError):
    """A setting that this version does not have."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class _TextLoader(yaml.SafeLoader):
    """A YAML loader that reads every plain scalar as text, except null.

    It rejects duplicate keys and aliases: a few lines of aliases can expand to more than fits in memory.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not allowed: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"{key.value} is set twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text, with scalars as text. Raises ValueError, with the line counted from 1, if it is not valid."""
    try:
        return yaml.load(text, _TextLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_settings(kind: type[T], given: Any, key: str = "") -> T:
    """Build an object of the dataclass `kind` from nested dictionaries; missing settings get their defaults.

    `key` is the full key of the object itself, empty for the whole configuration.
    """
    return _built(kind, typed_settings(kind, given, key))


def typed_settings(kind: type, given: Any, key: str = "", unresolved: bool = False) -> dict[str, Any]:
    """Return the settings in `given`, and no others, each converted to its type.

    With `unresolved`, a value that contains ${...} stays unchanged.
    """
    if not isinstance(given, dict):
        example = f"{key}.{next(iter(get_type_hints(kind)))}" if key else "training.max_steps"
        raise ValueError(f"{_assignment(key, given)} is not a set of settings, such as {example}")
    hints = get_type_hints(kind)
    typed = {}
    for name, value in given.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise UnknownSettingError(full, unknown_setting(full, known_settings(kind, key)))
        typed[name] = _typed(hints[name], value, full, unresolved)
    return typed


def read_value(kind: type, key: str, text: str) -> Any:
    """Return the value of KEY=TEXT on a command line for the setting `key` of `kind`; ${...} in it stays unchanged.

    Text is taken as typed, unless all of it is quoted. Lists are written [a, b], dictionaries {a: 1}.
    """
    hint = setting_type(kind, key)
    quoted = text.lstrip().startswith(("'", '"'))
    collection = is_dataclass(hint) or get_origin(hint) in (list, dict)
    if not (quoted or (collection and "${" not in text)):
        return _typed(hint, text, key, unresolved=True)
    try:
        # YAML requires a blank after the colon, which people often leave out.
        value = parse_yaml(re.sub(r":(?=\S)", ": ", text) if get_origin(hint) is dict else text)
    except ValueError as error:
        problem = str(error).partition(": ")[2] or error
        advice = "end it with the quote it begins with" if quoted else "put quotes around text with special characters"
        raise ValueError(f"{_assignment(key, text)} cannot be read ({problem}): {advice}") from error
    return _typed(hint, text if value is None else value, key, unresolved=True)


def put_setting(kind: type, tree: dict[str, Any], key: str, value: Any) -> None:
    """Set what a full key names in nested dictionaries; of a section, only the settings that `value` has."""
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    if isinstance(value, dict) and key not in known_settings(kind):
        for each, below in value.items():
            put_setting(kind, tree, f"{key}.{each}", below)
    else:
        inner[name] = value


def setting_type(kind: type, key: str) -> Any:
    """Return the type of the setting or section `key`. Raises ValueError if there is none."""
    hint: Any = kind
    for name in key.split("."):
        hints = get_type_hints(hint) if is_dataclass(hint) else {}
        if name not in hints:
            raise ValueError(unknown_setting(key, known_settings(kind)))
        hint = hints[name]
    return hint


def written(value: Any) -> str:
    """Write a value as text that `read_value` reads."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(written, value))}]"
        case dict():
            return f"{{{','.join(f'{written(key)}: {written(each)}' for key, each in value.items())}}}"
        case str() if value.lower() == "null" or not re.fullmatch(r"[\w/.][\w/.+-]*", value):
            return f'"{"".join(map(_escaped, value))}"'
    return str(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def known_settings(kind: type, key: str = "") -> Iterator[str]:
    """Yield the full keys of all settings below `key`, whose type is the dataclass `kind`."""
    for name, hint in get_type_hints(kind).items():
        full = f"{key}.{name}" if key else name
        if isinstance(hint, type) and is_dataclass(hint):
            yield from known_settings(hint, full)
        else:
            yield full


def unknown_setting(key: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown setting, with the known ones that are probably meant."""
    return f"unknown setting {_shown(key)}{_suggestion(key, list(known))} (nmt settings prints all of them)"


def _suggestion(key: str, known: list[str]) -> str:
    """Suggest the same name in other sections, else the closest name in the section (or of all, if it is unknown)."""
    section, _, name = key.rpartition(".")
    found = [each for each in known if each.rpartition(".")[2] == name]
    beside = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == section}
    found = found or [beside[each] for each in difflib.get_close_matches(name, beside, 1, cutoff=0.7)]
    if not beside:
        found = found or difflib.get_close_matches(key, known, 1, cutoff=0.8)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _typed(hint: Any, value: Any, key: str, unresolved: bool) -> Any:
    if unresolved and isinstance(value, str) and "${" in value:
        return value
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return typed_settings(hint, value, key, unresolved)
    if isinstance(hint, UnionType):
        if value is None or value == "null":
            return None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{_assignment(key, value)} is not a list: write it in brackets, [{_shown(value)}]")
        return [_typed(get_args(hint)[0], each, key, unresolved) for each in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{_assignment(key, value)} is not a dictionary such as {{name: 1}}")
        return {str(name): _typed(get_args(hint)[1], each, f"{key}.{name}", unresolved) for name, each in value.items()}
    return _scalar(hint, value, key)


def _scalar(hint: type, value: Any, key: str) -> Any:
    if value is None:
        raise ValueError(f"{key} has no value" + (": write '' for empty text" if hint is str else ""))
    if isinstance(value, list | dict):
        raise ValueError(f"{_assignment(key, value)} is not a single value")
    text = value if isinstance(value, str) else written(value)
    if hint is str:
        if "\0" in text:
            raise ValueError(f"{key} contains a NUL character: remove it")
        return text
    if hint is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    try:
        if hint is int and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text):
            return int(text)
        if hint is float:
            # YAML writes .inf and .nan.
            return float(re.sub(r"(?i)^([+-]?)\.(?=inf$|nan$)", r"\1", text))
    except ValueError:
        pass  # not a number, or one with thousands of digits
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    raise ValueError(f"{_assignment(key, value)} is not {kinds[hint]}")


def _built(kind: type[T], typed: dict[str, Any]) -> T:
    hints = get_type_hints(kind)
    values = {name: _built(hints[name], each) if is_dataclass(hints[name]) else each for name, each in typed.items()}
    return kind(**values)


def _assignment(key: str, value: Any) -> str:
    return f"{key}={_shown(value)}" if key else _shown(value)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else written(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
