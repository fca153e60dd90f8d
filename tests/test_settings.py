"""What `nmt settings`, docs/configuration.md and shell completion know of the settings."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from nmt.cli import main
from nmt.config import Config
from nmt.config.choices import choices, find_places, known_groups
from nmt.config.describe import settings
from nmt.config.reading import known_settings, read_value
from tests.own_conf import OWN


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


def titles_of(out: str) -> list[str]:
    return [line.split(" (")[0] for line in out.splitlines() if line[0] != " "]


def test_a_group_has_its_choices_before_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "experiment"]) == 0
    out = capsys.readouterr().out
    assert {f"experiment={name}" for name in OWN["experiment"]} <= {*titles_of(out)}
    assert all(title.startswith("experiment=") for title in titles_of(out))
    text = " ".join(out.split())
    assert "experiment=demo The embedded phrasebook on two CPU cores in about a minute. 1.8M parameters" in text
    assert "@package" not in text
    assert "defaults:" not in text
    assert main(["settings", "decoding"]) == 0
    titles = titles_of(capsys.readouterr().out)
    keys = [each.key for each in settings("decoding")]
    assert titles[-len(keys) :] == keys
    assert {f"decoding={name}" for name in OWN["decoding"]} <= {*titles[: -len(keys)]}


def test_own_files_are_among_the_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package model\n# Mine, with\n#\n# twice the cells.\ncell_size: 1\n# not this\n"
    )
    (folder / "dense.yaml").write_bytes(b"\xff: 1\n")
    (folder / "lost.yaml").symlink_to("nowhere")
    (folder / "marked.yaml").write_text("# A byte order mark.\n", encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)
    assert main(["settings", "model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("model=dense (in conf/model)")
    assert lines[at + 1].startswith("model=")  # it hides the program's file, and has no comment
    assert "model=dense" not in lines
    assert "model=lost (in conf/model)" in lines
    assert lines[lines.index("model=marked (in conf/model)") + 1] == "    A byte order mark."
    at = lines.index("model=mine (in conf/model)")
    assert lines[at + 1] == "    Mine, with twice the cells."
    assert lines[at + 2].startswith("model.hidden_size (int")


def test_every_choice_of_the_program_is_described() -> None:
    own = {each.word: each.text for group in known_groups() for each in choices(group, find_places()[-1:])}
    known = [f"{group}={name}" for group, names in OWN.items() for name in names]
    assert [word for word in known if not own[word].endswith(".")] == []
