"""The command line: exit statuses, one line for every mistake, help, and Hydra's own options."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nmt
import nmt.cli
import nmt.decoding.translator
from tests.toy import Cli, settings, write_corpus

COMMANDS = ("prepare", "train", "distill", "translate", "score", "evaluate", "experts", "export")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


# -------------------------------------------------------------------------------------------- usage and settings


def test_without_a_command_the_usage_is_shown(cli: Cli) -> None:
    assert cli() == 2
    assert "usage: nmt COMMAND" in cli.out
    assert cli("--help") == 0
    assert all(f"nmt {command}" in cli.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_examples(cli: Cli, command: str, option: str) -> None:
    assert cli(command, option) == 0
    assert f"usage: nmt {command}" in cli.out
    assert cli.out.count(f"  nmt {command} ") >= 2
    assert cli.err == ""
    assert "{{" not in cli.out


def test_an_unknown_command(cli: Cli) -> None:
    cli.refuses(2, "trane", says=("unknown command 'trane'", "did you mean train?", "prepare, train"))
    cli.refuses(2, "xyzzy", says=("unknown command 'xyzzy'", "prepare, train"))


@pytest.mark.parametrize("program", [["-m", "nmt"], ["-m", "nmt.cli"]])
def test_the_version(cli: Cli, program: list[str]) -> None:
    done = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True, check=True)
    assert cli("--version") == 0
    assert cli.out == done.stdout == f"nmt {nmt.__version__}\n"


def test_help_waits_for_no_pytorch() -> None:
    code = "import sys; from nmt.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--config-path"),
        ("train", "--experimental-rerun=x"),
        ("train", "--hydra-help"),
        ("train", "--run"),
        ("train", "--process"),
        ("prepare", "--process"),
        ("prepare", "--resolve"),
    ],
)
def test_an_unknown_option(cli: Cli, command: str, option: str) -> None:
    takes = "--config-dir DIR, --multirun, --cfg job and --help"
    cli.refuses(2, command, "experiment=demo", option, says=(f"unknown option {option}; nmt {command} takes", takes))
    cli.refuses(2, "cost", "experiment=demo", option, says=(f"unknown option {option}",))
    cli.refuses(2, command, "--cfg", "hydra", says=("invalid choice: 'hydra'",))
    cli.refuses(2, command, "--config-dir", says=("--config-dir: expected one argument",))


@pytest.mark.parametrize("command", ["prepare", "train", "cost"])
def test_config_dir_works_wherever_settings_are_composed(cli: Cli, command: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.yaml").write_text("name: own\n")
    for arguments in (["--config-dir", str(tmp_path), "corpus=mine"], ["corpus=mine", f"--config-dir={tmp_path}"]):
        assert cli(command, *arguments, "--cfg", "job") == 0, cli.err
        assert "name: own\n" in cli.out
    cli.refuses(2, command, "corpus=mine", says=("there is no corpus=mine",))


def test_cost_of_a_run_takes_no_options_of_composing(cli: Cli, run: Path) -> None:
    cli.refuses(2, "cost", str(run), "--multirun", says=("are for settings", str(run)))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.max_step=5"], ("training.max_step", "did you mean training.max_steps?")),
        (["model.moe.num_expert=5"], ("model.moe.num_expert", "did you mean model.moe.num_experts?")),
        (["nonsense=1"], ("nonsense",)),
        (["training.max_steps=many"], ("training.max_steps", "many")),
        (["model.tie_embeddings=perhaps"], ("model.tie_embeddings", "perhaps")),
        (["model.moe.k=99", "model.moe.num_experts=4"], ("model.moe.k=99", "num_experts=4")),
        (["training.learning_rate=nan"], ("training.learning_rate=nan",)),
        (["training.max_steps=0"], ("training.max_steps=0", "at least 1")),
        (["model.attention.wiring=criss-cross"], ("model.attention.wiring=criss-cross", "parallel")),
        (["training.max_steps="], ("training.max_steps",)),
        (["training.max_steps"], ("training.max_steps",)),
        (["model.moe.k=[1"], ("model.moe.k",)),
        (["run.name=a/b"], ("run.name",)),
        (["experiment=dema"], ("dema", "demo", "wmt14_en_de_s17")),
        (["model=smal"], ("smal", "small")),
        ([], ("run.name is empty",)),
    ],
    ids=str,
)
def test_mistakes_in_settings(cli: Cli, overrides: list[str], says: tuple[str, ...]) -> None:
    cli.refuses(2, "train", *overrides, says=says)


def test_cfg_job_prints_the_settings_and_does_nothing(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", *settings(tmp_path, "run.name=a", "training.max_steps=77"), "--cfg", "job") == 0
    assert "max_steps: 77" in cli.out
    assert os.listdir(tmp_path) == []


def test_multirun_trains_one_run_after_the_other(cli: Cli, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hydra leaves its multirun.yaml in the working directory.
    monkeypatch.chdir(corpus)
    changes = ("run.name=k${model.moe.k}", "model.moe.k=1,2", "training.max_steps=1")
    assert cli("train", "--multirun", *settings(corpus, *changes)) == 0, cli.err
    assert cli.out.split() == [str(corpus / "k1"), str(corpus / "k2")]
    assert all((corpus / name / "checkpoints" / "step-00000001").is_dir() for name in ("k1", "k2"))


def test_a_mistake_in_one_job_of_a_multirun(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ("run.name=k", "model.moe.k=98,99", "training.max_steps=1")
    cli.refuses(2, "train", "--multirun", *settings(tmp_path, *changes), says=("model.moe.k=98",))


# --------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_missing_file_and_misaligned_files(cli: Cli, tmp_path: Path, command: str) -> None:
    arguments = (command, *settings(tmp_path, "run.name=a", "training.max_steps=1"))
    cli.refuses(3, *arguments, says=(str(tmp_path / "train.en"),), progress=True)
    write_corpus(tmp_path)
    with (tmp_path / "train.de").open("a") as file:
        file.write("eins zu viel\n")
    cli.refuses(3, *arguments, says=("train.en", "train.de", "80", "81"), progress=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_text_and_settings_alone(cli: Cli, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    arguments = settings(tmp_path, "run.name=a", "training.max_steps=1")
    assert cli("train", *arguments) == 0
    assert cli.out == f"{tmp_path / 'a'}\n"
    changed = (*arguments, "training.learning_rate=0.5")
    cli.refuses(4, "train", *changed, says=("training.learning_rate was 0.002, now 0.5",), progress=True)
    write_corpus(tmp_path, seed=9)
    cli.refuses(3, "train", *arguments, says=("other text",), progress=True)


# --------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("command", ["translate", "evaluate", "experts"])
def test_a_run_that_does_not_exist_or_is_not_named(cli: Cli, command: str, tmp_path: Path) -> None:
    cli.refuses(4, command, str(tmp_path / "none"), says=("none is not a run",))
    cli.refuses(2, command, says=("RUN", f"nmt {command} --help"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps=3", ("training.max_steps=3", "only decoding.* may be changed")),
        ("training.adam_beta1=0.5", ("training.adam_beta1=0.5", "only decoding.* may be changed")),
        ("decoding.beam_size=0", ("decoding.beam_size=0", "at least 1")),
        ("decoding.beam_size=many", ("decoding.beam_size", "many")),
        ("decoding.beam_sice=3", ("decoding.beam_sice", "did you mean decoding.beam_size?")),
        ("decoding.alpha=[", ("decoding.alpha",)),
        ("decoding.checkpoint=newest", ("decoding.checkpoint=newest",)),
        ("decoding.device=tpu", ("decoding.device=tpu",)),
    ],
)
def test_mistakes_in_decoding_settings(cli: Cli, run: Path, override: str, says: tuple[str, ...]) -> None:
    cli.refuses(2, "translate", str(run), override, says=says)


def test_a_checkpoint_that_does_not_exist(cli: Cli, run: Path) -> None:
    cli.refuses(4, "experts", str(run), "decoding.checkpoint=5", says=("step 5: choose one of 2, 4, 6, 8",))


@pytest.mark.parametrize("command", ["translate", "evaluate", "experts"])
def test_a_damaged_checkpoint(cli: Cli, copy: Path, command: str) -> None:
    [path] = (copy / "checkpoints" / "step-00000008" / "model").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (copy / "in").write_text("the dog\n")
    extra = [str(copy / "in")] if command == "translate" else []
    arguments = (command, str(copy), *extra, "decoding.checkpoint=last")
    cli.refuses(4, *arguments, says=("step-00000008", "sha256 differs", "decoding.checkpoint=STEP"))


def test_a_swapped_vocabulary_of_the_same_size(cli: Cli, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    write_corpus(folder, seed=5)
    assert cli("prepare", *settings(folder)) == 0
    other = Path(cli.out.strip()) / "subwords.model"
    assert other.read_bytes() != (copy / "subwords.model").read_bytes()
    shutil.copy(other, copy / "subwords.model")
    cli.refuses(4, "evaluate", str(copy), says=("another vocabulary",))
    (copy / "subwords.model").write_bytes(b"no model")
    cli.refuses(4, "evaluate", str(copy), says=("subwords.model",))


@pytest.mark.parametrize("content", ["", "[", "model: 3", "a: &a [1]\nb: [*a, *a]", "\x00", "x" * (1 << 20) + "x"])
def test_a_damaged_configuration(cli: Cli, copy: Path, content: str) -> None:
    (copy / "config.yaml").write_text(content)
    cli.refuses(4, "evaluate", str(copy), says=("config.yaml is damaged",))


def test_a_configuration_of_a_newer_version(cli: Cli, copy: Path) -> None:
    (copy / "config.yaml").write_text("training:\n  ema_decay: 0.9")
    says = (
        "config.yaml has training.ema_decay, a setting that this version of nmt does not have",
        "use the newer version",
    )
    cli.refuses(4, "evaluate", str(copy), says=says)


def test_settings_that_are_gone_are_dropped_from_an_old_run(cli: Cli, copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("training:\n", "training:\n  bands: 4\n  alike: 2\n", 1))
    assert cli("cost", str(copy)) == 0
    cli.refuses(2, "cost", "training.bands=4", says=("unknown setting training.bands",))


def test_a_stored_configuration_is_not_looked_up_anywhere(
    cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of ours would show in an error, and in what is made of the run."""
    monkeypatch.setenv("SECRET", "hunter2")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("  device: cpu", "  device: ${oc.env:SECRET}"))
    assert "oc.env" in (copy / "config.yaml").read_text()
    cli.refuses(4, "evaluate", str(copy), says=("device=${oc.env:SECRET}",))


def test_a_configuration_of_another_size(cli: Cli, copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("num_experts: 4", "num_experts: 5"))
    cli.refuses(4, "evaluate", str(copy), says=("does not fit the run's config.yaml",))


def test_a_run_without_experts_has_no_report(cli: Cli, copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("num_experts: 4", "num_experts: 0"))
    cli.refuses(2, "experts", str(copy), says=("has no experts",))


# ----------------------------------------------------------------------------------------------- settings and files


def test_a_file_may_be_called_like_a_setting(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.b=c", "run.v1=final.en"):
        (tmp_path / name).write_text("the dog\n")
        assert cli("translate", str(run), name, "decoding.beam_size=1") == 0, cli.err
        assert cli.out.count("\n") == 1
    cli.refuses(3, "translate", str(run), "x.y=1", says=("cannot read x.y=1",))
    cli.refuses(2, "translate", str(run), "run.v2=1", says=("run.v2=1: only decoding.*",))
    # A setting that there is stays one, whatever files there are.
    (tmp_path / "decoding.beam_size=0").write_text("the dog\n")
    cli.refuses(2, "translate", str(run), "decoding.beam_size=0", says=("decoding.beam_size=0 must be",))


@pytest.mark.slow
def test_the_value_of_an_option_may_look_like_a_setting(cli: Cli, run: Path, tmp_path: Path) -> None:
    for sentence in ("x.y=1 is true.", "decoding.beam_size=0"):
        assert cli("experts", str(run), "--explain", sentence, "decoding.beam_size=1") == 0, cli.err
        assert cli("experts", str(run), f"--explain={sentence}") == 0, cli.err
    (tmp_path / "in").write_text("the dog\n")
    output = tmp_path / "decoding.out=1"
    assert cli("translate", "-o", str(output), str(run), str(tmp_path / "in")) == 0, cli.err
    assert output.is_file()


def test_words_after_two_dashes_are_files(cli: Cli, run: Path) -> None:
    cli.refuses(3, "translate", str(run), "decoding.beam_size=1", "--", "-x", says=("cannot read -x",))
    cli.refuses(3, "translate", "--", str(run), "-x", says=("cannot read -x",))


# ------------------------------------------------------------------------------------------------- standard streams


def in_a_shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=given, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--version", "--help", "train --help", "train run.name=a --cfg job"])
def test_a_closed_output_is_an_error_of_one_line(command: str) -> None:
    done = in_a_shell(f"{sys.executable} -m nmt {command} >&-")
    assert (done.returncode, done.stderr) == (6, "nmt: standard input or output is closed\n")


@pytest.mark.slow
def test_a_closed_input_is_an_error_of_one_line(run: Path) -> None:
    done = in_a_shell(f"{sys.executable} -m nmt translate {run} <&-")
    # Nothing can be read from what stands in for it, as of a file that cannot be read.
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("nmt: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_with_standard_error_closed_nothing_of_it_comes_out_elsewhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("the dog\na meadow\n")
    translated = in_a_shell(f"{sys.executable} -m nmt translate {run} {tmp_path / 'in'} decoding.beam_size=1 2>&-")
    assert (translated.returncode, translated.stdout.count("\n")) == (0, 2)
    refused = in_a_shell(f"{sys.executable} -m nmt translate {run} {tmp_path / 'none'} 2>&-")
    assert (refused.returncode, refused.stdout) == (3, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "Zo\\xeb-\\u6771"), ("latin-1", "Zoë-\\u6771"), ("utf-8", "Zoë-東")]
)
def test_what_a_terminal_cannot_show_is_printed_as_an_escape(encoding: str, shown: str) -> None:
    command = [sys.executable, "-m", "nmt", "train", "run.name=Zoë-東", "--cfg", "job"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert f"name: {shown}\n" in done.stdout.decode(encoding)


# ------------------------------------------------------------------------------------------ translate and evaluate


def test_files_that_cannot_be_translated(cli: Cli, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    cli.refuses(3, "translate", str(run), str(source), says=("cannot read", str(source)))
    source.write_text("the dog\n")
    cli.refuses(2, "translate", str(run), str(source), "-o", str(source), says=("is the input",))
    cli.refuses(6, "translate", str(run), str(source), "-o", str(tmp_path / "no" / "out"), says=("cannot write",))
    cli.refuses(2, "translate", str(run), str(source), "--fast", says=("--fast",))
    assert source.read_text() == "the dog\n"
    assert os.listdir(tmp_path) == ["in"]


def test_unequal_line_counts_are_refused_before_any_translation(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nmt.decoding.translator.Translator, "load", never)
    source, reference = tmp_path / "source", tmp_path / "reference"
    source.write_bytes(b"a\x85\rb\n\nc\n")
    reference.write_bytes(b"a\nb\n")
    arguments = ("evaluate", str(run), "--source", str(source), "--reference", str(reference))
    cli.refuses(3, *arguments, says=("has 3 lines", "has 2"))
    cli.refuses(2, *arguments[:4], says=("has no --reference",))
    cli.refuses(3, *arguments[:5], str(tmp_path / "none"), says=("cannot read",))


def test_evaluating_a_file_with_odd_lines(cli: Cli, run: Path, tmp_path: Path) -> None:
    source, reference = tmp_path / "source.en", tmp_path / "reference.de"
    source.write_bytes("the\rdog\n\na\u2028meadow".encode())
    reference.write_bytes("der Hund\n\neine\x85Wiese\n".encode())
    arguments = ("evaluate", str(run), "--source", str(source), "--reference", str(reference))
    assert cli(*arguments) == 0, cli.err
    assert re.search(r"^source.en +3 ", cli.out, re.M)
    (hypotheses,) = (run / "report").glob("set-source.en-*.hypotheses")
    assert hypotheses.read_bytes().count(b"\n") == 3


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_mistake(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("the dog\n" * 300)
    translate = f"{sys.executable} -m nmt.cli translate {run} {tmp_path / 'in'} decoding.beam_size=1"
    command = f"set -o pipefail; {translate} decoding.batch_tokens=1 | head -1"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 141
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.slow
def test_of_several_processes_the_main_one_reports_the_mistake_of_all(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli("train", "run.name=a", "training.max_steps=0") == 2
        assert cli.err.count("\n") == lines


@pytest.mark.parametrize(("ends", "expected"), [(7, 7), (4, 4), (RuntimeError("a bug"), 1), (KeyboardInterrupt(), 1)])
def test_after_an_error_one_of_several_processes_leaves_without_pythons_way_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ends: int | BaseException, expected: int
) -> None:
    """On which threads of PyTorch that still wait for the others now and then abort it."""
    left = []

    def main() -> int:
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setattr(nmt.cli, "main", main)
    monkeypatch.setattr("os._exit", left.append)
    nmt.cli._main_of_several()
    assert left == [expected]
    assert ("Traceback" in capfd.readouterr().err) == isinstance(ends, BaseException)


@pytest.mark.parametrize("ends", [0, SystemExit(143)])
def test_in_good_order_it_leaves_as_any_program(monkeypatch: pytest.MonkeyPatch, ends: int | SystemExit) -> None:
    def main() -> int:
        if isinstance(ends, SystemExit):
            raise ends
        return ends

    monkeypatch.setattr(nmt.cli, "main", main)
    with pytest.raises(SystemExit) as left:
        nmt.cli._main_of_several()
    assert left.value.code == (ends.code if isinstance(ends, SystemExit) else ends)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("translate", "in", "out"), "name the output with -o"),
        (("translate", "in", "--beam", "2"), "did you mean decoding.beam_size=..?"),
        (("evaluate", "--refrence", "x"), "did you mean --reference?"),
        (("experts", "--explian", "x"), "did you mean --explain?"),
    ],
)
def test_an_unknown_word_is_told_with_what_was_meant(
    cli: Cli, run: Path, arguments: tuple[str, ...], hint: str
) -> None:
    command, *rest = arguments
    cli.refuses(2, command, str(run), *rest, says=("unrecognized arguments", hint))


def test_a_name_that_is_nearly_a_run_is_told(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "demo-en-de").mkdir(parents=True)
    (tmp_path / "runs" / "demo-en-de" / "config.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    cli.refuses(4, "translate", "demo", says=("did you mean demo-en-de?",))
