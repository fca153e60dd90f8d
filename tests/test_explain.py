"""What an expert gave to a translation: against a loop that scores one thing at a time, and by hand."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import make_batch
from nmt.cli import main
from nmt.commands.explain import slug
from nmt.config import AttentionConfig, ModelConfig, MoEConfig
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.experts import explain
from nmt.experts.explain import (
    ExpertTotal,
    Explanation,
    LayerExplanation,
    Removal,
    Scorer,
    Slot,
    explain_pair,
    explain_sentence,
    without,
)
from nmt.model.experts import MoE
from nmt.model.gating import GateOutput
from nmt.model.seq2seq import Seq2Seq
from nmt.pages.explain import explanation_page
from nmt.run import RunDirectory
from nmt.tokens import BOS, EOS

CPU = torch.device("cpu")
VOCABULARY = 13
SOURCE, TARGET = np.array([5, 9, 4]), np.array([7, 11, 12, 6])
TWO_LAYERS = {"encoder_moe_after": [1, 3], "decoder_moe_after": [1, 2]}
MODELS = {
    "noisy": {},
    "softmax": {"gating": "softmax_top_k", "k": 3},
    "hierarchical": {"gating": "hierarchical", "num_experts": 6, "branching": 3, "primary_k": 2, "k": 1},
    "strict": {"gating": "strictly_balanced"},
    "sigmoid": {"output": "sigmoid", "hidden_sizes": [7, 5]},
    "unequal": {"num_experts_at": {"decoder.2": 3}},
    "feedback": {"wiring": "feedback"},
    "gnmt": {"wiring": "gnmt_v2", "function": "normalised"},
    "norms": {"norm": "layers", "size": 6, "heads": 2, "bidirectional_layers": 2},
    "bias": {"output_bias": True, "tie_embeddings": False, "bottom_layer": "forward"},
}

Config = Callable[..., ModelConfig]


def random_model(config: ModelConfig) -> Seq2Seq:
    model = Seq2Seq(config, VOCABULARY).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.5 if "w_gate" in name else 0.6)
        if name.endswith("threshold_E"):
            # log T = -1.5: a token passes none, some or all of them.
            torch.nn.init.constant_(parameter, -0.15)
    return model


def scorer_of(
    model: Seq2Seq, source: np.ndarray = SOURCE, target: np.ndarray = TARGET, experts_per_token: int = 0
) -> Scorer:
    return Scorer(model, source, target, experts_per_token)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_config: Config) -> Seq2Seq:
    return random_model(tiny_config(**TWO_LAYERS, **MODELS[request.param]))


def moe_by_loops(moe: MoE, x_TD: Tensor, without: Removal | None) -> tuple[Tensor, GateOutput]:
    """S17 eq. 1, term by term, one term (or one expert) left out; nothing of the layer's own forward but the gate."""
    gate = moe.gate(x_TD)
    outputs = []
    for position, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for expert, value in zip(gate.expert_TK[position].tolist(), gate.gates_TK[position], strict=True):
            if expert == moe.num_experts:
                continue
            if without is not None and without.expert == expert and without.position in (None, position):
                continue
            h = x_D
            for place, w_EIO in enumerate(moe.experts.weights):
                h = (h if place == 0 else h.relu()) @ w_EIO[expert]
            y_D = y_D + value * h
        outputs.append(y_D.sigmoid() if moe.sigmoid_output else y_D)
    return torch.stack(outputs), gate


def nll_by_loops(model: Seq2Seq, without: Removal | None, monkeypatch: pytest.MonkeyPatch) -> float:
    with monkeypatch.context() as patch, torch.no_grad():
        for layer, moe in model.moe_layers().items():
            mine = without if without is not None and without.layer == layer else None
            patch.setattr(moe, "forward", lambda x_TD, *_, moe=moe, mine=mine: moe_by_loops(moe, x_TD, mine))
        return float(model(make_batch(np.arange(1), [SOURCE], [TARGET])).nll)


# ------------------------------------------------------------------------------------------------------- numbers


def test_every_contribution_equals_a_loop(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = explain_pair(scorer_of(model))
    assert [layer.layer for layer in layers] == ["encoder.1", "encoder.3", "decoder.1", "decoder.2"]
    whole = nll_by_loops(model, None, monkeypatch)
    sizes = []
    for layer in layers:
        assert len(layer.positions) == len(SOURCE if layer.layer.startswith("encoder") else TARGET) + 1
        for position, slots in enumerate(layer.positions):
            for slot in slots:
                expected = nll_by_loops(model, Removal(layer.layer, slot.expert, position), monkeypatch) - whole
                assert slot.contribution == pytest.approx(expected, abs=1e-9)
                sizes.append(abs(expected))
        for total in layer.experts:
            expected = nll_by_loops(model, Removal(layer.layer, total.expert), monkeypatch) - whole
            assert total.contribution == pytest.approx(expected, abs=1e-9)
    assert max(sizes) > 0.1
    assert np.median(sizes) > 1e-4


def test_slots_are_the_gates_of_the_pass(model: Seq2Seq) -> None:
    scorer = scorer_of(model)
    with torch.no_grad():
        gates = model(make_batch(np.arange(1), [SOURCE], [TARGET])).gates
    moe = model.config.moe
    for layer in explain_pair(scorer):
        expected = gates[layer.layer]
        assert layer.num_experts == moe.experts_at(layer.layer)
        for slots, experts, values in zip(layer.positions, expected.expert_TK, expected.gates_TK, strict=True):
            there = {int(e): float(v) for e, v in zip(experts, values, strict=True) if e < layer.num_experts}
            assert {slot.expert: slot.gate for slot in slots} == pytest.approx(there)
            assert [slot.gate for slot in slots] == sorted((slot.gate for slot in slots), reverse=True)
            for slot in slots:
                group = slot.expert // (layer.num_experts // 3) if moe.gating == "hierarchical" else None
                assert slot.group == group
        for total in layer.experts:
            assert total.positions == sum(total.expert in [slot.expert for slot in each] for each in layer.positions)
        assert sum(total.positions for total in layer.experts) == expected.num_routed
        given = [total.contribution for total in layer.experts]
        assert given == sorted(given, reverse=True)
    if moe.gating == "strictly_balanced":
        assert any((gate.expert_TK == moe.num_experts).any() for gate in gates.values())


def test_no_token_has_an_expert(tiny_config: Config) -> None:
    model = random_model(tiny_config(gating="strictly_balanced"))
    for moe in model.moe_layers().values():
        torch.nn.init.constant_(moe.gate.threshold_E, 0.0)
    layers = explain_pair(scorer_of(model))
    assert all(layer.experts == [] and not any(layer.positions) for layer in layers)
    found = Explanation("a", "b", ["a"] * 4, ["b"] * 5, -1.0, [-0.2] * 5, "fp32", layers)
    assert "none was chosen" in str(found)
    ElementTree.fromstring(explanation_page(found))


def test_the_number_of_experts_follows_the_dial(tiny_config: Config) -> None:
    model = random_model(tiny_config(num_experts=5))
    scorer = scorer_of(model, experts_per_token=4)
    assert {len(slots) for layer in explain_pair(scorer) for slots in layer.positions} == {4}
    assert {len(slots) for layer in explain_pair(scorer_of(model)) for slots in layer.positions} == {2}


def test_a_gate_of_0_contributes_nothing(tiny_config: Config) -> None:
    model = random_model(tiny_config(**TWO_LAYERS))
    for moe in model.moe_layers().values():
        torch.nn.init.normal_(moe.gate.w_gate_DE, std=1e5)
    layers = explain_pair(scorer_of(model))
    silent = [slot for layer in layers for slots in layer.positions for slot in slots if slot.gate == 0.0]
    assert len(silent) == 2 * (len(SOURCE) + len(TARGET) + 2)
    assert max(abs(slot.contribution) for slot in silent) < 1e-9
    assert max(abs(slot.contribution) for layer in layers for slots in layer.positions for slot in slots) > 0.1


def test_by_hand_one_token_one_layer() -> None:
    """BOS -> EOS through a decoder that is x + g_0 E_0(x) + g_1 E_1(x), with x = (1, 1) and linear experts."""
    config = ModelConfig(
        hidden_size=2,
        cell_size=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        bottom_layer="forward",
        encoder_moe_after=[],
        decoder_moe_after=[1],
        tie_embeddings=False,
        dropout=0.0,
        attention=AttentionConfig(size=2),
        moe=MoEConfig(num_experts=2, k=2, hidden_sizes=[2]),
    )
    model = Seq2Seq(config, 5).double().eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    moe = model.moe_layers()["decoder.1"]
    with torch.no_grad():
        model.target_embedding.weight[BOS] = 0.5**0.5
        model.output.weight[EOS] = torch.tensor([1.0, 2.0])
        moe.gate.w_gate_DE[0, 0] = math.log(3.0)  # gates 3/4 and 1/4
        moe.experts.weights[0].copy_(torch.eye(2).expand(2, 2, 2))
        moe.experts.weights[1][0] = torch.diag(torch.tensor([2.0, 0.0]))  # E_0(x) = (2, 0)
        moe.experts.weights[1][1] = torch.diag(torch.tensor([0.0, -4.0]))  # E_1(x) = (0, -4)

    def log_probability(first: float, second: float) -> float:
        logit = first + 2.0 * second
        return logit - math.log(math.exp(logit) + 4.0)

    nothing = np.array([], dtype=np.int64)
    scorer = scorer_of(model, nothing, nothing)
    whole = log_probability(1 + 0.75 * 2, 1 - 0.25 * 4)
    assert float(scorer.log_probability_T) == pytest.approx(whole, abs=1e-12)
    (layer,) = explain_pair(scorer)
    ((first, second),) = layer.positions
    assert (first.expert, first.gate, second.expert, second.gate) == (0, pytest.approx(0.75), 1, pytest.approx(0.25))
    assert first.contribution == pytest.approx(whole - log_probability(1, 0), abs=1e-12)
    assert second.contribution == pytest.approx(whole - log_probability(2.5, 1), abs=1e-12)
    assert first.contribution > 0 > second.contribution
    assert [total.contribution for total in layer.experts] == [first.contribution, second.contribution]


# ------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("model", ["noisy", "hierarchical", "feedback"], indirect=True)
def test_columns_do_not_leak(model: Seq2Seq, side: str) -> None:
    scorer = scorer_of(model)
    layers = [layer for layer in scorer.layers if layer.startswith(side)]
    every = [Removal(layer, expert, place) for layer in layers for expert in range(4) for place in (0, 1, 2, 3, None)]
    removals: list[Removal | None] = [None, *every, None]
    together = scorer.scores(side, removals)
    alone = [scorer.scores(side, [removal])[0] for removal in removals]
    assert together == pytest.approx(alone, abs=1e-10)
    assert together[:: len(every) + 1] == pytest.approx([float(scorer.log_probability_T.sum())] * 2, abs=1e-10)
    assert scorer.scores(side, removals[::-1]) == pytest.approx(together[::-1], abs=1e-10)
    assert len({round(score, 8) for score in together}) > 6


def test_an_expert_that_was_not_chosen_changes_nothing(tiny_config: Config) -> None:
    scorer = scorer_of(random_model(tiny_config(num_experts=9, k=1)))
    for layer, gate in scorer.gates.items():
        idle = sorted(set(range(9)) - set(gate.expert_TK.flatten().tolist()))
        assert scorer.contributions([Removal(layer, expert) for expert in idle]) == pytest.approx(
            [0.0] * len(idle), abs=1e-12
        )


def test_the_scores_are_the_models(model: Seq2Seq) -> None:
    with torch.no_grad():
        nll = float(model(make_batch(np.arange(1), [SOURCE], [TARGET])).nll)
    assert float(scorer_of(model).log_probability_T.sum()) == pytest.approx(-nll, abs=1e-10)


@pytest.mark.parametrize(("name", "value"), [("_MAX_COLUMNS", 3), ("_ELEMENTS", 1)])
@pytest.mark.parametrize("model", ["strict", "hierarchical", "feedback"], indirect=True)
def test_passes_of_any_size_give_the_same(
    model: Seq2Seq, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    expected = explain_pair(scorer_of(model))
    widths = []
    scores = Scorer.scores

    def watched(self: Scorer, side: str, removals: list[Removal | None]) -> list[float]:
        widths.append(len(removals))
        return scores(self, side, removals)

    monkeypatch.setattr(Scorer, "scores", watched)
    monkeypatch.setattr(explain, name, value)
    found = explain_pair(scorer_of(model))
    assert max(widths) == {"_MAX_COLUMNS": 3, "_ELEMENTS": 2}[name]
    assert len(widths) > 8
    for layer, oracle in zip(found, expected, strict=True):
        given = [slot.contribution for slots in layer.positions for slot in slots]
        assert given == pytest.approx([slot.contribution for slots in oracle.positions for slot in slots], abs=1e-10)
        totals = {total.expert: total.contribution for total in layer.experts}
        assert totals == pytest.approx({total.expert: total.contribution for total in oracle.experts}, abs=1e-10)


def test_two_passes_on_one_model_do_not_meet(model: Seq2Seq) -> None:
    """What one does without, another that runs in the middle of it does not miss."""
    scorer = scorer_of(model)
    change_gate = without([Removal(layer, 0) for layer in scorer.layers], CPU)
    layers, between = [], []

    def change(layer: str, gate: GateOutput) -> GateOutput:
        layers.append(layer)
        between.append(scorer_of(model).log_probability_T)
        return change_gate(layer, gate)

    with torch.inference_mode():
        scorer._encode(len(scorer.layers), change)
        scorer._score(len(scorer.layers), scorer.encoded, change)
    assert layers == list(scorer.layers)
    assert all(torch.equal(each, scorer.log_probability_T) for each in between)


# ------------------------------------------------------------------------------------------------------ the page


NASTY = "<script>alert('x')</script> & \"quotes\" </title> \x00\x1b ]]> \u202e"


def nasty() -> Explanation:
    slots = [[Slot(4, 1, 0.75, 0.5), Slot(2, 0, 0.25, -1.5)], []]
    totals = [ExpertTotal(4, 1, 1, 0.5), ExpertTotal(2, 0, 1, -1.5)]
    layers = [LayerExplanation(f"{side}.1", 6, slots, totals) for side in ("encoder", "decoder")]
    return Explanation(NASTY, NASTY, [NASTY, "</s>"], ["<b>", "</s>"], -2.5, [-2.0, -0.5], "bf16", layers)


def test_the_page_is_well_formed_and_escapes_everything() -> None:
    page = explanation_page(nasty())
    root = ElementTree.fromstring(page)
    assert {each.tag for each in root.iter()}.isdisjoint({"script", "link", "img", "iframe"})
    text = "".join(root.itertext())
    shown = NASTY.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert text.count(shown) == 4  # title, source, translation, piece
    assert "<script" not in page
    for reference in ("http:", "https:", "//", "src=", "href=", "@import", "url("):
        assert reference not in page
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    names = [set(re.findall(r"(--\w+):", block)) for block in (light, dark)]
    assert names[0] == names[1] == set(re.findall(r"var\((--\w+)[,)]", page)) - {"--tint", "--strength", "--gate"}
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_the_page_shows_gates_and_contributions() -> None:
    root = ElementTree.fromstring(explanation_page(nasty()))
    chips = [each.attrib for each in root.iter("span") if each.get("class") in ("chip gain", "chip loss")]
    assert len(chips) == 8
    gain, loss, all_gain, all_loss = chips[:4]
    assert (gain["class"], gain["style"]) == ("chip gain", "--gate:0.7500;--strength:58%")
    assert (loss["class"], loss["style"]) == ("chip loss", "--gate:0.2500;--strength:100%")
    assert gain["title"] == "expert 1/4: gate 0.7500, contribution +0.5000 nats"
    assert all_gain["title"] == "expert 1/4: chosen at 1 position, contribution +0.5000 nats"
    assert all_loss["class"] == "chip loss"
    pieces = ["".join(each.itertext()) for each in root.iter("td") if each.get("class") == "piece"]
    assert pieces[1] == pieces[3] == "⟨end⟩"


def test_the_table_in_the_terminal() -> None:
    lines = str(nasty()).splitlines()
    at = lines.index("encoder.1: 6 experts")
    assert " 1/4 0.75 +0.500    0/2 0.25 -1.500" in lines[at + 1]
    assert lines[at + 2].split() == ["1", "⟨end⟩", "none"]
    assert lines[at + 3] == "  removed at all positions: 1/4 +0.500, 0/2 -1.500"


def test_nothing_is_no_loss() -> None:
    """What rounds to 0 has no minus before it."""
    tiny = [[Slot(0, None, 1.0, -1e-6)]]
    layer = LayerExplanation("decoder.1", 2, tiny, [ExpertTotal(0, None, 1, -1e-6)])
    explanation = Explanation("a", "b", ["</s>"], ["</s>"], -1e-6, [-1e-6], "fp32", [layer])
    for shown in (str(explanation), explanation_page(explanation)):
        assert "+0.000" in shown
        assert "-0.00" not in shown


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_both_files(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sentence = "the small <dog> runs & looks"
    capfd.readouterr()
    assert main(["experts", str(run), "--explain", sentence]) == 0
    out, err = capfd.readouterr()
    path = run / "report" / f"explain-{slug(sentence)}.json"
    found = json.loads(path.read_text())
    assert path.name in err
    ElementTree.fromstring(path.with_suffix(".html").read_text())
    assert found["sentence"] == sentence
    assert found["translation"] in out
    assert found["source_pieces"][-1] == found["target_pieces"][-1] == "</s>"
    assert found["log_probability"] == pytest.approx(sum(found["piece_log_probabilities"]), abs=1e-4)
    assert found["precision"] == "fp32"
    assert found["decoding"]["beam_size"] == 4
    assert [layer["layer"] for layer in found["layers"]] == ["encoder.1", "decoder.1"]
    for layer, pieces in zip(found["layers"], (found["source_pieces"], found["target_pieces"]), strict=True):
        assert f"{layer['layer']}: 4 experts" in out
        assert len(layer["positions"]) == len(pieces)
        for slots in layer["positions"]:
            assert sum(slot["gate"] for slot in slots) == pytest.approx(1.0, abs=1e-5)
        for slot in layer["positions"][0]:
            assert f"{slot['expert']} {slot['gate']:.2f} {slot['contribution']:+.3f}" in out


def test_the_translation_is_the_one_that_is_explained(run: Path) -> None:
    directory = RunDirectory.existing(str(run))
    translator = Translator.load(directory, directory.config())
    sentence = directory.text("test")[0][0]
    found = explain_sentence(translator, sentence)
    # The first search is explained, not one that another search replaces.
    plain = replace(translator.options, retry=False, attention=True)
    (translated,) = translator.translate([sentence], plain)
    assert found.translation == translated.text
    np.testing.assert_array_equal(found.attention, translated.hypotheses[0].attention)
    map_of = ElementTree.fromstring(explanation_page(found)).findall(".//div[@class='map']/svg/rect")
    assert len(map_of) == len(found.attention) * len(found.source_pieces)
    assert explanation_page(replace(found, attention=[])).count("<rect") == 0
    assert len(found.piece_log_probabilities) == len(found.target_pieces)
    source = translator.subwords.encode(sentence)
    batch = make_batch(
        np.arange(1), [source], [np.array(translator.searcher.search([source], translator.options)[0][0].tokens)]
    )
    assert -float(translator.model(batch).nll) == pytest.approx(found.log_probability, abs=1e-4)


def test_bf16_is_computed_in_and_said(run: Path) -> None:
    directory = RunDirectory.existing(str(run))
    config = directory.config(["decoding.precision=bf16"])
    found = explain_sentence(Translator.load(directory, config), "the dog")
    assert found.precision == "bf16"
    assert "in bf16" in str(found)
    assert "decoding.precision=fp32" in explanation_page(found)


@pytest.mark.parametrize("text", ["👍", "北京 привет", "... 北", "the 北", "dog", "7"])
def test_what_is_not_translated_is_not_explained(run: Path, text: str) -> None:
    directory = RunDirectory.existing(str(run))
    translator = Translator.load(directory, directory.config())
    (translated,) = translator.translate([text], replace(translator.options, retry=False))
    if translated.hypotheses:
        assert explain_sentence(translator, text).translation == translated.text
    else:
        with pytest.raises(DataError, match="nothing to explain"):
            explain_sentence(translator, text)


def test_long_sentences_are_refused_and_those_at_the_limit_not(run: Path) -> None:
    directory = RunDirectory.existing(str(run))
    translator = Translator.load(directory, directory.config())
    count = len(translator.subwords.encode("the small dog"))
    translator.options = replace(translator.options, max_source_pieces=count)
    explain_sentence(translator, "the small dog")
    translator.options = replace(translator.options, max_source_pieces=count - 1)
    with pytest.raises(DataError, match=f"has {count} subwords.*max_source_pieces={count - 1}"):
        explain_sentence(translator, "the small dog")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--explain", ""], 3, "blank"),
        (["--explain", " \t\u3000\n"], 3, "blank"),
        (["--explain", "... - 👍"], 3, "nothing to explain"),
        (["--explain", "北京, привет"], 3, "nothing to explain"),
        (["--explain", "the dog " * 200], 3, "max_source_pieces=250"),
        (["--explain", "the dog", "--source", "a", "--reference", "b"], 2, "--source"),
        (["--explain", "the dog", "-o", "new"], 2, "-o"),
    ],
)
def test_mistakes(run: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str) -> None:
    before = sorted(run.rglob("*"))
    capfd.readouterr()
    assert main(["experts", str(run), *arguments]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("nmt: ")
    assert len(err.splitlines()) == 1
    assert says in err
    assert sorted(run.rglob("*")) == before


def test_text_that_is_no_unicode(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", str(run), "--explain", "the \udcff dog"]) == 0
    assert "the ? dog" in capfd.readouterr().out


def test_names_of_files() -> None:
    assert slug("The train, at 14:35!").startswith("the-train-at-14-35-")
    assert slug("a b") != slug("a, b")
    assert len(slug("word " * 99)) <= 49
    assert "/" not in slug("../../etc/passwd")
    assert len(slug("Поезд")) == 8
