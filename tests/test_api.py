"""import nmt: what it offers, that it loads nothing before it is used, and that its calls do not meet."""

import ast
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import nmt
import nmt.api
import nmt.commands.train
from nmt.api import TranslateOptions
from nmt.cli import main
from nmt.config.reading import UnknownSettingError
from nmt.data.subwords import Subwords
from nmt.decoding.translation import Options
from nmt.evaluation.perplexity import perplexity
from nmt.parallel.mesh import World
from tests.toy import toy_config, train

LINES = ["the small dog runs", "", "over a green meadow", "...", "this morning"]


@pytest.fixture(scope="module")
def model(run: Path) -> nmt.Model:
    return nmt.load(run)


@pytest.fixture(scope="module")
def pairs(run: Path) -> tuple[list[str], list[str]]:
    return tuple((run / "text" / f"test.{side}").read_text().split("\n")[:-1] for side in ("source", "target"))


def refused(*arguments: Any, of: Any, kind: type[nmt.UserError] = nmt.UserError, **options: Any) -> str:
    """The message, of one line, with which a call is refused."""
    with pytest.raises(kind) as error:
        of(*arguments, **options)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- members


def test_members() -> None:
    assert set(nmt.__all__) <= set(dir(nmt))
    for name in nmt.__all__:
        assert getattr(nmt, name) is not None
    assert set(nmt._HOME_OF) == set(nmt.__all__) - {"__version__"}
    for name, home in nmt._HOME_OF.items():
        assert getattr(nmt, name) is getattr(sys.modules[home], name)
    with pytest.raises(AttributeError, match="module 'nmt' has no attribute 'nothing'"):
        _ = nmt.nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    block, _ = (node for node in ast.parse(Path(nmt.__file__).read_text()).body if isinstance(node, ast.If))
    assert {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    } == set(nmt._HOME_OF.items())
    assert (Path(nmt.__file__).parent / "py.typed").is_file()


def test_errors_are_one_tree() -> None:
    errors = {getattr(nmt, name) for name in nmt.__all__ if name.endswith("Error")}
    assert all(issubclass(each, nmt.UserError) for each in errors)
    assert issubclass(nmt.UserError, ValueError)
    every = {each for each in vars(nmt.errors).values() if isinstance(each, type) and issubclass(each, nmt.UserError)}
    assert errors == every
    tree = nmt.errors.__doc__
    assert all(f"{each.__name__} " in tree and f" {each.status} " in tree for each in errors)


def loaded(code: str, cwd: Path) -> list[str]:
    code = f"import sys; before = set(sys.modules); {code}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_nothing_is_loaded_before_it_is_used(tmp_path: Path) -> None:
    modules = loaded("import nmt; dir(nmt); nmt.__version__", tmp_path)
    assert [name for name in modules if name.partition(".")[0] == "nmt"] == ["nmt"]
    assert not {"torch", "numpy", "yaml", "dataclasses", "typing"} & set(modules)
    modules = loaded("import nmt; nmt.Config.from_dict({}); nmt.UserError", tmp_path)
    assert "nmt.config" in modules
    assert not {"torch", "numpy", "nmt.api"} & set(modules)


# ------------------------------------------------------------------------------------------------------- translating


def test_a_text_gives_one_and_a_list_gives_a_list(model: nmt.Model) -> None:
    found = model.translate(LINES)
    assert [type(each) for each in found] == [nmt.Translation] * len(LINES)
    assert [found[place].text for place in (1, 3)] == ["", "..."]
    assert model.translate(tuple(LINES)) == found
    for line, each in zip(LINES, found, strict=True):
        alone = model.translate(line)
        assert isinstance(alone, nmt.Translation)
        assert alone.text == each.text
        assert alone.score == pytest.approx(each.score, rel=1e-4)
    assert model.translate([]) == []
    assert model.translate("").text == ""
    with pytest.raises(FrozenInstanceError):
        found[0].text = "other"


def test_run_export_and_command_line_give_the_same_text(run: Path, model: nmt.Model, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in LINES))
    assert main(["translate", str(run), str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    expected = (tmp_path / "out").read_text().split("\n")[:-1]
    assert [each.text for each in model.translate(LINES)] == expected
    exported = nmt.load(tmp_path / "exported")
    assert [each.text for each in exported.translate(LINES)] == expected
    assert exported.steps == model.steps
    assert (model.path, exported.path) == (run, tmp_path / "exported")
    assert repr(model) == f"<nmt.Model {run}: en to de, step {model.steps[0]}>"


@pytest.mark.slow
def test_options_hold_for_one_call(model: nmt.Model) -> None:
    before = model.translate(LINES)
    for options in ({"beam_size": 1}, {"alpha": 5.0}, {"max_length_ratio": 0.1}, {"experts_per_token": 1}):
        assert model.translate(LINES, **options) != before, options
        assert model.translate(LINES) == before
    (best,) = model.translate(LINES[:1], n_best=3, attention=True, prune_margin=0.0)
    assert best.text == model.translate(LINES[0], prune_margin=0.0).text
    assert len(best.hypotheses) == 3
    for each in best.hypotheses:
        assert isinstance(each, nmt.TextHypothesis)
        assert each.attention.shape == (len(each.pieces), len(best.source_pieces))


def test_options_are_those_of_the_translator() -> None:
    own = {each.name: each.type for each in fields(Options) if each.name not in ("direction", "tag")}
    assert get_type_hints(TranslateOptions) == own


@pytest.mark.slow
def test_threads_do_not_meet(model: nmt.Model, pairs: tuple[list[str], list[str]]) -> None:
    """Every call gives in the company of others what it gives alone."""
    calls = [
        lambda: model.translate(LINES),
        lambda: model.translate(LINES, experts_per_token=1, beam_size=2),
        lambda: model.score(*pairs),
        lambda: model.score(*pairs, experts_per_token=1),
        lambda: model.explain(LINES[0]),
        lambda: model.explain(LINES[2], experts_per_token=1),
    ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: calls[number % len(calls)](), range(4 * len(calls))))
    for number, found in enumerate(together):
        assert found == alone[number % len(calls)]


def test_what_is_loaded_is_chosen(run: Path, model: nmt.Model) -> None:
    assert model.steps == nmt.load(run, checkpoint="best").steps
    assert nmt.load(run, checkpoint=2).steps == [2]
    assert nmt.load(run, checkpoint="last", device="cpu", precision="fp32").steps == [8]
    assert nmt.load(run, checkpoint="average").steps == [4, 6, 8]
    half = nmt.load(run, precision="bf16")
    assert half.translate(LINES[0]).text != ""
    assert half.config.decoding.precision == "bf16"
    assert model.config.decoding.precision == "auto"


# --------------------------------------------------------------------------------- scoring, explaining and the experts


def test_scores_are_the_perplexity(model: nmt.Model, run: Path, pairs: tuple[list[str], list[str]]) -> None:
    found = model.score(*pairs)
    subwords = Subwords.load(run / "subwords.model")
    for each, target in zip(found, pairs[1], strict=True):
        assert len(each.pieces) == len(each.log_probs) == len(subwords.encode(target)) + 1
        assert each.pieces[-1] == "</s>"
        assert each.log_prob == pytest.approx(sum(each.log_probs))
        assert each.perplexity == pytest.approx(math.exp(-each.log_prob / len(each.pieces)))
        assert each.complete
    whole = math.exp(-sum(each.log_prob for each in found) / sum(len(each.pieces) for each in found))
    translator = model._translator
    world = World(torch.device("cpu"))
    assert whole == pytest.approx(perplexity(translator.model, subwords, *pairs, 4096, world).pieces, rel=1e-5)
    alone = model.score(pairs[0][0], pairs[1][0])
    assert alone.log_probs == pytest.approx(found[0].log_probs, abs=1e-4)
    assert model.score([], []) == []


def test_a_hypothesis_has_the_score_that_it_is_given(model: nmt.Model) -> None:
    for each in model.translate(LINES[0], n_best=2).hypotheses:
        scored = model.score(LINES[0], each.text)
        if scored.pieces == each.pieces:
            assert scored.log_probs == pytest.approx(each.log_probs, abs=1e-4)


def test_blank_and_long_pairs_are_scored(model: nmt.Model) -> None:
    blank, long = model.score(["", "the " * 1100], ["", "der " * 1100])
    assert blank.pieces == ("</s>",)
    assert blank.log_prob < 0
    assert (blank.complete, long.complete) == (True, False)
    assert len(long.pieces) == 1025


def test_explanations(model: nmt.Model) -> None:
    found = model.explain(LINES[0])
    assert isinstance(found, nmt.Explanation)
    assert found.translation == model.translate(LINES[0]).text
    assert [each.layer for each in found.layers] == ["encoder.1", "decoder.1"]
    fewer = model.explain(LINES[0], experts_per_token=1)
    assert max(len(slots) for slots in fewer.layers[0].positions) == 1
    assert model.explain(LINES[0]) == found


def test_the_experts(model: nmt.Model, pairs: tuple[list[str], list[str]]) -> None:
    reports = model.experts(*pairs)
    assert [type(each) for each in reports] == [nmt.LayerReport] * 2
    domains = ["odd" if place % 2 else "even" for place in range(len(pairs[0]))]
    assert model.experts(*pairs, domains) != reports
    assert model.experts(*pairs, experts_per_token=1) != reports
    assert json.dumps([str(each) for each in model.experts(*pairs)]) == json.dumps([str(each) for each in reports])


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_wrong_text(model: nmt.Model) -> None:
    assert refused(5, of=model.translate) == "text is an int: give a str, or a list of str"
    assert refused(b"the", of=model.translate) == "text is a bytes: give a str, or a list of str"
    assert refused(["the", None], of=model.translate) == "text[1] is a NoneType: give a list of str"
    assert refused(np.array(["the"]), of=model.translate).startswith("text is a ndarray")
    assert refused(["a"], ["b", "c"], of=model.score) == "1 sources but 2 targets: give one target per source"
    assert "both" in refused("a", ["b"], of=model.score)
    assert "one sentence" in refused(["a"], of=model.explain)
    assert "blank" in refused(" ", of=model.explain, kind=nmt.DataError)
    assert "is empty" in refused([], [], of=model.experts)
    assert "is empty" in refused("a", "b", of=model.experts)
    assert refused(["a"], ["b"], ["x", "y"], of=model.experts).startswith("2 domains for 1 sentence pairs")


def test_wrong_options(model: nmt.Model) -> None:
    assert refused("a", of=model.translate, beam=8) == "unknown option beam; did you mean beam_size?"
    assert "the options are beam_size" in refused("a", of=model.translate, qqqq=8)
    assert refused("a", of=model.translate, beam_size=0) == "beam_size=0 must be at least 1"
    assert refused("a", of=model.translate, beam_size="4") == "beam_size='4' is not a whole number"
    assert refused("a", of=model.translate, attention="no") == "attention='no' is not True or False"
    assert refused("a", of=model.translate, beam_size=10**9) == f"beam_size={10**9} must be at most 10000"
    assert refused("a", of=model.translate, alpha=10**400) == f"alpha={10**400} must be at most 10"
    assert refused("a", of=model.translate, n_best=9) == "n_best=9 must be at most beam_size=4"
    for call in (model.translate, model.explain):
        assert "99" in refused("a", of=call, experts_per_token=99)
    assert "99" in refused("a", "b", of=model.score, experts_per_token=99)
    assert "99" in refused(["a"], ["b"], of=model.experts, experts_per_token=99)


def test_too_little_memory_is_an_error_of_one_line(model: nmt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(model._translator.searcher, "_search_live", search)
    for call in (model.translate, model.explain):
        assert "lower beam_size" in refused("the dog", of=call, kind=nmt.MemoryLimitError)


def test_wrong_models(run: Path, tmp_path: Path, corpus: Path) -> None:
    assert "is not a run" in refused(tmp_path / "none", of=nmt.load, kind=nmt.CheckpointError)
    assert "decoding.device=tpu" in refused(run, of=nmt.load, device="tpu")
    assert "decoding.precision=int8" in refused(run, of=nmt.load, precision="int8")
    assert "decoding.checkpoint=newest" in refused(run, of=nmt.load, checkpoint="newest")
    refused(run, of=nmt.load, checkpoint=77, kind=nmt.CheckpointError)
    assert refused(None, of=nmt.load).startswith("path is a NoneType")
    assert refused(b"run", of=nmt.load).startswith("path is a bytes")
    assert "too long" in refused("x" * 5000, of=nmt.load, kind=nmt.StorageError)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "config.yaml").write_text("model: [")
    refused(damaged, of=nmt.load, kind=nmt.CheckpointError)
    dense = nmt.load(train(corpus, "dense", 1, "model.moe.num_experts=0"))
    assert "has no experts" in refused("the dog", of=dense.explain)
    assert "has no experts" in refused(["the"], ["der"], of=dense.experts)
    assert dense.score("the", "der").log_prob < 0


# ------------------------------------------------------------------------------------------------------------ training


def test_training_from_python(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = nmt.Config.from_dict(toy_config(corpus, "run.name=own", "training.max_steps=2").to_dict())
    prepared = nmt.prepare(config)
    assert (prepared / "subwords.model").is_file()
    path = nmt.train(config)
    assert path == corpus / "own"
    assert nmt.load(path).steps == [2]
    config.training.max_steps = 3
    assert nmt.load(nmt.train(config), checkpoint="last").steps == [3]
    assert capfd.readouterr().out == ""


def test_configurations_from_the_words_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nmt.configure().to_dict()["model"] == nmt.Config().to_dict()["model"]
    assert "write conf/corpus/mine.yaml in this folder" in refused("corpus=mine", of=nmt.configure)
    (tmp_path / "conf" / "corpus").mkdir(parents=True)
    (tmp_path / "conf" / "corpus" / "mine.yaml").write_text("name: own\n")
    config = nmt.configure("experiment=own_small", "corpus=mine", "training.max_steps=7")
    assert (config.corpus.name, config.training.max_steps, config.training.max_minutes) == ("own", 7, 30)
    assert "did you mean training.max_steps?" in refused("training.max_step=5", of=nmt.configure)
    assert "settings[0] is a Config" in refused(config, of=nmt.configure)


def test_an_interrupt_ends_training_as_one(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_config: nmt.Config) -> None:
        sys.exit(130)

    monkeypatch.setattr(nmt.commands.train, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="ended by SIGINT"):
        nmt.train(toy_config(corpus))


def test_mistakes_in_training(corpus: Path) -> None:
    message = refused({"training": {"max_step": 5}}, of=nmt.Config.from_dict, kind=UnknownSettingError)
    assert "did you mean training.max_steps?" in message
    assert "must be at least 1" in refused({"training": {"max_steps": 0}}, of=nmt.Config.from_dict)
    assert "run.name is empty" in refused(toy_config(corpus), of=nmt.train)
    for call in (nmt.train, nmt.prepare):
        assert refused({"run": {"name": "a"}}, of=call).startswith("config is a dict: give a Config")
    missing = toy_config(corpus, "corpus.train.source=[none.en]", "corpus.name=other")
    refused(missing, of=nmt.prepare, kind=nmt.DataError)
    with ThreadPoolExecutor(1) as pool, pytest.raises(nmt.UserError, match="main thread"):
        pool.submit(nmt.train, toy_config(corpus, "run.name=own")).result()
