"""Ensembles: the mean of the probabilities of several models, in searches, draws and scores alike."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nmt
from nmt.batch import make_batch
from nmt.cli import main
from nmt.data.subwords import Subwords
from nmt.decoding.ensemble import mean_log_prob
from nmt.decoding.loading import load_others
from nmt.decoding.scoring import score
from nmt.run import RunDirectory
from nmt.tokens import EOS
from tests.toy import Cli

LINES = ["the small dog", "", "over a green meadow", "this morning and a dog", "a"]


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same vocabulary: an earlier step of the run."""
    folder = tmp_path_factory.mktemp("other") / "exported"
    assert main(["export", str(run), str(folder), "decoding.checkpoint=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def both(run: Path, other: Path) -> nmt.Model:
    return nmt.load(run, ensemble=[other])


def test_the_mean_of_probabilities() -> None:
    first, second = (torch.randn(3, 7).log_softmax(1) for _ in range(2))
    mean = mean_log_prob([first, second])
    torch.testing.assert_close(mean.exp(), (first.exp() + second.exp()) / 2)
    torch.testing.assert_close(mean.exp().sum(1), torch.ones(3))
    assert mean_log_prob([first]) is first
    torch.testing.assert_close(mean_log_prob([first, first, first]), first)
    never = torch.tensor([0.0, -math.inf])
    assert mean_log_prob([never, never.flip(0)]).exp().tolist() == pytest.approx([0.5, 0.5])


def log_probs_of(model: nmt.Model, line: str, ids: list[int]) -> np.ndarray:
    """log P of subwords and the end by the first model alone."""
    translator = model._translator
    batch = make_batch(np.arange(1), [translator.subwords.encode(line)], [np.array(ids)])
    with torch.inference_mode():
        return score(translator.model, batch).log_prob_TB[:, 0].numpy()


@pytest.mark.parametrize("way", [{"beam_size": 3, "n_best": 3}, {"temperature": 1.0, "n_best": 3}])
def test_scores_are_those_of_the_mean(run: Path, other: Path, both: nmt.Model, way: dict[str, Any]) -> None:
    """Of what a search finds, and of what is given: subword by subword, from both models by themselves."""
    alone = nmt.load(run), nmt.load(other)
    processor = both._translator.subwords._processor
    for line in ("the small dog", "over a green meadow"):
        for each in both.translate(line, max_length=9, **way).hypotheses:
            ids = [processor.piece_to_id(piece) for piece in each.pieces]
            ids = ids[:-1] if ids[-1] == EOS else ids
            probs = [np.exp(log_probs_of(model, line, ids)) for model in alone]
            expected = np.log(np.mean(probs, axis=0))[: len(each.log_probs)]
            assert each.log_probs == pytest.approx(expected, abs=1e-5)
        given = both.score(line, "der Hund")
        one, two = (model.score(line, "der Hund") for model in alone)
        assert np.exp(given.log_probs) == pytest.approx((np.exp(one.log_probs) + np.exp(two.log_probs)) / 2, abs=1e-6)
        assert len({round(each.log_prob, 3) for each in (given, one, two)}) == 3


def test_a_model_with_itself_is_itself(run: Path) -> None:
    alone, twice = nmt.load(run), nmt.load(run, ensemble=[run, str(run)])
    found, expected = twice.translate(LINES, beam_size=3), alone.translate(LINES, beam_size=3)
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-4)


def test_batches_and_order_do_not_matter(both: nmt.Model) -> None:
    options: dict[str, Any] = {"beam_size": 3, "max_length": 12, "attention": True}
    together = both.translate(LINES, **options)
    assert [each.text for each in both.translate(LINES[::-1], batch_tokens=1, **options)][::-1] == [
        each.text for each in together
    ]
    for each in together:
        for one in each.hypotheses:
            assert one.attention is not None
            assert one.attention.sum(1) == pytest.approx(np.ones(len(one.pieces)), abs=1e-5)


def test_on_the_command_line(cli: Cli, run: Path, other: Path, both: nmt.Model, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in LINES))
    setting = f"decoding.ensemble=[{other}]"
    assert cli("translate", str(run), str(tmp_path / "in"), setting) == 0, cli.err
    assert cli.out.split("\n")[:-1] == [each.text for each in both.translate(LINES)]
    assert cli("score", str(run), str(tmp_path / "in"), str(tmp_path / "in"), setting, "--jsonl") == 0, cli.err
    found = [json.loads(line)["log_prob"] for line in cli.out.splitlines()]
    assert found == pytest.approx([each.log_prob for each in both.score(LINES, LINES)], abs=1e-4)
    for command in (["experts", str(run)], ["export", str(run), str(tmp_path / "new")]):
        cli.refuses(2, *command, setting, says=("takes one model, not an ensemble",))
    assert not (tmp_path / "new").exists()


def test_its_perplexity_is_evaluated(cli: Cli, run: Path, other: Path, both: nmt.Model) -> None:
    assert cli("evaluate", str(run), "--json", f"decoding.ensemble=[{other}]") == 0, cli.err
    (found,) = (each["score"] for each in json.loads(cli.out) if each["name"] == "perplexity")
    sources, targets, _ = RunDirectory(run).text("test")
    scored = both.score(sources, targets)
    log_probs = [log_prob for each in scored for log_prob in each.log_probs]
    assert found == pytest.approx(math.exp(-sum(log_probs) / len(log_probs)), rel=1e-5)


def test_what_cannot_be_an_ensemble(cli: Cli, run: Path, other: Path, both: nmt.Model, tmp_path: Path) -> None:
    with pytest.raises(nmt.CheckpointError, match="is not a run"):
        nmt.load(run, ensemble=[tmp_path / "none"])
    with pytest.raises(nmt.UserError, match="is not a list of folders"):
        nmt.load(run, ensemble=str(other))
    with pytest.raises(nmt.UserError, match="is not a list of folders"):
        nmt.load(run, ensemble=[3])
    with pytest.raises(nmt.UserError, match="an ensemble has no experts of its own"):
        both.explain("the dog")
    with pytest.raises(nmt.UserError, match="experts_per_token"):
        both.translate("the dog", experts_per_token=99)


def test_another_vocabulary_is_refused(other: Path, both: nmt.Model) -> None:
    subwords, decoding = both._translator.subwords, replace(both.config.decoding, ensemble=[str(other)])
    assert len(load_others(subwords, decoding)) == 1
    learned = subwords._processor.serialized_model_proto()
    another = Subwords(learned + b"\x0a\x05\x0a\x03qqq")  # one more piece
    with pytest.raises(nmt.CheckpointError, match=f"{other} has another vocabulary") as error:
        load_others(another, decoding)
    assert "\n" not in str(error.value)
