"""Minimum Bayes risk: utilities against sacreBLEU's for each pair, and what is chosen among draws."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

import nmt
from nmt.evaluation.mbr import bleu, by_agreement, chrf
from nmt.evaluation.scores import tokenized
from tests.toy import Cli

TEXTS = [
    "Der Zug nach Berlin fährt um 14:35 Uhr ab.",
    "Der Zug nach Rom fährt um 14:35 Uhr ab.",
    "Um 14:35 Uhr fährt der Zug ab!",
    "Der Der Der Der",
    "ab",
    "x",
    "",
    " . ",
    "東京 und 北京",
    "a b c d e f g",
]


def test_utilities_are_sacrebleus() -> None:
    chrf_metric, bleu_metric = sacrebleu.CHRF(), sacrebleu.BLEU(effective_order=True)
    chrf_UU, bleu_UU = chrf(TEXTS), bleu(tokenized(TEXTS, "13a"))
    for i, hypothesis in enumerate(TEXTS):
        for j, reference in enumerate(TEXTS):
            expected = chrf_metric.sentence_score(hypothesis, [reference]).score
            assert chrf_UU[i, j] == pytest.approx(expected, abs=1e-9), (hypothesis, reference)
            expected = bleu_metric.sentence_score(hypothesis, [reference]).score
            assert bleu_UU[i, j] == pytest.approx(expected, abs=1e-9), (hypothesis, reference)


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_each_draw_counts_once(metric: str) -> None:
    rng = np.random.default_rng(1)
    drawn = [TEXTS[place] for place in rng.integers(0, len(TEXTS), 40)]
    utility_UU = chrf(TEXTS) if metric == "chrf" else bleu(tokenized(TEXTS, "13a"))
    found = by_agreement(metric, "13a")(drawn)
    for text, utility in zip(drawn, found, strict=True):
        expected = np.mean([utility_UU[TEXTS.index(text), TEXTS.index(each)] for each in drawn])
        assert utility == pytest.approx(float(expected))
    assert by_agreement(metric, "13a")(["one"]) == pytest.approx([100.0])
    # What was drawn much more often than all others is chosen.
    often = by_agreement(metric, "13a")([TEXTS[0]] * 9 + TEXTS[4:8])
    assert max(often) == often[0]


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_the_one_that_agrees_most_comes_first(run: Path, metric: str) -> None:
    model = nmt.load(run)
    options: dict[str, Any] = {"temperature": 1.0, "n_best": 8, "max_length": 10}
    lines = ["the small dog", "", "a green meadow"]
    plain, chosen = model.translate(lines, **options), model.translate(lines, mbr=metric, **options)
    rank = by_agreement(metric, "13a")
    for before, after in zip(plain, chosen, strict=True):
        texts = [each.text for each in after.hypotheses]
        assert Counter(texts) == Counter(each.text for each in before.hypotheses)
        if texts:
            utilities = list(rank(texts))
            assert utilities == sorted(utilities, reverse=True)
            assert (after.text, after.score) == (texts[0], after.hypotheses[0].score)
    assert [each.text for each in plain] != [each.text for each in chosen]


def test_on_the_command_line(cli: Cli, run: Path, tmp_path: Path) -> None:
    lines = ["the small dog", "", "a green meadow"]
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
    settings = ("decoding.temperature=1", "decoding.max_length=10")
    command = ("translate", str(run), str(tmp_path / "in"))
    assert cli(*command, "--mbr", "chrf", "--samples", "8", *settings) == 0, cli.err
    found = nmt.load(run).translate(lines, mbr="chrf", temperature=1.0, max_length=10, n_best=8)
    assert cli.out.split("\n")[:-1] == [each.text for each in found]
    cli.refuses(2, *command, "--mbr", "chrf", says=("--mbr chooses among draws: set decoding.temperature=1",))
    cli.refuses(2, *command, "--mbr", "ter", says=("invalid choice: 'ter'",))
    cli.refuses(2, *command, "--samples", "8", says=("--samples is for --mbr",))
    cli.refuses(2, *command, "--mbr", "bleu", "--n-best", "2", *settings, says=("leave out --n-best",))
    cli.refuses(2, *command, "--mbr", "bleu", "--samples", "0", *settings, says=("n_best=0 must be at least 1",))


def test_mistakes_in_python(run: Path) -> None:
    model = nmt.load(run)
    with pytest.raises(nmt.UserError, match="mbr='ter' is not one of chrf, bleu"):
        model.translate("a", mbr="ter", n_best=4)
    with pytest.raises(nmt.UserError, match="mbr chooses among n_best hypotheses"):
        model.translate("a", mbr="chrf")
