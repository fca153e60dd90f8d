"""Translations that nmt evaluate kept are used again only if the run would make the same ones."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nmt.evaluation.kept import kept_translations, origin
from nmt.evaluation.sets import EvaluationSet, evaluation_set
from nmt.run import RunDirectory
from tests.toy import Cli


@pytest.fixture
def copy(run: Path, tmp_path: Path, cli: Cli) -> RunDirectory:
    """A run whose test set was translated."""
    path = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(path / "report", ignore_errors=True)
    assert cli("evaluate", str(path)) == 0
    return RunDirectory(path)


def own_set(run: RunDirectory) -> EvaluationSet:
    return evaluation_set(None, [], "test", run)


def test_they_are_used_again(copy: RunDirectory) -> None:
    written = (copy.report / "test.hypotheses").read_text().split("\n")[:-1]
    assert kept_translations(copy, own_set(copy), copy.config().decoding) == written
    assert kept_translations(copy, evaluation_set(None, [], "dev", copy), copy.config().decoding) is None
    # The best checkpoint is that of step 8: another name of the same parameters.
    steps = json.loads((copy.report / "test.json").read_text())["steps"]
    named = copy.config([f"decoding.checkpoint={steps[0]}"]).decoding
    assert kept_translations(copy, own_set(copy), named) == written


@pytest.mark.parametrize("change", ["decoding.beam_size=2", "decoding.checkpoint=2", "decoding.checkpoint=average"])
def test_not_with_other_settings_or_parameters(copy: RunDirectory, change: str) -> None:
    assert kept_translations(copy, own_set(copy), copy.config([change]).decoding) is None


def test_not_for_other_sources(copy: RunDirectory) -> None:
    text = own_set(copy)
    other = replace(text, sources=[*text.sources[:-1], "another sentence"])
    assert kept_translations(copy, other, copy.config().decoding) is None


def test_not_if_a_file_was_changed(copy: RunDirectory) -> None:
    hypotheses, report = copy.report / "test.hypotheses", copy.report / "test.json"
    good, known = hypotheses.read_bytes(), json.loads(report.read_text())

    def found() -> list[str] | None:
        return kept_translations(copy, own_set(copy), copy.config().decoding)

    for changed in (good.replace(b"\n", b"!\n", 1), good + b"\n", good[:-1], b"", b"\xff" + good):
        hypotheses.write_bytes(changed)
        assert found() is None
    hypotheses.write_bytes(good)
    for name in ("sources_sha256", "parameters_sha256", "hypotheses_sha256", "decoding"):
        report.write_text(json.dumps({key: value for key, value in known.items() if key != name}))
        assert found() is None
        report.write_text(json.dumps(known | {name: {"beam_size": 4} if name == "decoding" else "0" * 64}))
        assert found() is None
    report.write_text(json.dumps(known))
    assert found() is not None


def test_the_parameters_are_unknown_if_training_went_on(copy: RunDirectory) -> None:
    chosen = copy.chosen(copy.config().decoding)
    steps = [chosen[0].step]
    assert origin(["a"], steps, chosen)["parameters_sha256"]
    assert origin(["a"], [steps[0] + 1], chosen)["parameters_sha256"] == ""
