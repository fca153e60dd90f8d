"""scripts/results/expert_picture.py: a small record of the report on experts, and its picture."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from scripts.results import expert_picture
from scripts.results.expert_picture import loads, record_of

SVG = "{http://www.w3.org/2000/svg}"


def role(piece: str, before: str = "", after: str = "") -> dict[str, Any]:
    context = {"before": before, "token": piece.strip("▁"), "after": after, "gate": 0.5, "predicts": None}
    return {"piece": piece, "count": 9, "rate": 0.5, "lift": 2.0, "least_lift": 1.5, "contexts": [context]}


def row(expert: int, share: float, bits: float, *tokens: dict[str, Any]) -> dict[str, Any]:
    return {"expert": expert, "share": share, "specialisation": bits, "tokens": [*tokens]}


def report() -> dict[str, Any]:
    parts = [role("▁Par", after="lement fr"), role("lement", before="le Par"), role("7", before="19"), role("▁a")]
    experts = [
        row(0, 0.5, 1.0, *parts),
        row(1, 0.25, 2.0, role("▁the"), role("▁of"), role("▁<x>"), role("▁y"), role("▁z")),
        row(2, 0.25, 3.0, role("▁few"), role("▁words")),
        row(3, 0.0, 4.0, role("▁an"), role("▁idle"), role("▁expert")),
    ]
    figures = {"num_tokens": 100, "k": 2.0, "cv_load": 0.70712, "max_over_mean_load": 2.0, "idle_experts": 1}
    purity = {"share": 0.25, "chance_share": 0.01}
    return {"title": "test", "layers": [{"layer": "encoder.1", **figures, "experts": experts, "token_purity": purity}]}


def test_a_record_has_loads_and_the_words_of_specialised_experts():
    (layer,) = record_of(report())["layers"]
    assert layer["loads"] == [0.5, 0.25, 0.25, 0.0]
    assert [each["expert"] for each in layer["named"]] == [1, 0]
    assert layer["named"][0]["words"] == ["the", "of", "<x>", "y"]
    # Both parts of a word are that word; a digit is not the number that it is in.
    assert layer["named"][1]["words"] == ["Parlement", "7", "a"]
    assert (layer["revealed"], layer["revealed_by_chance"], layer["cv_load"]) == (0.25, 0.01, 0.707)


@pytest.mark.parametrize("experts", [4, 512])
def test_bars_are_the_loads_from_the_largest_down(experts: int):
    shares = np.random.default_rng(1).dirichlet(np.full(experts, 5.0)).tolist()
    ranked = sorted(shares, reverse=True)
    (layer,) = record_of(report())["layers"]
    drawing = loads({"text": "a < b"}, {"layers": [{**layer, "loads": shares}] * 2})
    tree = ElementTree.fromstring(drawing)
    colours = [each["expert"] for each in layer["named"]]
    bars = [each for each in tree.iter(f"{SVG}rect") if each.attrib["fill"] != "white"]
    bars = bars[:experts]  # of the first layer
    heights = [float(each.attrib["height"]) for each in bars]
    assert heights == pytest.approx([heights[0] * share / ranked[0] for share in ranked], abs=0.1)
    assert len({each.attrib["fill"] for each in bars}) == 1 + len(colours)
    by_height = sorted(range(experts), key=lambda expert: -shares[expert])
    common = max(bars, key=lambda bar: sum(each.attrib["fill"] == bar.attrib["fill"] for each in bars)).attrib["fill"]
    if experts > 4:
        assert {by_height[place] for place, bar in enumerate(bars) if bar.attrib["fill"] != common} == {*colours}
    texts = [each.text or "" for each in tree.iter(f"{SVG}text")]
    assert texts[0] == "a < b"
    assert texts.count("expert 1: the · of · <x> · y") == 2
    width, height = (float(tree.attrib[side]) for side in ("width", "height"))
    for each in tree.iter():
        if "x" in each.attrib:
            assert 0 <= float(each.attrib["x"]) <= width
            assert 0 <= float(each.attrib["y"]) <= height


@pytest.mark.slow
def test_the_report_of_a_run_makes_a_record(run: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch):
    assert cli("experts", str(run)) == 0, cli.err
    output = tmp_path / "claim" / "experts.json"
    monkeypatch.setattr(sys, "argv", ["x", str(run / "report" / "experts.json"), "-o", str(output)])
    expert_picture.main()
    record = json.loads(output.read_text())
    assert [each["layer"] for each in record["layers"]] == ["encoder.1", "decoder.1"]
    for layer in record["layers"]:
        assert len(layer["loads"]) == 4
        assert sum(layer["loads"]) == pytest.approx(1.0, abs=1e-5)
    ElementTree.fromstring(loads({"text": ""}, record))


def test_the_dashed_line_is_at_an_equal_share():
    (layer,) = record_of(report())["layers"]
    tree = ElementTree.fromstring(loads({"text": ""}, {"layers": [layer]}))
    bars = [each for each in tree.iter(f"{SVG}rect") if "." in each.attrib.get("x", "")]
    (dashed,) = (each for each in tree.iter(f"{SVG}path") if "stroke-dasharray" in each.attrib)
    # Of four experts, two have a quarter each.
    quarter = next(each for each in bars if float(each.attrib["height"]) == pytest.approx(65, abs=0.1))
    assert float(dashed.attrib["d"].split()[1].split("H")[0]) == pytest.approx(float(quarter.attrib["y"]), abs=0.1)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (None, 2, "nmt experts RUN"),
        ("{", 3, "no report of nmt experts"),
        ("{}", 3, "no report of nmt experts"),
        (json.dumps({"title": "", "layers": [{"experts": []}]}), 3, "no report of nmt experts"),
    ],
)
def test_what_is_no_report_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    status: int,
    message: str,
):
    given, output = tmp_path / "x.json", tmp_path / "new.json"
    if text is not None:
        given.write_text(text)
    monkeypatch.setattr(sys, "argv", ["x", str(given), "-o", str(output)])
    with pytest.raises(SystemExit) as end:
        expert_picture.main()
    assert end.value.code == status
    assert message in capsys.readouterr().err
    assert not output.exists()
