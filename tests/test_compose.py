"""From words to settings: text stays what was typed, nothing unknown is taken, every mistake is told in our words."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nmt.compose import Asked, asked, choices_text, compose_config, jobs, settings_text
from nmt.config import Config
from nmt.config.reading import parse_yaml, read_value, written
from nmt.errors import UserError
from nmt.run import RunDirectory

TEXT = [
    "2024_11_26",
    "1e3",
    "true",
    "no",
    "null",
    "007",
    "~",
    "0x1f",
    "12:30:00",
    ".5",
    "a b (c)",
    "x=y",
    "it's",
    "[a]",
]


def refusal(*words: str) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        compose_config(words)
    message = str(refused.value)
    assert "\n" not in message
    assert not {"Hydra", "OmegaConf", "Interpolation", "LexerNo", "mismatched"} & set(message.split())
    return message


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------ text stays text


@pytest.mark.parametrize("text", TEXT)
def test_text_on_the_command_line_is_what_was_typed(text: str) -> None:
    assert compose_config([f"run.name={text}"]).run.name == text


@pytest.mark.parametrize("text", [each for each in TEXT if each not in ("~", "null", "[a]", "a b (c)", "it's")])
def test_text_in_a_file_is_what_stands_there(here: Path, text: str) -> None:
    write(here / "conf" / "corpus" / "mine.yaml", f"name: {text}\nsource: files\ntrain:\n  pairs: [{text}]\n")
    corpus = compose_config(["corpus=mine"]).corpus
    assert (corpus.name, corpus.train.pairs) == (text, [text])


def test_a_language_called_no(here: Path) -> None:
    write(here / "conf" / "corpus" / "mine.yaml", "source_language: en\ntarget_language: no\n")
    assert compose_config(["corpus=mine"]).corpus.target_language == "no"


@given(st.text())
@example('a\\b"c\\')
@example("a,b")
@example("'")
def test_any_text_can_be_written(text: str) -> None:
    for value, key in ((text, "corpus.root"), ([text, "x", text], "corpus.train.source")):
        if "${" not in text and "\0" not in text:
            assert read_value(Config, key, written(value)) == value


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("corpus.train.pairs=[a=b.en, 'c, d.en', with space (1)=x.en, ünï🎉.en]", None),
        ("corpus.train.pairs=[2024_11,1e3,no]", ["2024_11", "1e3", "no"]),
        ("corpus.train.pairs=[]", []),
        ("corpus.train={pairs: [a]}", ["a"]),
        ("corpus.train={from_train: 0}", []),
    ],
)
def test_lists(word: str, value: list[str] | None) -> None:
    files = compose_config([word]).corpus.train.pairs
    assert files == (["a=b.en", "c, d.en", "with space (1)=x.en", "ünï🎉.en"] if value is None else value)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("training.max_steps=1_000", lambda config: config.training.max_steps == 1000),
        ("training.learning_rate=2.0e-3", lambda config: config.training.learning_rate == 0.002),
        ("+training.max_steps=7", lambda config: config.training.max_steps == 7),
        ("corpus.filters.blank=0", lambda config: config.corpus.filters.blank is False),
        ("model.moe.w_load_decoder=null", lambda config: config.model.moe.w_load_decoder is None),
        ("model.moe.hidden_sizes=[8, 16]", lambda config: config.model.moe.hidden_sizes == [8, 16]),
        ("model.moe.num_experts_at={encoder.2: 30}", lambda config: config.model.moe.num_experts_at["encoder.2"] == 30),
        ("training.warmup_steps=${training.log_every}", lambda config: config.training.warmup_steps == 50),
        ("run.name=k${model.moe.k}", lambda config: config.run.name == "k4"),
        ('run.name="a, b"', lambda config: config.run.name == "a, b"),
        ("experiment=null", lambda config: config.run.name == ""),
    ],
)
def test_values(word: str, read) -> None:
    assert read(compose_config([word]))


def test_the_text_of_all_settings_reads_back() -> None:
    config = compose_config(["experiment=demo", "run.name=1e3", "corpus.target_language=no", "corpus.root=2024_11_26"])
    assert Config.from_dict(parse_yaml(settings_text(config))) == config
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(yaml.safe_load(settings_text(config))) == config


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("training.learning_rat=0.1", "unknown setting training.learning_rat; did you mean training.learning_rate?"),
        ("+training.learning_rat=0.1", "unknown setting training.learning_rat; did you mean training.learning_rate?"),
        ("++corpus.filters.max_len=5", "unknown setting corpus.filters.max_len"),
        ("+foo=1", "unknown setting foo"),
        ("+init=runs/mine", "unknown setting init"),
        ("+max_steps=10", "did you mean training.max_steps?"),
        ("+experiments=demo", "did you mean experiment?"),
        ("+experiment=demo", "write it without +, experiment=demo"),
        ("+corpus=files", "write it without +, corpus=files"),
        ("~training", "~training: a setting cannot be removed"),
        ("~training.max_steps", "~training.max_steps: a setting cannot be removed"),
        ("decoding.n_best=5", "unknown setting decoding.n_best (nmt settings"),
        ("trainin.max_step=5", "unknown setting trainin.max_step; did you mean training.max_steps?"),
        ("hydra.run.dir=x", "unknown setting hydra.run.dir"),
        ("model@x=small", "unknown setting model@x"),
        ("training.max_steps=many", "training.max_steps=many is not a whole number"),
        ("training.max_steps=1.5", "training.max_steps=1.5 is not a whole number"),
        ("training.max_steps=", "training.max_steps= is not a whole number"),
        ("training.max_steps=²", "training.max_steps=² is not a whole number"),
        ("training.max_steps=" + "9" * 5000, "999... is not a whole number"),
        ("training.learning_rate=fast", "training.learning_rate=fast is not a number"),
        ("model.tie_embeddings=perhaps", "model.tie_embeddings=perhaps is not true or false"),
        ("training.max_steps=[1]", "training.max_steps=[1] is not a whole number"),
        ("training=5", "there is no training=5"),
        ("run=x", "run=x is not a set of settings, such as run.name"),
        ("training.max_steps", "training.max_steps is not KEY=VALUE; did you mean training.max_steps=VALUE?"),
        ("demo", "demo is not KEY=VALUE; did you mean experiment=demo?"),
        ("=5", "=5 is not KEY=VALUE"),
        ("experiment=dema", "there is no experiment=dema; did you mean demo?"),
        ("model=smal", "there is no model=smal; did you mean small?"),
        ("corpus=mine", "for your own, write conf/corpus/mine.yaml in this folder, or give --config-dir DIR"),
        ("model=", "there is no model=."),
        ("model=null", "there is no model=null."),
        ("corpus=../corpus/files.yaml", "there is no corpus=../corpus/files.yaml"),
        ("corpus.train.source=a.en", "corpus.train.source=a.en is not a list: write it in brackets, [a.en]"),
        ("corpus.train.source=a.en,b.en", "is not a list: write it in brackets, 'corpus.train.source=[a.en,b.en]'"),
        ("corpus.train.source=[a.en", "corpus.train.source=[a.en cannot be read"),
        ("corpus.train.source=[*a]", "put quotes around"),
        ("corpus.train.source=[[a]]", "is not a single value"),
        ("corpus.train.source=[null]", "corpus.train.source has no value"),
        ("corpus.train={sorce: [a]}", "unknown setting corpus.train.sorce; did you mean corpus.train.source?"),
        ("model.moe.num_experts_at=5", "is not a dictionary such as {name: 1}"),
        ("corpus.root='a", "end it with the quote it begins with"),
        ("training.max_steps=4,8", "several values need --multirun"),
        ("run.name=a,b", "several values need --multirun; for a text with commas write 'run.name=\"a,b\"'"),
        ("model=small,moe", "several values need --multirun"),
        ("run.name=${nothing.there}", "run.name: its ${...} has no value"),
        ("run.name=${", "its ${...} has no value"),
        ("model.moe.k=99", "model.moe.k=99 must lie in"),
    ],
    ids=lambda value: value[:40],
)
def test_a_mistake_is_told_in_our_words(word: str, says: str) -> None:
    assert says in refusal(word)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training:\n  max_step: 5\n", "unknown setting training.max_step; did you mean training.max_steps?"),
        ("training:\n  max_steps: many\n", "training.max_steps=many is not a whole number"),
        ("training:\n  max_steps:\n", "training.max_steps has no value"),
        ("corpus:\n  root:\n", "corpus.root has no value: write '' for empty text"),
        ("corpus:\n  train:\n    source: a.en\n", "corpus.train.source=a.en is not a list"),
        ("training: short\n", "training=short is not a set of settings"),
        ("- 5\n", "it has no settings"),
        ("a: [\n", "line 2: "),
        ("run: {name: a}\nrun: {name: b}\n", "line 2: run is set twice"),
        ("run: &x {name: a}\nparallel: *x\n", "line 2: an alias"),
        ("run: !!python/object:os.system {}\n", "line 1: "),
        ("\x00", "unacceptable character"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_name(here: Path, text: str, says: str) -> None:
    write(here / "conf" / "experiment" / "mine.yaml", text)
    message = refusal("experiment=mine")
    assert message.startswith("conf/experiment/mine.yaml: ")
    assert says in message


@pytest.mark.parametrize(
    ("defaults", "says"),
    [
        ("- override /model: smal", "there is no model=smal; did you mean small?"),
        ("- override /modle: small", "modle"),
        ("- smal", "smal"),
    ],
)
def test_a_file_that_chooses_what_is_not_there(here: Path, defaults: str, says: str) -> None:
    write(here / "conf" / "experiment" / "mine.yaml", f"defaults:\n  {defaults}\n")
    message = refusal("experiment=mine")
    assert "mine" in message
    assert says in message


# --------------------------------------------------------------------------------------------------- whose files


def test_files_of_the_working_directory_and_of_config_dir(here: Path) -> None:
    write(here / "conf" / "corpus" / "mine.yaml", "name: a\n")
    write(here / "conf" / "experiment" / "tuned.yaml", "defaults:\n  - override /corpus: mine\nrun:\n  name: tuned\n")
    write(here / "other" / "corpus" / "mine.yaml", "name: b\n")
    assert compose_config(["corpus=mine"]).corpus.name == "a"
    config = compose_config(["experiment=tuned"])
    assert (config.run.name, config.corpus.name) == ("tuned", "a")
    [job] = jobs(asked(["corpus=mine", "--config-dir", "other"]))
    assert job.config.corpus.name == "b"
    # Whoever is started with the arguments of the job sees the same.
    assert asked(job.arguments) == Asked(["corpus=mine"], Path("other"))
    message = refusal("corpus=nine")
    assert "did you mean mine? conf/corpus has mine; " in message
    assert "corpus has europarl_en_fr, europarl_en_fr_both, files, " in message
    assert choices_text("corpus").endswith("; mine (in conf/corpus)")
    with pytest.raises(UserError, match="--config-dir none is not a folder"):
        asked(["--config-dir", "none"])


def test_a_file_that_hides_one_of_the_program_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "conf" / "model" / "small.yaml", "hidden_size: 64\ncell_size: 64\n")
    write(here / "conf" / "config.yaml", "defaults: [nothing]\n")
    assert compose_config(["model=small"]).model.hidden_size == 64
    said = capsys.readouterr().err
    assert said == "conf/model/small.yaml is used instead of the program's own file of this name\n"
    compose_config(["model=medium"])
    assert capsys.readouterr().err == ""


def test_the_conf_of_another_project_is_no_matter(here: Path) -> None:
    write(here / "conf" / "config.yaml", "db: mysql\n")
    write(here / "conf" / "db" / "mysql.yaml", "driver: x\n")
    assert compose_config([]).corpus.source == "phrasebook"
    assert "unknown setting db" in refusal("db=mysql")


# ------------------------------------------------------------------------------------------------------ several


@pytest.mark.slow
def test_every_combination_once_in_order() -> None:
    words = ["run.name=k${model.moe.k}-1e3,b_1", "model=small,moe", "corpus.train.pairs=[a,b],[c]", "model.moe.k=1,2"]
    found = jobs(Asked(words, multirun=True))
    assert len(found) == 16
    assert [job.config.run.name for job in found[:3]] == ["k1-1e3", "k2-1e3", "k1-1e3"]
    assert [job.config.run.name for job in found[-1:]] == ["b_1"]
    assert [job.config.corpus.train.pairs for job in found[:4]] == [["a", "b"], ["a", "b"], ["c"], ["c"]]
    assert {job.config.model.hidden_size for job in found} == {128, 512}
    # Every fifth: both values of each word.
    for job in found[::5]:
        assert compose_config(job.arguments) == job.config


@pytest.mark.parametrize("flag", ["--multirun", "-m"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_option_may_stand_anywhere(flag: str, place: int) -> None:
    words = ["run.name=a", "model.moe.k=1,2"]
    arguments = [*words[:place], flag, *words[place:]]
    assert asked(arguments) == Asked(words, multirun=True)
    assert asked([*arguments, "--cfg", "job"]).only_print


def test_a_mistake_in_one_of_several_is_found_before_the_first() -> None:
    with pytest.raises(ValueError, match=r"model.moe.k=99"):
        jobs(Asked(["model.moe.k=1,99"], multirun=True))


def test_quotes_and_brackets_hold_values_together() -> None:
    words = ["""run.name="a, b",'c,d',e""", "model.moe.num_experts_at={encoder.2: 8, decoder.1: 9},{}"]
    found = jobs(Asked(words, multirun=True))
    assert [job.config.run.name for job in found] == ["a, b", "a, b", "c,d", "c,d", "e", "e"]
    assert [len(job.config.model.moe.num_experts_at) for job in found[:2]] == [2, 0]


def test_the_advice_can_be_pasted() -> None:
    advice = refusal("run.name=a,b").rpartition(" write ")[2]
    assert compose_config(shlex.split(advice)).run.name == "a,b"
    advice = refusal("corpus.train.pairs=a,b").rpartition("brackets, ")[2]
    assert compose_config(shlex.split(advice)).corpus.train.pairs == ["a", "b"]


# --------------------------------------------------------------------------------------- the network of another run


def test_an_inherited_network_is_that_of_the_run_with_changes_on_top(run: Path) -> None:
    own = RunDirectory(run).config().model
    start = f"run.start_from={run}"
    assert compose_config(["model=inherited", start]).model == own
    assert compose_config([start]).model == Config().model != own
    changed = compose_config(["model.dropout=0.25", start, "model=inherited", "model.moe.output_masking=0.1"]).model
    assert changed == replace(own, dropout=0.25, moe=replace(own.moe, output_masking=0.1))


def test_a_network_can_be_inherited_in_a_file(run: Path, here: Path) -> None:
    text = f"# @package _global_\ndefaults: [override /model: inherited]\nrun: {{start_from: {run}}}\n"
    write(here / "conf" / "experiment" / "mine.yaml", f"{text}model: {{dropout: 0.75}}\n")
    assert compose_config(["experiment=mine"]).model == replace(RunDirectory(run).config().model, dropout=0.75)


def test_a_network_is_inherited_only_from_a_run(here: Path) -> None:
    assert refusal("model=inherited").startswith("model=inherited takes the network of another run: name that run")
    assert refusal("model=inherited", "run.start_from=gone").startswith("run.start_from=gone: gone is not a run")
