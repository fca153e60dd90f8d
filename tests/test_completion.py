"""nmt completion, in a real bash: what is offered for the beginning of a word."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nmt.cli import main
from nmt.commands import ON_RUNS, ON_SETTINGS, ON_SYSTEMS, PLAIN
from nmt.commands.completion import words
from nmt.compose import OPTIONS
from nmt.config import Config
from nmt.config.reading import known_settings

COMMANDS = [*ON_SETTINGS, *ON_RUNS, *ON_SYSTEMS, *PLAIN]

# What readline does before it calls the function: the line is cut into words, and "=" is a word of its own.
COMPLETE = r"""
source "$1"
COMP_LINE="$2" COMP_POINT=${#2}
read -ra COMP_WORDS <<< "${2//=/ = }"
[[ $2 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { :; }
_nmt && printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)
    return path


def offered(script: Path, line: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-u", "-c", COMPLETE, "bash", script, line],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash(script: Path) -> None:
    for folder in ("runs/demo", "runs/demo two", "runs/other"):
        (script.parent / folder).mkdir(parents=True)
        (script.parent / folder / "config.yaml").touch()
    (script.parent / "conf" / "corpus").mkdir(parents=True)
    (script.parent / "conf" / "corpus" / "my-own.yaml").touch()
    (script.parent / "conf" / "corpus" / "my two.yaml").touch()
    (script.parent / "conf" / "corpus" / "my-folder.yaml").mkdir()
    (script.parent / "conf" / "corpus" / "my-lost.yaml").symlink_to("nowhere")
    assert offered(script, "nmt ") == [*COMMANDS, "--help", "--version"]
    assert offered(script, "nmt tra") == ["train", "translate"]
    assert offered(script, "nmt train training.max_s") == ["training.max_steps="]
    assert offered(script, "nmt train experiment=dem") == ["demo"]
    assert offered(script, "nmt prepare corpus=my") == ["my-own"]
    assert offered(script, "nmt prepare training.") == []
    assert offered(script, "nmt train --proc") == ["--processes"]
    assert sorted(offered(script, "nmt train dem")) == ["demo", r"demo\ two"]
    assert offered(script, "nmt translate demo decoding.beam") == ["decoding.beam_size="]
    assert offered(script, "nmt translate demo training.") == []
    assert offered(script, "nmt evaluate o") == ["other"]
    assert offered(script, "nmt evaluate other --d") == ["--dial"]
    assert offered(script, "nmt evaluate other --split ") == ["test", "dev"]
    assert offered(script, "nmt evaluate other --split d") == ["dev"]
    assert offered(script, "nmt evaluate other --show ") != ["test", "dev"]
    assert sorted(offered(script, "nmt compare other dem")) == ["demo", r"demo\ two"]
    assert offered(script, "nmt compare other demo --sp") == ["--split"]
    assert offered(script, "nmt compare other demo --split ") == ["test", "dev"]
    assert offered(script, "nmt compare other demo decoding.beam") == ["decoding.beam_size="]
    assert offered(script, "nmt cost other --device c") == ["cpu", "cuda"]
    assert offered(script, "nmt settings training.max_st") == ["training.max_steps"]
    assert offered(script, "nmt settings exp") == ["experiment"]
    assert offered(script, "nmt settings --conf") == ["--config-dir"]
    assert offered(script, "nmt completion z") == ["zsh"]
    assert offered(script, "nmt nothing ") == []


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_without_runs(script: Path) -> None:
    """Where no file matches, the pattern itself is no run and no choice."""
    assert offered(script, "nmt translate run") == []
    assert offered(script, "nmt translate *") == []
    assert offered(script, "nmt train *") == []


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_is_given_every_word(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert " ".join(words(command)) in out
    assert all(each in out for each in ("split", "test dev", "device", "cpu cuda"))
    assert "{{" not in out
    assert "}}" not in out.replace("}}}", "")


@pytest.mark.slow
def test_words() -> None:
    assert {f"{key}=" for key in known_settings(Config)} <= set(words("train")) & set(words("cost"))
    assert all(f"--{option}" in words("train") for option in ("config-dir", "multirun", "cfg", "processes"))
    assert OPTIONS.count("--") == 3
    assert "experiment=demo" in words("train")
    assert "-o" in words("translate")
    assert "--explain" in words("experts")
    for command in COMMANDS:
        assert "--help" in words(command)
        assert len(set(words(command))) == len(words(command))


def test_files_of_the_working_directory_are_looked_up_when_a_word_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script does not have their names, as it is used in other folders, too."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine-alone.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "experiment=demo" in script
    assert "mine-alone" not in script


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
