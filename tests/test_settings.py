"""What `nmt settings`, docs/configuration.md and shell completion know of the settings."""

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from nmt.cli import main
from nmt.config import Config
from nmt.config.describe import settings
from nmt.config.reading import known_settings, read_value


def test_every_setting_is_there_once_with_a_text() -> None:
    found = settings()
    assert [each.key for each in found] == list(known_settings(Config))
    assert len(found) > 80
    assert [each.key for each in found if not each.text] == []
    assert not any("\n" in each.text for each in found)


def test_every_section_has_a_docstring() -> None:
    def sections(kind: type) -> list[type]:
        hints = get_type_hints(kind)
        inner = [hints[each.name] for each in fields(kind) if is_dataclass(hints[each.name])]
        return [kind, *(found for each in inner for found in sections(each))]

    for kind in sections(Config):
        # A dataclass without one is given its signature.
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}(")


def test_defaults_can_be_typed_as_they_are_printed() -> None:
    """KEY=DEFAULT, as it is printed, leaves the configuration as it is."""
    for each in settings():
        value = Config().to_dict()
        for name in each.key.split("."):
            value = value[name]
        assert read_value(Config, each.key, each.default) == value, each


def test_types() -> None:
    types = {each.key: each.type for each in settings()}
    assert types["training.max_steps"] == "int"
    assert types["run.name"] == "str"
    assert types["model.moe.hidden_sizes"] == "list[int]"
    assert types["model.moe.w_load_decoder"] == "float | None"


def test_a_prefix_chooses() -> None:
    assert {each.key.partition(".")[0] for each in settings("decoding.")} == {"decoding"}
    assert [each.key for each in settings("training.max_")] == ["training.max_steps", "training.max_minutes"]
    with pytest.raises(ValueError, match=r"unknown setting training\.max_step_; did you mean training\.max_steps\?"):
        settings("training.max_step_")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "training.max_steps"]) == 0
    assert capsys.readouterr().out == "training.max_steps (int, default 20000)\n    Optimiser steps in all.\n"
    assert main(["settings"]) == 0
    out = capsys.readouterr().out
    assert [line.split(" (")[0] for line in out.splitlines() if line[0] != " "] == list(known_settings(Config))
    assert max(map(len, out.splitlines())) <= 120
    assert main(["settings", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("nmt: unknown setting nothing")
    assert main(["settings", "--all"]) == 2
    assert "--all" in capsys.readouterr().err
