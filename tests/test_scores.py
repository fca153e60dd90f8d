"""Scores are sacreBLEU's own; the report on experts counts what it says."""

import json
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

import nmt.evaluation.scores
from nmt.cli import main
from nmt.decoding.loading import load_vocabulary
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.evaluation.perplexity import perplexity
from nmt.evaluation.scores import SystemScores, corpus_scores, paired_bootstrap
from nmt.experts.report import expert_report
from nmt.parallel.mesh import World
from nmt.run import RunDirectory

PAIRS = [
    ("The train leaves at 14:35 o'clock.", "The train leaves at 14:35."),
    ("the small dog runs", "the small dog runs over a meadow"),
    ("ein\rZug \u2028 fährt", "ein Zug\x85fährt ab"),
    ("", "nothing"),
    ("Größe zählt (sehr)!", "Größe zählt sehr!"),
]


def test_scores_are_sacrebleus() -> None:
    hypotheses, references = map(list, zip(*PAIRS, strict=True))
    bleu, chrf = corpus_scores(hypotheses, [references], "13a")
    assert (bleu.name, bleu.value) == ("BLEU", sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert (chrf.name, chrf.value) == ("chrF2", sacrebleu.corpus_chrf(hypotheses, [references]).score)
    assert 0 < bleu.value < 100
    for part in ("nrefs:1", "case:mixed", "tok:13a", f"version:{sacrebleu.__version__}"):
        assert part in bleu.signature
    assert "nc:6|nw:0" in chrf.signature
    assert str(bleu) == f"BLEU {bleu.value:.2f}  {bleu.signature}"


def test_equal_text_is_100_and_nothing_in_common_0() -> None:
    text = [reference for _, reference in PAIRS]
    assert [score.value for score in corpus_scores(text, [text], "13a")] == pytest.approx([100.0, 100.0])
    assert corpus_scores([""] * 5, [text], "13a")[0].value == 0.0


@pytest.mark.parametrize("drop", [("hypotheses", 1), ("references", 1), ("hypotheses", 5), ("references", 5)])
def test_unequal_counts_are_refused_with_both(drop: tuple[str, int]) -> None:
    sides = {"hypotheses": ["a b c d e"] * 5, "references": ["a b c d e"] * 5}
    sides[drop[0]] = sides[drop[0]][drop[1] :]
    counts = (len(sides["hypotheses"]), len(sides["references"]))
    with pytest.raises(DataError, match=f"{counts[0]} translations but {counts[1]} references"):
        corpus_scores(sides["hypotheses"], [sides["references"]], "13a")


def test_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no sentences"):
        corpus_scores([], [[]], "13a")


REFERENCES = [f"the small dog runs over meadow {i} this morning" for i in range(60)]


def spoilt(every: int) -> list[str]:
    """REFERENCES with a wrong word in one sentence of `every`."""
    return [line if i % every else line.replace("dog", "cat") for i, line in enumerate(REFERENCES)]


def test_the_paired_bootstrap_of_two_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    baseline, system = spoilt(2), spoilt(4)
    found = paired_bootstrap(baseline, system, [REFERENCES], "13a", samples=200)
    before, after = (corpus_scores(each, [REFERENCES], "13a") for each in (baseline, system))
    assert [(each.name, each.baseline) for each in found] == [(score.name, score.value) for score in before]
    assert [(each.name, each.system) for each in found] == [(score.name, score.value) for score in after]
    for each in found:
        assert each.difference == each.system - each.baseline > 0
        assert each.baseline_interval[0] < each.baseline < each.baseline_interval[1]
        assert each.system_interval[0] < each.system < each.system_interval[1]
        assert 1 / 201 <= each.p_value < 0.05
    assert paired_bootstrap(baseline, system, [REFERENCES], "13a", samples=200) == found
    assert paired_bootstrap(baseline, system, [REFERENCES], "13a", samples=200, seed=7) != found
    assert os.environ["SACREBLEU_SEED"] == "99"
    monkeypatch.delenv("SACREBLEU_SEED")
    assert paired_bootstrap(baseline, system, [REFERENCES], "13a", samples=200) == found
    assert "SACREBLEU_SEED" not in os.environ


def test_as_many_mistakes_in_other_sentences_are_no_evidence() -> None:
    system = [line if i % 4 != 1 else line.replace("dog", "cat") for i, line in enumerate(REFERENCES[:-1])]
    system.append(REFERENCES[-1].replace("small", "little"))
    assert all(each.p_value > 0.2 for each in paired_bootstrap(spoilt(4), system, [REFERENCES], "13a", samples=200))


def test_a_system_against_itself_is_no_difference() -> None:
    for each in paired_bootstrap(spoilt(3), spoilt(3), [REFERENCES], "13a", samples=50):
        assert (each.difference, each.p_value) == (0.0, 1.0)
        assert each.baseline_interval == each.system_interval


def test_systems_that_do_not_pair_are_refused() -> None:
    with pytest.raises(DataError, match="59 translations but 60 references"):
        paired_bootstrap(REFERENCES[1:], REFERENCES, [REFERENCES], "13a")
    with pytest.raises(DataError, match="59 translations but 60 references"):
        paired_bootstrap(REFERENCES, REFERENCES[1:], [REFERENCES], "13a")
    with pytest.raises(DataError, match="no sentences"):
        paired_bootstrap([], [], [[]], "13a")


def test_scores_of_parts_are_sacrebleus_of_the_same_sentences() -> None:
    systems = [spoilt(2), spoilt(3), [line[:20] for line in REFERENCES]]
    found = SystemScores(systems, [REFERENCES, spoilt(7)], "13a", ter=True)
    assert found.metrics == ["BLEU", "chrF2", "TER"]
    for places in (None, [5], [0, 7, 8, 31], list(range(60))):
        part = range(60) if places is None else places
        references = [[side[place] for place in part] for side in (REFERENCES, spoilt(7))]
        for system, hypotheses in enumerate(systems):
            chosen = [hypotheses[place] for place in part]
            expected = corpus_scores(chosen, references, "13a")
            assert [found.scores(each.name, places)[system] for each in expected] == [each.value for each in expected]
            assert found.scores("TER", places)[system] == sacrebleu.corpus_ter(chosen, references).score
    alone = [
        corpus_scores([line], [[first], [second]], "13a")[1].value
        for line, first, second in zip(systems[2], REFERENCES, spoilt(7), strict=True)
    ]
    assert found.sentence_scores("chrF2")[2] == alone
    bleu, chrf = corpus_scores(systems[0], [REFERENCES, spoilt(7)], "13a")
    signatures = found.signatures()
    assert (signatures["BLEU"], signatures["chrF2"]) == (bleu.signature, chrf.signature)


def test_both_paired_tests_are_sacrebleus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.evaluation.scores, "RANDOMISATION_TRIALS", 300)
    systems = [spoilt(2), spoilt(4), spoilt(2)]
    found = SystemScores(systems, [REFERENCES], "13a").tested()
    expected = paired_bootstrap(systems[0], systems[1], [REFERENCES], "13a")
    for each in expected:
        baseline, system, same = found[each.name]
        assert (baseline.bootstrap, baseline.randomisation, baseline.interval) == (1.0, 1.0, each.baseline_interval)
        assert (system.bootstrap, system.interval) == (each.p_value, each.system_interval)
        assert 1 / 301 <= system.randomisation < 0.05
        assert (same.bootstrap, same.randomisation, same.interval) == (1.0, 1.0, each.baseline_interval)


def test_intervals_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SystemScores([spoilt(2), spoilt(4), spoilt(2)], [REFERENCES], "13a")
    turned = SystemScores([spoilt(4), spoilt(2)], [REFERENCES], "13a")
    places = [*range(0, 60, 2), 1, 3, 5]
    for metric in found.metrics:
        before, after, _ = found.scores(metric, places)
        none, better, same = found.intervals(metric, places)
        assert none == same == (0.0, 0.0)
        assert 0 < better[0] < after - before < better[1]
        # The other way round, the sign changes.
        low, high = turned.intervals(metric, places)[1]
        assert (-high, -low) == pytest.approx(better)
        # Draws may be made a few at a time.
        monkeypatch.setattr(nmt.evaluation.scores, "_MOST_DRAWN", 1)
        assert found.intervals(metric, places)[1] == pytest.approx(better)
        monkeypatch.undo()
        assert found.intervals(metric, places, seed=2)[1] != better


def test_evaluate_prints_and_keeps_scores_of_its_translations(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["evaluate", str(run), "--split", "dev", "--show", "2", "decoding.beam_size=2"]) == 0
    out = capfd.readouterr().out
    hypotheses = (run / "report" / "dev.hypotheses").read_bytes().decode().split("\n")[:-1]
    _, references, _ = RunDirectory(run).text("dev")
    bleu, chrf = corpus_scores(hypotheses, [references], "13a")
    assert re.search(rf"^dev +8 +1 +{bleu.value:.2f} +{chrf.value:.2f} ", out, re.M)
    assert f"BLEU        {bleu.signature}\nchrF2       {chrf.signature}\n" in out
    assert out.count("translation ") == 2
    assert "beam 2" in out
    report = json.loads((run / "report" / "dev.json").read_text())
    assert report["scores"]["BLEU"] == bleu.to_dict()
    assert report["sources_sha256"] == sha256((run / "text" / "dev.source").read_bytes()).hexdigest()
    assert report["decoding"]["beam_size"] == 2
    for name in ("perplexity", "bits_per_character"):
        assert f"  {report[name]:,.3f}  " in out


def test_perplexity_does_not_depend_on_the_batches(run: Path) -> None:
    translator = load(run)
    sources, targets, _ = RunDirectory(run).text("test")

    def measured(batch_tokens: int) -> Sequence[float]:
        world = World(torch.device("cpu"))
        found = perplexity(translator.model, translator.subwords, sources, targets, batch_tokens, world)
        return found.pieces, found.words, found.bits

    assert measured(1) == pytest.approx(measured(100_000), rel=1e-6)
    pieces, words, bits = measured(500)
    num_pieces = sum(len(each) + 1 for each in translator.subwords.encode_batch(targets))
    num_words = sum(len(target.split()) + 1 for target in targets)
    assert np.log(words) * num_words == pytest.approx(np.log(pieces) * num_pieces)
    num_characters = sum(len(target) + 1 for target in targets)
    assert bits * np.log(2) * num_characters == pytest.approx(np.log(pieces) * num_pieces)


# ------------------------------------------------------------------------------------------------------ experts


def load(run: Path) -> Translator:

    directory = RunDirectory.existing(str(run))
    return Translator.load(directory, directory.config())


@pytest.fixture
def by_domain(run: Path) -> tuple[Translator, list[str], list[str], list[str]]:
    sources, targets, _ = RunDirectory(run).text("test")
    return load(run), sources, targets, ["long" if len(source) > 30 else "short" for source in sources]


def test_the_report_counts_each_real_token_once(
    by_domain: tuple[Translator, list[str], list[str], list[str]],
) -> None:
    translator, sources, targets, domains = by_domain
    layers = expert_report(translator.model, translator.subwords, sources, targets, domains)
    assert [layer.layer for layer in layers] == ["encoder.1", "decoder.1"]
    for layer, lines in zip(layers, (sources, targets), strict=True):
        lengths = [len(pieces) + 1 for pieces in translator.subwords.encode_batch(lines)]
        assert layer.num_tokens == sum(lengths)
        assert sum(row.share for row in layer.experts) == pytest.approx(1.0)
        # An expert's mean lift, each domain weighted by its share of the tokens, is 1 unless it is idle.
        for name in ("long", "short"):
            share = sum(n for n, domain in zip(lengths, domains, strict=True) if domain == name) / sum(lengths)
            assert sum(row.share * row.domains[name] for row in layer.experts) == pytest.approx(1.0), share
        assert all(0 <= row.mean_gate <= 1 for row in layer.experts)


def test_domains_follow_their_sentences_into_the_batches(
    by_domain: tuple[Translator, list[str], list[str], list[str]],
) -> None:
    translator, sources, targets, domains = by_domain
    together = expert_report(translator.model, translator.subwords, sources, targets, domains)
    for place, layer in enumerate(together):
        expected = np.zeros((len(layer.experts), 2))
        for source, target, domain in zip(sources, targets, domains, strict=True):
            alone = expert_report(translator.model, translator.subwords, [source], [target], [])[place]
            shares = np.array([row.share for row in alone.experts])
            expected[:, int(domain == "short")] += shares * alone.num_tokens * alone.k
        lift = expected / expected.sum(1, keepdims=True).clip(1) / (expected.sum(0) / expected.sum())
        found = [[row.domains["long"], row.domains["short"]] for row in layer.experts]
        np.testing.assert_allclose(found, lift, rtol=1e-6)


def test_experts_command_prints_and_writes_json(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["experts", str(run)]) == 0
    out = capfd.readouterr().out
    report = json.loads((run / "report" / "experts.json").read_text())
    assert report["split"] == "test"
    assert [layer["layer"] for layer in report["layers"]] == ["encoder.1", "decoder.1"]
    for layer in report["layers"]:
        assert sum(row["share"] for row in layer["experts"]) == pytest.approx(1.0)
        assert f"{layer['layer']}: 4 experts, 2 per token, {layer['num_tokens']:,} tokens" in out
    vocabulary = load_vocabulary(RunDirectory(run))
    sources = RunDirectory(run).text("test")[0]
    assert report["layers"][0]["num_tokens"] == sum(len(each) + 1 for each in vocabulary.encode_batch(sources))
