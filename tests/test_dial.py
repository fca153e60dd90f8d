"""nmt evaluate --dial: what fewer or more experts per token cost and give."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nmt.cli import main
from nmt.config import Config, DecodingConfig, ModelConfig, MoEConfig
from nmt.cost.operations import model_cost
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation import dial
from nmt.evaluation.dial import dial_counts, dial_positions
from nmt.evaluation.scores import corpus_scores, paired_bootstrap
from nmt.model.gating import HierarchicalGate
from nmt.model.seq2seq import Seq2Seq
from nmt.run import RunDirectory
from tests.toy import train

HIERARCHICAL = {"gating": "hierarchical", "num_experts": 12, "branching": 3, "primary_k": 2, "k": 2}


@pytest.fixture
def run(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dial, "BOOTSTRAP_SAMPLES", 20)
    return run


def config_of(**moe: int) -> Config:
    return Config(model=ModelConfig(moe=MoEConfig(**{"num_experts": 8, "k": 2} | moe)))


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("1,2,4", [1, 2, 4]), ("4,1,4", [4, 1, 4]), ("1, 2 ,16", [1, 2, 16])]
)
def test_counts_that_are_understood(text: str, counts: list[int]) -> None:
    assert dial_counts(text, config_of()) == counts


@pytest.mark.parametrize("text", ["", "0", "1,0", "-1", "1,", ",", "two", "1.5", "1;2", "1_0", "２", "9" * 5000])
def test_counts_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as 1,2,4"):
        dial_counts(text, config_of())


def test_a_dial_without_experts_or_already_turned() -> None:
    with pytest.raises(UserError, match="num_experts is 0"):
        dial_counts("1", config_of(num_experts=0))
    with pytest.raises(UserError, match="experts_per_token=3: give one of them"):
        dial_counts("1", replace(config_of(), decoding=DecodingConfig(experts_per_token=3)))


def test_as_trained_is_always_there_and_once() -> None:
    moe = MoEConfig(num_experts=8, k=2)
    assert dial_positions([4, 1, 4], moe) == [(1, False), (2, True), (4, False)]
    assert dial_positions([2], moe) == [(2, True)]
    assert dial_positions([4], MoEConfig(**HIERARCHICAL)) == [(4, True)]
    # Thresholds are not the same as two experts for every token.
    strict = replace(moe, gating="strictly_balanced")
    assert dial_positions([2, 1], strict) == [(1, False), (2, True), (2, False)]


@pytest.mark.parametrize(
    ("moe", "count", "groups", "experts"),
    [
        ({"num_experts": 8, "k": 2}, 5, 2, 5),
        (HIERARCHICAL, 1, 1, 1),
        (HIERARCHICAL, 2, 2, 1),
        (HIERARCHICAL, 4, 2, 2),
        (HIERARCHICAL, 8, 2, 4),
    ],
)
def test_the_cost_is_that_of_what_the_gates_do(
    tiny_config: Callable[..., ModelConfig], moe: dict[str, int], count: int, groups: int, experts: int
) -> None:
    config = tiny_config(**moe)
    dialled = replace(config, moe=config.moe.with_experts_per_token(count))
    assert (dialled.moe.primary_k, dialled.moe.k) == (groups, experts)
    assert dialled.moe.experts_per_token == count
    assert replace(dialled, moe=config.moe) == config
    model = Seq2Seq(config, 13)
    model.check_experts_per_token(count)
    for gate in (model.encoder.moe_layers.moe["2"].gate, model.decoder.moe_layers.moe["1"].gate):
        if isinstance(gate, HierarchicalGate):
            assert gate.levels(count) == (groups, experts)
    # One hidden layer of 7 units, width 6: 84 multiply-adds an expert; a group's gate: 4 columns, two matrices.
    more = model_cost(dialled, 13).ops_per_timestep - model_cost(config, 13).ops_per_timestep
    gates = 2 * 6 * 4 * (groups - config.moe.primary_k) if "branching" in moe else 0
    assert more == 2 * (84 * (count - config.moe.experts_per_token) + gates)


@pytest.mark.slow
def test_the_table_and_its_file(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["evaluate", str(run), "--dial", "4,1", "--split", "dev", "--show", "1", "decoding.beam_size=2"]) == 0
    out, err = capfd.readouterr()
    report = json.loads((run / "report" / "dial-dev.json").read_text())
    assert (report["set"], report["sentences"], report["decoding"]["beam_size"]) == ("dev", 8, 2)
    positions = report["positions"]
    assert [(each["experts_per_token"], each["trained"]) for each in positions] == [(1, False), (2, True), (4, False)]
    assert positions[0]["ops_per_timestep"] < positions[1]["ops_per_timestep"] < positions[2]["ops_per_timestep"]

    directory = RunDirectory.existing(str(run))
    sources, references, _ = directory.text("dev")
    texts = []
    for count in (1, 0, 4):
        config = directory.config(["decoding.beam_size=2", f"decoding.experts_per_token={count}"])
        texts.append([found.text for found in Translator.load(directory, config).translate(sources)])
    rows = [line for line in out.splitlines() if re.match(r"\d+( trained)? +[\d.]+M ", line)]
    for position, hypotheses, row in zip(positions, texts, rows, strict=True):
        bleu, chrf = corpus_scores(hypotheses, [references], "13a")
        assert position["scores"] == {"BLEU": bleu.value, "chrF2": chrf.value}
        assert report["signatures"] == {"BLEU": bleu.signature, "chrF2": chrf.signature}
        (compared, _) = paired_bootstrap(texts[1], hypotheses, [references], "13a", 20)
        found = position["against_trained"][0]
        assert (found["system"], found["p_value"]) == (bleu.value, compared.p_value)
        assert f"{bleu.value:.2f} (" in row
        assert f"{position['perplexity']:.3f}" in row
        assert ("trained" in row.split("  ")[0], "p = " in row) == (position["trained"], not position["trained"])
    assert positions[0]["perplexity"] != positions[1]["perplexity"] != positions[2]["perplexity"]
    assert "source      " in out
    assert "\n2 trained   " in out
    assert "4 experts per token: 8 sentences" in err


def test_the_trained_row_is_what_evaluate_says(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--dial", "1"]) == 0
    assert main(["evaluate", str(run)]) == 0
    capfd.readouterr()
    plain = json.loads((run / "report" / "test.json").read_text())
    (_, trained) = json.loads((run / "report" / "dial.json").read_text())["positions"]
    assert trained["scores"] == {name: plain["scores"][name]["score"] for name in ("BLEU", "chrF2")}
    assert trained["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    config = RunDirectory.existing(str(run)).config()
    vocabulary = Translator.load(RunDirectory.existing(str(run)), config).subwords.size
    assert trained["ops_per_timestep"] == model_cost(config.model, vocabulary).ops_per_timestep


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--dial", "1,5"], 2, "=5 must lie in 1..4"),
        (["--dial", "none"], 2, "'none'"),
        (["--dial", "1", "decoding.experts_per_token=2"], 2, "give one of them"),
        (["--dial", "1", "--source", "a"], 2, "--reference"),
        (["--dial"], 2, "--dial"),
    ],
)
def test_mistakes(run: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str) -> None:
    before = sorted(run.rglob("*"))
    capfd.readouterr()
    assert main(["evaluate", str(run), *arguments]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("nmt: ")
    assert says in err
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
def test_two_translators_on_one_model_do_not_meet(run: Path) -> None:
    directory = RunDirectory.existing(str(run))
    plain = Translator.load(directory, directory.config())
    dialled = Translator(
        plain.model, plain.subwords, replace(directory.config().decoding, experts_per_token=1), plain.device
    )
    apart = Translator.load(directory, directory.config(["decoding.experts_per_token=1"]))
    lines = directory.text("test")[0]
    before = plain.translate(lines)
    assert dialled.translate(lines) == apart.translate(lines) != before
    assert plain.translate(lines, replace(plain.options, experts_per_token=1)) == apart.translate(lines)
    assert plain.translate(lines) == before


def test_validation_wakes_the_experts_of_training(corpus: Path) -> None:

    def dev_lines(name: str, *changes: str) -> list[str]:
        lines = (train(corpus, name, 4, "training.validate_every=2", *changes) / "metrics.jsonl").read_text()
        return [line for line in lines.splitlines() if '"dev"' in line]

    plain = dev_lines("plain")
    assert len(plain) == 2
    assert dev_lines("dialled", "decoding.experts_per_token=1") == plain
