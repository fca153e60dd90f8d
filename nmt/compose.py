"""Compose configurations from the words of a command line: the only file that uses Hydra and OmegaConf.

Hydra combines the YAML files that words such as `experiment=demo` choose. They are looked up in --config-dir, then in
conf/ of the working directory, then in the program's own conf/. nmt/config/reading.py reads their contents and every
KEY=VALUE. Mistakes are ValueErrors of one line.
"""

import argparse
import difflib
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, get_origin

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmt.commands import say
from nmt.config import Config
from nmt.config.choices import BAD_NAME, Place, find_places, is_name, known_groups, read_file
from nmt.config.reading import (
    known_settings,
    put_setting,
    read_value,
    setting_type,
    unknown_setting,
)
from nmt.errors import CheckpointError, UserError
from nmt.resources import resource_dir
from nmt.run import RunDirectory

OPTIONS = "--config-dir DIR, --multirun, --cfg job"
"""The options that `asked` reads, as messages name them."""
INHERITED = "inherited"
"""The choice in the group `model` that means the network of `run.start_from`."""
_OWN = "nmt"
"""Hydra's name for the program's own folder."""
_NAME = r"\w[\w.-]*"
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


class NoNetworkError(UserError):
    """The network is that of another run, which is not given."""


class Asked(NamedTuple):
    """What to compose, from a command line."""

    words: list[str]
    """Words group=NAME and KEY=VALUE, as they were typed."""
    folder: Path | None = None
    """Folder of --config-dir."""
    multirun: bool = False
    """True to make all combinations of comma-separated values (--multirun)."""
    only_print: bool = False
    """True to only print the settings (--cfg job)."""


class Job(NamedTuple):
    """One configuration, and the arguments that compose just this one."""

    config: Config
    arguments: list[str]


def asked(arguments: Sequence[str]) -> Asked:
    """Return what `arguments` ask to compose. Options of others are left among the words."""
    parser = _Options(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    options, words = parser.parse_known_args(arguments)
    if options.config_dir is not None and not options.config_dir.is_dir():
        raise UserError(f"--config-dir {options.config_dir} is not a folder")
    return Asked(words, options.config_dir, options.multirun, options.cfg is not None)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def jobs(request: Asked) -> list[Job]:
    """Return all jobs of a request, in the order of the words; several only with --multirun."""
    places = find_places(request.folder)
    alternatives = [_alternatives(word, places, request.multirun) for word in request.words]
    options = [] if request.folder is None else ["--config-dir", str(request.folder)]
    return [Job(_composed(words, places), [*words, *options]) for words in itertools.product(*alternatives)]


def compose_config(words: Sequence[str]) -> Config:
    """Return the configuration of `nmt train WORDS`."""
    [job] = jobs(Asked(list(words)))
    return job.config


def settings_text(config: Config) -> str:
    """Return all settings as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def choices_text(group: str, folder: Path | None = None) -> str:
    """Return the choices in a group such as `experiment`: "demo, ...; mine (in conf/experiment)".

    It is for help, which is printed even if a folder cannot be read.
    """
    texts = []
    for place in reversed(find_places(folder)):
        try:
            names = ", ".join(place.names(group))
        except OSError as error:
            texts.append(f"{place.path / group} cannot be read ({error.strerror})")
        else:
            texts += [names if place.own else f"{names} (in {place.path / group})"] if names else []
    return "; ".join(texts)


def meant(word: str) -> list[str]:
    """Return what a word that is not KEY=VALUE may mean: experiment=demo for demo."""
    return _meant(word, find_places())


# ----------------------------------------------------------------------------------------------------------- words


def _alternatives(word: str, places: list[Place], multirun: bool) -> list[str]:
    """Return the word, or with --multirun one word per value. ValueError if it is neither a choice nor a setting."""
    if word.startswith("~"):
        raise ValueError(f"{word}: a setting cannot be removed; give it another value")
    key, equals, text = word.partition("=")
    added, key = key.startswith("+"), key.lstrip("+")
    if not (equals and key):
        raise ValueError(_no_value(word, places))
    if key not in known_groups():
        values = _values(key, text, multirun)
    elif added:
        raise ValueError(f"{word}: write it without +, {key}={text}")
    else:
        values = _split(text)
        if len(values) > 1 and not multirun:
            raise ValueError(f"{word}: several values need --multirun")
        for value in values:
            _check_choice(key, value, places)
    return [f"{key}={value}" for value in values]


def _no_value(word: str, places: list[Place]) -> str:
    found = _meant(word, places)
    return f"{word} is not KEY=VALUE" + (f"; did you mean {' or '.join(found)}?" if found else "")


def _meant(word: str, places: list[Place]) -> list[str]:
    settings = [f"{word}=VALUE"] if word in known_settings(Config) else []
    return settings + [
        f"{each}={word}" for each in known_groups() if any(place.has(f"{each}/{word}") for place in places)
    ]


def _values(key: str, text: str, multirun: bool) -> list[str]:
    """Return the values of a setting as texts. ValueError if one has the wrong type."""
    if not any(each == key or each.startswith(f"{key}.") for each in known_settings(Config)):
        raise ValueError(unknown_setting(key, [*known_settings(Config), *known_groups()]))
    values = _split(text)
    if len(values) > 1 and not multirun:
        if get_origin(setting_type(Config, key)) is list:
            raise ValueError(f"{key}={text} is not a list: write it in brackets, {shlex.quote(f'{key}=[{text}]')}")
        quoted = shlex.quote(f'{key}="{text}"')
        raise ValueError(f"{key}={text}: several values need --multirun; for a text with commas write {quoted}")
    for value in values:
        read_value(Config, key, value)
    return values


def _split(text: str) -> list[str]:
    """Split a text at the commas outside quotes and brackets."""
    pieces, depth, at = [""], 0, 0
    while at < len(text):
        before = pieces[-1].rstrip()
        quoted = _QUOTED.match(text, at) if not before or before[-1] in "[{,:" else None
        token = quoted[0] if quoted else text[at]
        at += len(token)
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces] if len(pieces) > 1 else [text]


def _check_choice(group: str, name: str, places: list[Place]) -> None:
    if (group, name) == ("experiment", "null"):
        return
    if not any(place.has(f"{group}/{name}") for place in places) or not name:
        raise ValueError(_no_choice(group, name, places))
    if not all(map(is_name, name.split("/"))):
        raise ValueError(f"{group}={name}: {BAD_NAME}")


def _no_choice(group: str, name: str, places: list[Place]) -> str:
    names = [each for place in places for each in place.names(group)]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else "."
    there = "; ".join(
        f"{place.path / group} has {', '.join(found)}" for place in places if (found := place.names(group))
    )
    own = f"; for your own, write conf/{group}/{name}.yaml in this folder, or give --config-dir DIR"
    return f"there is no {group}={name}{hint} {there}{own if re.fullmatch(_NAME, name) and name != 'null' else ''}"


# ----------------------------------------------------------------------------------------------------------- files


def _composed(words: Sequence[str], places: list[Place]) -> Config:
    groups = known_groups()
    pairs = [(key, text) for key, _, text in (word.partition("=") for word in words)]
    # The values of ${...} may come from defaults.
    files, model = _chosen([f"{key}={text}" for key, text in pairs if key in groups and text != "null"], places)
    tree = Config().to_dict()
    if model == INHERITED:
        start_from = dict(pairs).get("run.start_from") or files.get("run", {}).get("start_from", "")
        put_setting(Config, tree, "model", _model_of(start_from))
    for key, value in files.items():
        put_setting(Config, tree, key, value)
    for key, text in pairs:
        if key not in groups:
            put_setting(Config, tree, key, read_value(Config, key, text))
    try:
        return Config.from_dict(OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'a setting'}: its ${{...}} has no value ({_one_line(error)})") from error


def _model_of(start_from: str) -> dict[str, Any]:
    """Return the settings model.* of the run with whose parameters another one starts."""
    if not start_from:
        raise NoNetworkError(
            f"model={INHERITED} takes the network of another run: name that run with run.start_from, or choose another "
            "model"
        )
    try:
        model = RunDirectory.existing(start_from).config().to_dict()["model"]
    except CheckpointError as error:
        raise CheckpointError(
            f"run.start_from={start_from}: {error} (a run that started from it before resumes with nmt train RUN)"
        ) from error
    assert isinstance(model, dict)
    return model


def _chosen(words: list[str], places: list[Place]) -> tuple[dict[str, Any], str]:
    """Return the settings of the chosen YAML files, combined by Hydra, and the choice in the group `model`."""
    _Places.places = places
    # Without quotes, Hydra would read some names as numbers, and refuse others.
    quoted = ["{0}='{2}'".format(*word.partition("=")) for word in words]
    for plugin in (_Source, _Places):
        Plugins.instance().register(plugin)
    try:
        with hydra.initialize(config_path=None, version_base="1.3"):
            composed = hydra.compose("config", quoted, return_hydra_config=True)
            model = str(composed.hydra.runtime.choices["model"])
            tree = OmegaConf.to_container(
                OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            )
    except MissingConfigException as error:
        missing = re.fullmatch(r"(?s)In '.+?': Could not find '([^/']+)/(.+?)'.*", str(error))
        problem = _no_choice(missing[1], missing[2], places) if missing else _one_line(error)
        raise ValueError(f"{' '.join(words)}: {problem}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{' '.join(words)}: {_one_line(error)}") from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}, model


def _one_line(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf and its cause as one line, without technical details."""
    text = "\n".join(str(each) for each in (error, error.__cause__) if each is not None)
    dropped = r"\s*(full_key|object_type|reference_type|Config search path|Hydra search path|To append|provider=).*"
    return " ".join(line.strip() for line in text.splitlines() if not re.match(dropped, line))


class _Source(ConfigSource):
    """A folder of files for Hydra. Settings are checked when a file is read, so that errors can name the file."""

    @staticmethod
    def scheme() -> str:
        return "settings"

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        # A user's folder adds files to the groups. conf/config.yaml is always the program's own.
        return self._file(config_path).is_file() and ("/" in config_path or self.provider == _OWN)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return Place(Path(self.path)).names(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if self.provider != _OWN:
            _tell_what_it_hides(file, resource_dir("conf") / f"{config_path}.yaml")
        try:
            package, content = read_file(file, config_path.split("/")[0] if "/" in config_path else "")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return ConfigResult(
            provider=self.provider,
            path=self.path,
            config=OmegaConf.create(content),
            header={"package": package},
        )

    def _file(self, config_path: str) -> Path:
        return Path(self.path) / f"{config_path.removesuffix('.yaml')}.yaml"


class _Places(SearchPathPlugin):
    """Gives the folders to Hydra."""

    places: ClassVar[list[Place]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for place in reversed(self.places):
            search_path.prepend(_OWN if place.own else str(place.path), f"{_Source.scheme()}://{place.path}")


def _tell_what_it_hides(file: Path, own: Path) -> None:
    if own.is_file() and file.read_bytes() != own.read_bytes():
        say(f"{file} is used instead of the program's own file of this name")
