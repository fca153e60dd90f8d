"""scripts/results/samples.py and samples_page.py: translations that a run makes, and the experts of their words."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmt.batch import make_batch
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.experts.explain import ExpertTotal, LayerExplanation, Slot
from nmt.run import RunDirectory
from scripts.results.samples_page import samples_as_markdown
from tests.scripts import load_script
from tests.test_prose import blocks
from tests.toy import train

script = load_script("scripts/results/samples.py")


def sides(folder: Path) -> list[str]:
    return [str(folder / "shared_text" / f"test.{language}") for language in ("en", "de")]


def samples(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: list[Path], output: Path, *lines: int) -> Any:
    source, reference = sides(folder)
    words = ["--source", source, "--reference", reference, "--lines", *map(str, lines), "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["samples.py", *map(str, runs), *words])
    script.main()
    return json.loads(output.read_text())


def test_one_line_is_chosen_from_each_fifth():
    words = np.random.default_rng(1).integers(1, 40, 500)
    sources = ["w " * count for count in words]
    fit = [place for place, count in enumerate(words) if 10 <= count <= 25]
    found = [fit.index(place) for place in script.chosen_places(sources)]
    assert [5 * place // len(fit) for place in found] == [0, 1, 2, 3, 4]
    # As many on either side of the middle one, and what the words are does not matter.
    assert abs(found[2] - (len(fit) - 1 - found[2])) <= 1
    assert script.chosen_places(["x " * count for count in words]) == script.chosen_places(sources)
    assert script.chosen_places(["w " * 10] * 5) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="only 4 lines"):
        script.chosen_places([*["w " * 25] * 4, "w " * 9, "w " * 26])


def test_the_expert_of_a_word_has_most_of_the_gates_of_its_subwords():
    def position(*slots: tuple[int, float]) -> list[Slot]:
        return [Slot(expert, None, gate, 0.0) for expert, gate in slots]

    positions = [
        position((9, 1.0)),  # the symbol of a language, which is no word
        position((1, 0.6), (2, 0.4)),
        position((2, 0.7), (3, 0.3)),
        position((3, 0.9), (1, 0.1)),
        [],
        position((8, 1.0)),  # the end
    ]
    totals = [ExpertTotal(expert, None, 1, 4.0 - expert) for expert in range(5)]
    layer = LayerExplanation("encoder.1", 10, positions, totals)
    found = script.layer_record(layer, ["▁hel", "lo", "▁you", "▁no", "</s>"])
    assert found["words"] == ["hello", "you", "no"]
    assert found["experts"] == [2, 3, None]
    assert found["shares"] == [0.55, 0.9, 0.0]
    assert [each["expert"] for each in found["needed"]] == [0, 1, 2]


@pytest.mark.slow
def test_a_record_has_the_translations_and_experts_of_each_run(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    sparse, dense = train(corpus, "sparse", 6), train(corpus, "dense", 6, "model.moe.num_experts=0")
    output = corpus / "new" / "samples.json"
    samples(monkeypatch, corpus, [sparse], output, 3, 1)
    record = samples(monkeypatch, corpus, [dense, sparse], output, 3, 1)
    assert [each["run"] for each in record["systems"]] == ["dense", "sparse"]
    assert [each["num_experts"] for each in record["systems"]] == [0, 4]
    english, german = (Path(name).read_text().splitlines() for name in sides(corpus))
    assert [(each["line"], each["source"], each["reference"]) for each in record["samples"]] == [
        (line, english[line - 1], german[line - 1]) for line in (3, 1)
    ]
    for folder in (dense, sparse):
        run = RunDirectory(folder)
        translator = Translator.load(run, run.config())
        for sample in record["samples"]:
            (found,) = (each for each in sample["systems"] if each["run"] == folder.name)
            assert found["translation"] == translator.translate([sample["source"]])[0].text
            assert 0.0 <= found["chrF2"] <= 100.0
            assert [each["layer"] for each in found["layers"]] == (
                ["encoder.1", "decoder.1"] if folder == sparse else []
            )
            if folder == sparse:
                check_experts(translator, sample["source"], found)


def check_experts(translator: Translator, sentence: str, found: dict[str, Any]) -> None:
    """Compare with a plain loop over the gates of the model that reads the sentence and its translation."""
    source = translator.subwords.encode(sentence)
    reading = translator.read([sentence])
    target = np.array(translator.find(reading).hypotheses[0][0].tokens)
    gates = translator.model.gates(make_batch(np.arange(1), [source], [target]))
    for layer, text, ids in zip(found["layers"], (sentence, found["translation"]), (source, target), strict=True):
        assert layer["words"] == text.split()
        word = -1
        sums: list[Counter[int]] = []
        gate = gates[layer["layer"]]
        for piece, experts, values in zip(
            translator.subwords.pieces(ids.tolist()), gate.expert_TK.tolist(), gate.gates_TK.tolist(), strict=False
        ):
            if piece.startswith("▁") or word < 0:
                sums.append(Counter())
                word += 1
            for expert, value in zip(experts, values, strict=True):
                sums[word][expert] += value
        for each, expert, share in zip(sums, layer["experts"], layer["shares"], strict=True):
            assert each[expert] == pytest.approx(max(each.values()), abs=1e-5)
            assert share == pytest.approx(each[expert] / each.total(), abs=0.006)
        assert len(layer["needed"]) == 3


@pytest.mark.slow
def test_other_lines_need_another_file(
    corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    output = corpus / "samples.json"
    before = samples(monkeypatch, corpus, [run], output, 1)
    for lines, message in (((2,), "other lines"), ((13,), "lines 1 to 12")):
        with pytest.raises(SystemExit) as end:
            samples(monkeypatch, corpus, [run], output, *lines)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert json.loads(output.read_text()) == before


def test_a_run_of_the_same_name_is_replaced_and_another_text_refused(tmp_path: Path):
    whole = {"sha256": ["a", "b"], "systems": [], "samples": [{"line": 3, "systems": []}]}
    for score in (1.0, 2.0):
        script.add(whole, {"run": "r"}, [{"run": "r", "chrF2": score}])
    assert whole["systems"] == [{"run": "r"}]
    assert whole["samples"][0]["systems"] == [{"run": "r", "chrF2": 2.0}]
    output = tmp_path / "samples.json"
    output.write_text(json.dumps(whole))
    assert script.continued(output, whole) == whole
    for other in ({**whole, "sha256": ["a", "c"]}, {**whole, "samples": [{"line": 4}]}):
        with pytest.raises(UserError, match="another text or other lines"):
            script.continued(output, other)
    output.write_text("{")
    with pytest.raises(UserError, match="no file of samples"):
        script.continued(output, whole)


def record(*systems: tuple[str, str, float]) -> dict[str, Any]:
    words = {"words": ["Le", "<b>chat|*", "dort."], "experts": [31, None, 5], "shares": [0.5, 0.0, 0.49]}
    needed = [{"expert": 31, "subwords": 2, "nats": 4.25}]
    layers = [{"layer": f"{side}.1", "num_experts": 32, **words, "needed": needed} for side in ("decoder", "encoder")]
    found = [
        {"run": run, "translation": text, "chrF2": score, "layers": layers if run == "many" else []}
        for run, text, score in systems
    ]
    sample = {"line": 1234, "source": "The cat | said *so*.", "reference": "Le chat.", "systems": found}
    return {"source": "x.en.gz", "rule": "All lines.", "samples": [sample]}


def test_samples_as_a_page():
    of_table = {"systems": {"none": "no experts", "many": "32 experts"}, "experts_of": "many"}
    lines = list(samples_as_markdown(of_table, record(("many", "Le chat | dort.", 61.0), ("none", "Le chien.", 40.0))))
    assert "#### Line 1,234" in lines
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("> |")][2:]
    assert {len(row) for row in rows} == {3}
    names = [row[0].strip() for row in rows]
    assert names == ["source", "reference", "no experts", "32 experts", "encoder.1", "decoder.1", "needed most"]
    assert [row[2].strip() for row in rows] == ["", "", "40.0", "**61.0**", "", "", ""]
    words = re.sub(r"&#8288;<sup>.*?</sup>", "", rows[4][1]).strip()
    assert re.sub(r"\\(.)", r"\1", words) == "Le <b>chat|* dort."
    assert re.findall(r"<sup>(.*?)</sup>", rows[4][1]) == ["<b>31</b>", "5"]
    assert rows[6][1].count("**31** (4.2)") == 2
    # Rules of plain English are not for sentences that others wrote.
    assert not any("said" in text for _, text in blocks("\n".join(lines)))


def test_samples_without_experts():
    lines = list(samples_as_markdown({"systems": {"none": "no experts"}}, record(("none", "Le chien.", 40.0))))
    assert not any("encoder" in line for line in lines)
    assert "**40.0**" in lines[-1]
