"""A model of several directions in use: every command with a right, a missing, a wrong and a zero-shot direction."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nmt
from nmt.commands.dev_pairs import DevPairs
from nmt.config import Direction
from nmt.data.held_out import encode_pairs
from nmt.decoding.translator import Translator
from nmt.evaluation.kept import kept_translations
from nmt.evaluation.sets import by_direction, evaluation_set
from nmt.evaluation.tokenizers import bleu_tokenizer, describe
from nmt.experts.explain import explain_sentence
from nmt.experts.observe import observe
from nmt.run import RunDirectory
from tests.many import DIRECTIONS, lines_in
from tests.toy import Cli

HAS = "it has: en-de, de-en, en-fr"
SENTENCES = ["the small dog runs", "", "over a green meadow this morning", "and looks"]
GREEDY = "decoding.beam_size=1"


@pytest.fixture
def copy(many: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(many, tmp_path / "many"))


@pytest.fixture(scope="session")
def model(many: Path) -> nmt.Model:
    return nmt.load(many)


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "in.en"
    path.write_text("".join(f"{line}\n" for line in SENTENCES))
    return str(path)


def translator_of(run: Path) -> Translator:
    directory = RunDirectory(run)
    return Translator.load(directory, directory.config())


# ------------------------------------------------------------------------------------------------- translate, score


def test_each_direction_has_its_own_translations(cli: Cli, many: Path, model: nmt.Model, source: str) -> None:
    found = {}
    for direction in ("en-de", "en-fr", "de-fr"):
        start, end = direction.split("-")
        assert cli("translate", str(many), source, "--from", start, "--to", end) == 0
        found[direction] = cli.out.splitlines()
        assert found[direction] == [each.text for each in model.translate(SENTENCES, direction=direction)]
        assert ("zero-shot" in cli.err) == (direction == "de-fr")
    assert f"zero-shot: {many} was not trained from de to fr" in cli.err
    assert found["en-de"] != found["en-fr"]
    assert found["en-fr"] == found["de-fr"]  # the target alone has a symbol
    assert cli("translate", str(many), source, "--to", "fr") == 0
    assert cli.out.splitlines() == found["en-fr"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), f"translates 3 directions: give --from and --to; {HAS}"),
        (("--from", "en"), "translates en-de, en-fr: give --to, too"),
        (("--from", "en", "--to", "cs"), f"does not translate en-cs; {HAS}"),
        (("--to", "cs"), f"does not translate to cs; {HAS}"),
        (("--from", "cs", "--to", "en"), f"does not translate cs-en; {HAS}"),
        (("--from", "en", "--to", "en"), f"does not translate en-en; {HAS}"),
        (("--to", "fr", "--tag", "news"), "was not trained with this tag; it has: bt"),
    ],
    ids=str,
)
def test_other_directions_are_refused_by_every_command(
    cli: Cli, many: Path, source: str, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    run, files = str(many), ("--source", source, "--reference", source)
    for command in (
        ("translate", run, source, "-o", str(tmp_path / "out")),
        ("score", run, source, source),
        ("evaluate", run, *files),
        ("compare", run, f"{run},decoding.beam_size=1", *files),
        ("experts", run, *files),
        ("experts", run, "--explain", SENTENCES[0]),
    ):
        cli.refuses(2, *command, *options, says=(run, says))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.en"]


def test_a_run_of_one_direction_takes_that_one_alone(cli: Cli, run: Path, source: str) -> None:
    assert cli("translate", str(run), source, "--from", "en", "--to", "de") == 0
    given, notes = cli.out, cli.err
    assert cli("translate", str(run), source) == 0
    assert cli.out == given
    assert "zero-shot" not in notes
    cli.refuses(2, "translate", str(run), source, "--from", "de", says=("does not translate from de; it has: en-de",))
    cli.refuses(2, "score", str(run), source, source, "--to", "fr", says=("does not translate to fr",))


def test_a_file_is_not_resumed_in_another_direction(
    cli: Cli, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with another tag; the same direction said in another way resumes."""
    source, out = tmp_path / "in.en", tmp_path / "out.fr"
    source.write_text("the small dog\n" * 200)
    command = ("translate", str(many), str(source), "-o", str(out), "--resume", GREEDY)
    find, calls = Translator.find, iter(range(99))

    def find_twice(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return find(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Translator, "find", find_twice)
        assert cli(*command, "--to", "fr") == 130
    cli.refuses(2, *command, "--to", "de", says=("was begun with direction=en-fr, not en-de",))
    cli.refuses(2, *command, "--to", "fr", "--tag", "bt", says=("--tag=nothing, not bt",))
    assert cli(*command, "--from", "en", "--to", "fr") == 0
    assert "resuming after" in cli.err
    assert len(set(out.read_text().splitlines())) == 1


def test_a_tag_is_read_before_each_source(cli: Cli, copy: Path, model: nmt.Model, source: str) -> None:
    assert cli("translate", str(copy), source, "--to", "fr", "--tag", "bt") == 0
    tagged = cli.out.splitlines()
    assert tagged == [each.text for each in model.translate(SENTENCES, direction="en-fr", tag="bt")]
    plain = model.score(SENTENCES, SENTENCES, direction="en-fr")
    assert plain[0].log_prob != model.score(SENTENCES, SENTENCES, direction="en-fr", tag="bt")[0].log_prob
    assert cli("evaluate", str(copy), "--to", "fr", "--tag", "bt", GREEDY) == 0
    assert report_of(copy, "test-bt-en-fr")["tag"] == "bt"
    assert cli("experts", str(copy), "--explain", SENTENCES[0], "--to", "fr", "--tag", "bt") == 0
    assert "⟨bt⟩" in cli.out


def test_scores_are_those_of_the_direction(cli: Cli, many: Path, model: nmt.Model, source: str) -> None:
    assert cli("score", str(many), source, source, "--from", "en", "--to", "fr") == 0
    shown = [float(line.split("\t")[0]) for line in cli.out.splitlines()]
    scores = model.score(SENTENCES, SENTENCES, direction="en-fr")
    assert shown == pytest.approx([each.log_prob for each in scores], abs=1e-5)
    other = model.score(SENTENCES, SENTENCES, direction="en-de")
    assert scores[0].log_prob != other[0].log_prob
    # The score of a translation is what the search found.
    best = model.translate(SENTENCES[0], direction="en-fr", max_length=9).hypotheses[0]
    forced = model.score(SENTENCES[0], best.text, direction="en-fr")
    if best.finished and forced.pieces == best.pieces:
        assert forced.log_probs == pytest.approx(best.log_probs, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- evaluate


def report_of(run: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "report" / f"{name}.json").read_text())
    return found


@pytest.mark.slow
def test_evaluation_by_direction_is_that_of_each_directions_lines(cli: Cli, copy: Path, tmp_path: Path) -> None:
    assert cli("evaluate", str(copy), GREEDY) == 0
    rows = {re.split(r"\s{2,}", line)[0]: line.split() for line in cli.out.splitlines()}
    assert [name for name in rows if name.startswith("test")] == [
        *(f"test {direction}" for direction in DIRECTIONS),
        "test, mean of 3 directions",
    ]
    assert "BLEU tokeniser 13a for de, en, fr" in cli.out
    bleu = []
    for direction in DIRECTIONS:
        start, end = direction.split("-")
        files = [tmp_path / f"{direction}.{side}" for side in (start, end)]
        for file, lines in zip(files, lines_in(copy, direction), strict=True):
            file.write_text("".join(f"{line}\n" for line in lines))
        options = ("--source", str(files[0]), "--reference", str(files[1]), "--from", start, "--to", end)
        assert cli("evaluate", str(copy), *options, GREEDY) == 0
        (apart,) = (copy / "report").glob(f"set-*{direction}.json")
        whole, alone = report_of(copy, f"test-{direction}"), json.loads(apart.read_text())
        for key in ("scores", "kept", "perplexity", "hypotheses_sha256", "direction", "sentences"):
            assert whole[key] == alone[key]
        bleu.append(alone["scores"]["BLEU"]["score"])
    assert float(rows["test, mean of 3 directions"][6]) == pytest.approx(np.mean(bleu), abs=0.006)
    assert not (copy / "report" / "test.json").exists()


def test_perplexity_reads_the_symbols_of_the_direction(cli: Cli, copy: Path, model: nmt.Model) -> None:
    assert cli("evaluate", str(copy), "--to", "fr", GREEDY) == 0
    scores = model.score(*lines_in(copy, "en-fr"), direction="en-fr")
    mean = sum(each.log_prob for each in scores) / sum(len(each.pieces) for each in scores)
    assert report_of(copy, "test-en-fr")["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-4)


def test_json_has_every_direction_and_the_means(cli: Cli, copy: Path) -> None:
    assert cli("evaluate", str(copy), GREEDY, "--json") == 0
    found = {(each["set"], each["name"]): each["score"] for each in json.loads(cli.out)}
    for name in ("BLEU", "chrF2"):
        mean = np.mean([found[f"test {direction}", name] for direction in DIRECTIONS])
        assert found["test, mean of 3 directions", name] == pytest.approx(mean)
    assert found["test, mean of 3 directions", "perplexity"] > 1


def test_zero_shot_directions_are_marked_and_have_a_mean_apart(cli: Cli, copy: Path) -> None:
    path = copy / "text" / "test.direction"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{'de-fr' if place >= 18 else line}\n" for place, line in enumerate(lines)))
    assert cli("evaluate", str(copy), GREEDY) == 0
    assert "test de-fr (zero-shot)" in cli.out
    assert "test, mean of 3 directions" in cli.out
    assert report_of(copy, "test-de-fr")["zero_shot"] is True
    assert report_of(copy, "test-en-fr")["zero_shot"] is False
    assert cli("export", str(copy), str(copy.with_name("export"))) == 0
    card = (copy.with_name("export") / "README.md").read_text()
    assert "test-en-fr" in card
    assert "de-fr" not in card


def test_a_direction_without_lines_is_refused(cli: Cli, many: Path) -> None:
    says = ("the test set has no lines from de to fr", HAS)
    *before, line = (cli("evaluate", str(many), "--from", "de", "--to", "fr"), *cli.err.splitlines())
    assert before[0] == 3
    assert all(part in line for part in says)


@pytest.mark.parametrize("option", [("--dial", "1"), ("--tune",)], ids=str)
def test_the_dial_and_tuning_take_one_direction(cli: Cli, copy: Path, option: tuple[str, ...]) -> None:
    cli.refuses(2, "evaluate", str(copy), *option, says=("takes a single direction", "--from and --to"))
    if option[0] == "--dial":
        assert cli("evaluate", str(copy), *option, "--to", "fr", GREEDY) == 0
        assert (copy / "report" / "dial-test-en-fr.json").exists()


def test_kept_translations_are_those_of_the_same_direction(cli: Cli, copy: Path) -> None:
    assert cli("evaluate", str(copy), "--to", "fr", GREEDY) == 0
    run = RunDirectory(copy)
    config = run.config([GREEDY])
    directions = translator_of(copy).directions
    (french,) = by_direction(evaluation_set(None, [], "test", run), directions, Direction("en", "fr"))
    kept = kept_translations(run, french, config.decoding)
    assert kept == (copy / "report" / "test-en-fr.hypotheses").read_text().split("\n")[:-1]
    assert kept_translations(run, replace(french, direction=Direction("de", "fr")), config.decoding) is None
    assert kept_translations(run, replace(french, tag="bt"), config.decoding) is None


@pytest.mark.slow
def test_runs_of_one_and_of_several_directions_are_compared(cli: Cli, copy: Path, run: Path) -> None:
    assert cli("evaluate", str(copy), "--from", "en", "--to", "de", GREEDY) == 0
    for systems in ((str(copy), str(run)), (str(run), str(copy))):
        page = str(copy / "page.html")
        assert cli("compare", *systems, "--from", "en", "--to", "de", GREEDY, "-o", page) == 0
        assert "BLEU tokeniser 13a: the target language is de" in cli.out
        assert ("translations kept by nmt evaluate" in cli.err) == (systems[0] == str(copy))
    refused = ("compare", str(copy), str(run), "--to", "fr")
    cli.refuses(2, *refused, says=(f"{run} does not translate to fr; it has: en-de",))


def test_a_line_describes_the_tokenisers_of_several_languages() -> None:
    found = {code: bleu_tokenizer("auto", code) for code in ("de", "zh", "fr")}
    assert describe(found) == "BLEU tokeniser 13a for de, fr; zh for zh"
    assert describe({"de": found["de"]}) == str(found["de"])


# ---------------------------------------------------------------------------------------------------------- experts


def test_the_report_has_the_languages_that_experts_prefer(cli: Cli, copy: Path) -> None:
    assert cli("experts", str(copy)) == 0
    layers = report_of(copy, "experts")["layers"]
    assert isinstance(layers, list)
    for layer in layers:
        for row in layer["experts"]:
            assert set(row["languages"]) == {"from de", "from en", "to de", "to en", "to fr"}
            assert row["domains"] == {}
        assert set(layer["language_purity"]) == {"source language", "target language"}
    markdown = (copy / "report" / "experts.md").read_text()
    assert "### Experts and languages" in markdown
    assert "⟨to" in markdown
    assert "&lt;language" not in markdown
    assert "Experts and languages" in (copy / "report" / "experts.html").read_text()
    assert cli("experts", str(copy), "--to", "fr") == 0
    (one, *_) = json.loads((copy / "report" / "experts-test-en-fr.json").read_text())["layers"]
    assert one["language_purity"] == {}


def test_an_explanation_has_the_symbol_that_the_encoder_reads(cli: Cli, copy: Path) -> None:
    translator = translator_of(copy)
    options = replace(translator.options, direction=Direction("en", "fr"))
    explanation = explain_sentence(translator, SENTENCES[0], options)
    assert explanation.translation == translator.translate([SENTENCES[0]], options)[0].text
    for layer in explanation.layers:
        pieces = explanation.pieces_of(layer)
        assert len(pieces) == len(layer.positions)
        assert (pieces[0] == "⟨to fr⟩") == layer.layer.startswith("encoder")
    assert all(len(row) == len(explanation.source_pieces) for row in explanation.attention)
    assert cli("experts", str(copy), "--explain", SENTENCES[0], "--to", "fr") == 0
    assert "⟨to fr⟩" in cli.out
    (page,) = (copy / "report").glob("explain-*-en-fr.html")
    assert "⟨to fr⟩" in page.read_text()


def test_dev_pairs_are_read_and_translated_in_their_directions(many: Path) -> None:
    translator = translator_of(many)
    pairs = DevPairs.of(RunDirectory(many))
    some = pairs.spread(7)
    assert {str(direction): len(places) for direction, places in some.places().items()} == dict.fromkeys(DIRECTIONS, 2)
    found = some.translations(translator)
    for source, direction, translation in zip(some.sources, some.directions, found, strict=True):
        assert direction is not None
        (alone,) = translator.translate([source], replace(translator.options, direction=direction))
        assert translation == alone.text
    symbols = some.read(translator).symbols
    assert len(set(symbols)) == 3
    read = encode_pairs(translator.subwords, some.sources, some.targets, prefixes=symbols)
    use = observe(translator.model, translator.subwords, some.sources, some.targets, symbols).use
    tokens = sum(map(len, read.sources)) + len(read.sources)
    assert float(use["encoder.1"].load_E.sum()) == 2 * tokens


def test_experts_are_pruned_by_the_mean_of_all_directions(cli: Cli, copy: Path) -> None:
    new = copy.with_name("pruned")
    assert cli("experts", str(copy), "--prune", "1", "-o", str(new), "--max-loss", "100") == 0
    for direction in DIRECTIONS:
        assert f"BLEU {direction}" in cli.out
    assert "BLEU, mean of 3" in cli.out
    assert RunDirectory(new).directions("dev") == RunDirectory(copy).directions("dev")
    assert cli("translate", str(new), str(copy / "text" / "test.source"), "--to", "fr") == 0
    cli.refuses(2, "experts", str(copy), "--prune", "1", "-o", "x", "--to", "fr", says=("--explain",))


# ------------------------------------------------------------------------------------------------- export and Python


def test_an_exported_model_translates_its_directions(cli: Cli, copy: Path, source: str) -> None:
    export = copy.with_name("export")
    assert cli("export", str(copy), str(export)) == 0
    card = (export / "README.md").read_text()
    assert card.startswith("# many: translates de, en and fr in 3 directions\n")
    assert "| directions | en-de, de-en, en-fr |" in card
    assert "nmt translate DIR input -o output --from en --to de" in card
    assert str(copy.parent) not in (export / "config.yaml").read_text()
    assert RunDirectory(export).config().corpus.train.texts["fr"] == ["train.fr", "bt.fr"]
    assert "| tags | bt |" in card
    given = []
    for run in (copy, export):
        assert cli("translate", str(run), source, "--to", "fr") == 0
        given.append(cli.out)
    assert given[0] == given[1]


def test_python_has_the_same_directions(model: nmt.Model) -> None:
    assert model.directions == [*DIRECTIONS]
    assert "en to de, de to en, en to fr" in repr(model)
    for call, says in (
        (lambda: model.translate("a"), "3 directions"),
        (lambda: model.translate("a", direction="en-cs"), "does not translate en-cs"),
        (lambda: model.translate("a", direction="en"), "is not a direction"),
        (lambda: model.translate("a", direction=3), "direction is an int"),
        (lambda: model.score("a", "b"), "3 directions"),
        (lambda: model.translate("a", direction="en-de", tag="news"), "news is none of the tags"),
        (lambda: model.explain("the dog"), "3 directions"),
        (lambda: model.experts(["a"], ["b"]), "3 directions"),
        (lambda: model.experts(["a"], ["b"], directions=["en-de", "en-fr"]), "2 directions for 1 sentence"),
    ):
        with pytest.raises(nmt.UserError, match=says):
            call()
    sources, targets = ["the dog", "der Hund"], ["der Hund", "the dog"]
    layers = model.experts(sources, targets, directions=["en-de", "de-en"])
    assert set(layers[0].experts[0].languages) == {"from de", "from en", "to de", "to en"}
    assert model.explain("the dog", direction="en-fr").source_symbols == ["⟨to fr⟩"]


def test_an_ensemble_needs_symbols_that_mean_the_same(model: nmt.Model, many: Path, copy: Path) -> None:
    both = nmt.load(many, ensemble=[copy])
    texts = [[each.text for each in some.translate(SENTENCES, direction="en-fr")] for some in (both, model)]
    assert texts[0] == texts[1]
    corpus = json.loads((copy / "corpus.json").read_text())
    (copy / "corpus.json").write_text(json.dumps(corpus | {"languages": ["fr", "en", "de"]}))
    with pytest.raises(
        nmt.CheckpointError, match=r"other target languages .* \(fr, en, de, bt instead of de, en, fr, bt\)"
    ):
        nmt.load(many, ensemble=[copy])
