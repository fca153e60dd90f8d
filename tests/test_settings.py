"""What `nmt settings`, docs/configuration.md and shell completion know of the settings."""

import errno
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from nmt.cli import main
from nmt.compose import choices_text, compose_config
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
    for word, meant in (("experimnt", "experiment"), ("trainng", "training"), ("parallal", "parallel")):
        assert main(["settings", word]) == 2
        assert f"unknown setting {word}; did you mean {meant}?" in capsys.readouterr().err
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
    assert lines[at + 1] == "    broken: line 1 is not UTF-8: save the file as UTF-8"
    assert "model=dense" not in lines  # the program's file, which is hidden
    assert not any(line.startswith("model=lost") for line in lines)
    assert lines[lines.index("model=marked (in conf/model)") + 1] == "    A byte order mark."
    at = lines.index("model=mine (in conf/model)")
    assert lines[at + 1] == "    Mine, with twice the cells."
    assert lines[at + 2].startswith("model.hidden_size (int")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiments of the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    return folder


def texts_of(out: str) -> dict[str, str]:
    """The texts of choices of one's own, by what to type."""
    texts: dict[str, str] = {}
    for line in out.splitlines():
        if line[0] != " ":
            word = line.partition(" (in ")[0] if " (in " in line else ""
        texts[word] = f"{texts.get(word, '')} {line.strip()}" if line[0] == " " else ""
    return {word: text.strip() for word, text in texts.items() if word}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"run: {name: Caf\xe9}\n", "broken: line 1 is not UTF-8: save the file as UTF-8"),
        (b"# Mine\nrun: [\n", "broken: line 3: "),
        (b"run: {nam: x}\n", "broken: unknown setting run.nam; did you mean run.name?"),
        (b"# @package\n", "broken: # @package is not # @package NAME, "),
        (
            b"defaults: [override /model: smal]\n",
            "broken: experiment=mine: there is no model=smal; did you mean small?",
        ),
        (b"model: {moe: {k: 99}}\n", "broken: model.moe.k=99 must lie in"),
        (b"# Of another run.\ndefaults: [override /model: inherited]\n", "Of another run."),
        (b"defaults: [demo, _self_]\n", "1.8M parameters, 1.0M ops/timestep."),
        (b"# Mine.\n# 9.9M parameters, 1.0M ops/timestep.\ndefaults: [demo]\n", "Mine. 1.8M parameters, 1.0M ops/"),
    ],
)
def test_own_experiments_have_figures_or_a_problem(
    own: Path, content: bytes, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "mine.yaml").write_bytes(content)
    (own / "demo.yaml").write_bytes((find_places()[-1].path / "experiment" / "demo.yaml").read_bytes() + b"\n")
    assert main(["settings", "experiment"]) == 0
    found = capsys.readouterr()
    assert texts_of(found.out)["experiment=mine"].startswith(text)
    assert found.err == ""


def test_what_is_no_file_is_no_choice(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "adir.yaml").mkdir()
    (own / "lost.yaml").symlink_to("nowhere")
    (own / ".hidden.yaml").touch()
    (own / "linked.yaml").symlink_to("../demo.txt")
    (own.parent / "demo.txt").touch()
    assert main(["settings", "experiment"]) == 0
    assert texts_of(capsys.readouterr().out).keys() == {"experiment=linked"}
    assert main(["cost", "experiment=adir"]) == 2
    assert capsys.readouterr().err.startswith("nmt: there is no experiment=adir. conf/experiment has linked; ")


def test_a_name_that_cannot_be_typed_is_a_problem(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "two words.yaml").touch()
    assert main(["settings", "experiment"]) == 0
    problem = "a name has only letters, digits, _, . and -: rename the file"
    assert texts_of(capsys.readouterr().out) == {"experiment=two words": f"broken: {problem}"}
    assert main(["cost", "experiment=two words"]) == 2
    assert capsys.readouterr().err == f"nmt: experiment=two words: {problem}\n"


@pytest.mark.parametrize("name", ["café", "5", "1e3", "true", "a.b", "-x"])
def test_every_other_name_can_be_typed(own: Path, name: str) -> None:
    (own / f"{name}.yaml").write_text("run: {name: mine}\n")
    assert compose_config([f"experiment={name}"]).run.name == "mine"


def test_a_folder_that_cannot_be_read_is_an_error(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path == Path("conf/experiment"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert main(["settings", "experiment"]) == 6
    assert capsys.readouterr() == ("", "nmt: conf/experiment: Permission denied\n")
    assert main(["settings", "model"]) == 0
    # Help is printed all the same.
    assert choices_text("experiment").endswith("; conf/experiment cannot be read (Permission denied)")


def test_a_file_that_cannot_be_read_is_a_problem(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "mine.yaml").touch()
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "mine.yaml":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert main(["settings", "experiment"]) == 0
    assert texts_of(capsys.readouterr().out) == {"experiment=mine": "broken: it cannot be read (Permission denied)"}


@pytest.mark.parametrize("option", [["--config-dir", "other"], ["--config-dir=other"]])
def test_config_dir(own: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (own / "mine.yaml").write_text("# Mine.\ndefaults: [theirs]\n")
    (own.parents[1] / "other" / "experiment").mkdir(parents=True)
    (own.parents[1] / "other" / "experiment" / "theirs.yaml").write_text("# Theirs.\ndefaults: [demo]\n")
    assert main(["settings", *option, "experiment"]) == 0
    out = capsys.readouterr().out
    assert "experiment=theirs (in other/experiment)" in out
    assert {text.partition(".")[0] for text in texts_of(out).values()} == {"Mine", "Theirs"}
    assert main(["settings", "experiment", "--config-dir", "none"]) == 2
    assert capsys.readouterr().err == "nmt: --config-dir none is not a folder\n"


@pytest.mark.parametrize("word", ["experiment=demo", "corpus=files", "training.max_steps=5"])
def test_a_value_is_refused_with_the_commands_that_take_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", word]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"nmt: {word} ")
    assert f"nmt settings {word.partition('=')[0]} prints " in message
    assert f"nmt train {word} --cfg job prints all settings with it, and nmt cost {word} estimates" in message


def test_every_choice_of_the_program_is_described() -> None:
    own = {each.word: each.text for group in known_groups() for each in choices(group, find_places()[-1:])}
    known = [f"{group}={name}" for group, names in OWN.items() for name in names]
    assert [word for word in known if not own[word].endswith(".")] == []
