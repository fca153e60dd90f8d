"""Texts of other domains at every validation: what is measured and warned of, and that training does not notice."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nmt.checkpoint import list_checkpoints
from nmt.config import Config, Direction
from nmt.data.mixture import Corpora
from nmt.data.prepared import Prepared, prepared_path
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, DataError, UserError
from nmt.evaluation.perplexity import Perplexity, perplexity
from nmt.evaluation.scores import corpus_scores
from nmt.metrics.record import DevLine, read_lines
from nmt.parallel.expert_parallel import make_model
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.training.progress import Progress
from nmt.training.validation import Validated, Validation, dev_parts
from nmt.training.watching import Lowest, WatchedText, forgotten, watched_texts
from tests.toy import HARD, Cli, saved, steps_logged, toy_config, train, write_corpus

CPU = torch.device("cpu")


def dev_lines(run: Path) -> dict[int, DevLine]:
    return {line.step: line for line in read_lines(run / "metrics.jsonl", DevLine)}


def progress(run: Path) -> Progress:
    return Progress.of(list_checkpoints(run / "checkpoints")[-1])


# -------------------------------------------------------------------------------------------- what is forgotten


def test_a_warning_comes_with_each_tenth_above_the_lowest() -> None:
    lowest: dict[str, Lowest] = {}
    told = [
        forgotten(lowest, "old", value, step)
        for step, value in enumerate([5.0, 5.4, 5.51, 6.0, 6.07, 4.0, 4.3, 4.41, math.nan, 4.4])
    ]
    assert [bool(line) for line in told] == [False, False, True, False, True, False, False, True, False, False]
    assert told[4].startswith("warning: dev perplexity of old is 6.07, 21 % above its best (5.00 at step 0): training")
    assert "(4.00 at step 5)" in told[7]
    assert lowest == {"old": Lowest(4.0, 5, 4.41)}


def test_each_text_has_a_lowest_of_its_own() -> None:
    lowest: dict[str, Lowest] = {}
    for name, value in (("a", 2.0), ("b", 9.0), ("a", 2.1), ("b", 8.0)):
        assert forgotten(lowest, name, value, 3) is None
    assert {name: each.perplexity for name, each in lowest.items()} == {"a": 2.0, "b": 8.0}


# ----------------------------------------------------------------------------------------------- what is watched


def test_runs_and_corpora_are_found_with_their_text(run: Path, shared_text: Path) -> None:
    prepared = prepared_path(toy_config(shared_text).corpus)
    by_run, by_corpus = watched_texts([str(run), str(prepared)], [])
    assert (by_run.name, by_corpus.name) == ("run", "toy")
    assert by_run[1:] == by_corpus[1:]
    assert by_run.sources == (shared_text / "dev.en").read_text().splitlines()
    assert by_run.directions == [Direction("en", "de")] * 8


def test_names_differ(run: Path, shared_text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(run)
    again = tmp_path / "run"
    assert [each.name for each in watched_texts([str(run)], ["run"])] == [str(run)]
    prepared = prepared_path(toy_config(shared_text).corpus)
    (tmp_path / "copy").symlink_to(prepared)
    references = [str(prepared), str(tmp_path / "copy"), str(again)]
    assert [each.name for each in watched_texts(references, [])] == [*references[:2], "run"]
    with pytest.raises(UserError, match=r"training.watch has \S+ more than once"):
        watched_texts([str(run), str(run)], [])


def test_what_cannot_be_watched(run: Path, cli: Cli, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"training.watch: nowhere is neither a prepared corpus nor a run"):
        watched_texts(["nowhere"], [])
    assert cli("export", str(run), str(corpus / "model")) == 0, cli.err
    with pytest.raises(UserError, match=r"model has no dev text"):
        watched_texts([str(corpus / "model")], [])
    (corpus / "broken").mkdir()
    (corpus / "broken" / "config.yaml").write_text("[")
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged"):
        watched_texts([str(corpus / "broken")], [])


def test_a_text_in_another_direction_is_refused_at_the_start(
    shared_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(shared_text, "run.name=new", "training.watch=[old]")
    prepared = Prepared.open(prepared_path(config.corpus))
    text = WatchedText("old", ["der Hund"], ["the dog"], [Direction("de", "en")])
    monkeypatch.setattr("nmt.training.validation.watched_texts", lambda *_: [text])
    with pytest.raises(UserError, match=r"training.watch: old is de-en, but this run translates en-de: "):
        Validation(config, Corpora(config.corpus, prepared), World(CPU))
    # Its symbol is enough: the model reads all languages alike.
    changed = Prepared(prepared.path, prepared.manifest | {"languages": ["de", "en"]})
    Validation(config, Corpora(config.corpus, changed), World(CPU))


def test_validation_knows_what_all_corpora_of_a_mixture_have(
    shared_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(shared_text, "run.name=new", "training.watch=[old]", f"corpus.mixture={{{tmp_path}/more: 1}}")
    prepared = Prepared.open(prepared_path(config.corpus))
    shutil.copytree(prepared.path, tmp_path / "more")
    longest = prepared.manifest["longest_source_pieces"] + 7
    more = prepared.manifest | {"languages": ["de", "en"], "longest_source_pieces": longest}
    (tmp_path / "more" / "manifest.json").write_text(json.dumps(more))
    own = Prepared(prepared.path, prepared.manifest | {"languages": ["de"]})
    text = WatchedText("old", ["der Hund"], ["the dog"], [Direction("de", "en")])
    monkeypatch.setattr("nmt.training.validation.watched_texts", lambda *_: [text])
    translators: list[dict[str, Any]] = []
    made = Translator.__init__

    def note(self: Translator, *arguments: Any, **named: Any) -> None:
        translators.append({"longest": arguments[4], **named})
        made(self, *arguments, **named)

    monkeypatch.setattr(Translator, "__init__", note)
    corpora = Corpora(config.corpus, own)
    model = make_model(config, own.subwords().size, World(CPU))
    Validation(config, corpora, World(CPU)).run(model)
    assert translators[0]["longest"] == longest
    assert translators[0]["directions"].symbols.languages == ("de", "en")


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def watching(run: Path, tmp_path_factory: pytest.TempPathFactory, shared_text: Path) -> Path:
    """Eight updates, with dropout and noise, that watch another run and its corpus."""
    folder = tmp_path_factory.mktemp("watching")
    (folder / "shared_text").symlink_to(shared_text)
    return train(folder, "new", 8, *HARD, watch_of(run, shared_text), "training.checkpoint_every=4")


def watch_of(run: Path, shared_text: Path) -> str:
    return f"training.watch=[{run},{prepared_path(toy_config(shared_text).corpus)}]"


@pytest.mark.slow
def test_training_does_not_notice(watching: Path, corpus: Path) -> None:
    plain = train(corpus, "plain", 8, *HARD, "training.checkpoint_every=4")
    assert saved(plain) == saved(watching)
    assert steps_logged(plain, "dev") == [4, 8]
    assert steps_logged(watching, "dev") == [0, 4, 8]
    before, after = dev_lines(plain), dev_lines(watching)
    assert [replace(after[step], texts={}) for step in (4, 8)] == [before[step] for step in (4, 8)]


def test_scores_are_those_of_an_evaluation(watching: Path, run: Path) -> None:
    """The watched text is the run's dev text, read with the new vocabulary by the new model."""
    directory = RunDirectory.existing(str(watching))
    line = dev_lines(watching)[8]
    assert list(line.texts) == ["run", "toy"]
    translator = Translator.load(directory, directory.config(["decoding.checkpoint=8", "decoding.retry=false"]))
    sources, targets, _ = RunDirectory.existing(str(run)).text("dev")
    expected = perplexity(translator.model, translator.subwords, sources, targets, 700, World(CPU))
    found = translator.translate(sources[:2], replace(translator.options, beam_size=1))
    bleu = corpus_scores([each.text for each in found], [targets[:2]], "13a")[0].value
    for name in ("run", "toy"):
        assert line.texts[name] == {"perplexity": pytest.approx(expected.pieces, rel=1e-5), "bleu": bleu}


@pytest.mark.slow
def test_a_resumed_run_remembers_the_lowest(watching: Path, corpus: Path, run: Path, shared_text: Path) -> None:
    watch = watch_of(run, shared_text)
    train(corpus, "two", 4, *HARD, watch, "training.checkpoint_every=4")
    two = train(corpus, "two", 8, *HARD, watch, "training.checkpoint_every=4")
    assert steps_logged(two, "dev") == [0, 4, 8]
    assert dev_lines(two) == dev_lines(watching)
    assert progress(two).lowest == progress(watching).lowest
    assert set(progress(two).lowest) == {"run", "toy"}
    # What is watched may change on the way.
    three = train(corpus, "two", 9, *HARD, f"training.watch=[{run}]", "training.checkpoint_every=4")
    assert list(dev_lines(three)[9].texts) == ["run"]


def test_a_start_from_the_beginning_has_one_line_of_each_step(watching: Path, corpus: Path, run: Path) -> None:
    changes = (*HARD, f"training.watch=[{run}]", "training.checkpoint_every=99")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmt.training.trainer.Trainer._update", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, "again", 4, *changes)
    assert steps_logged(corpus / "again", "dev") == [0]
    train(corpus, "again", 4, *changes)
    assert steps_logged(corpus / "again", "dev") == [0, 4]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_warning_is_printed_once(corpus: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    coming = iter([5.0, 5.4, 5.6, 5.7, 6.2])

    def scores(_validation: Validation, _model: Any) -> tuple[Validated, dict[str, Validated]]:
        return Validated(3.0, 4.0, 20.0, 0, 2), {"run": Validated(next(coming), 9.0, 12.5, 0, 2)}

    changes = (f"training.watch=[{run}]", "training.validate_every=1", "training.checkpoint_every=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "run", scores)
        train(corpus, "a", 2, *changes)
        first = capfd.readouterr().err
        train(corpus, "a", 4, *changes)
    second = capfd.readouterr().err
    assert "step 0: dev perplexity 3.00, greedy BLEU 20.0 of 2 sentences (before training)" in first
    assert "step 1: run: dev perplexity 5.40, greedy BLEU 12.5 of 2 sentences" in first
    warning = "warning: dev perplexity of run is 5.60, 12 % above its best (5.00 at step 0): training forgets it"
    assert first.count("warning: dev perplexity") == 1
    assert warning in first
    # It is 5.70 at step 3: no tenth above what was warned of before the run was resumed.
    assert second.count("warning: dev perplexity") == 1
    assert "is 6.20, 24 % above" in second


def test_a_baseline_is_not_the_best(corpus: Path, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "run", lambda *_: (Validated(3.0, 4.0, 20.0, 0, 2), {}))
        new = train(corpus, "b", 4, f"training.watch=[{run}]", "training.best_by=bleu", "training.patience=5")
    assert progress(new).best_score == -20.0
    assert progress(new).validations_since_best == 0
    assert [each.score for each in list_checkpoints(new / "checkpoints")] == [-20.0]


def test_a_run_from_another_starts_with_a_validation(corpus: Path, run: Path) -> None:
    new = train(corpus, "from", 4, f"run.start_from={run}")
    lines = dev_lines(new)
    assert list(lines) == [0, 4]
    before = read_lines(run / "metrics.jsonl", DevLine)
    best = min(before, key=lambda line: line.perplexity)
    assert lines[0].perplexity == pytest.approx(best.perplexity, rel=1e-5)


def test_old_checkpoints_have_no_lowest(watching: Path, corpus: Path) -> None:
    run = train(corpus, "old", 4)
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = newest.state()
    assert state["progress"].pop("lowest") == {}
    (newest.path / "state.json").write_text(json.dumps(state))
    assert progress(run).lowest == {}
    assert progress(watching).lowest["run"].step in (0, 4, 8)


# ------------------------------------------------------------------------------------------------ several directions


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """Four updates in both directions, which watch a run in one of them."""
    folder = tmp_path_factory.mktemp("both")
    write_corpus(folder)
    files = [
        setting
        for split in ("train", "dev", "test")
        for setting in (
            f"corpus.{split}.source=[]",
            f"corpus.{split}.target=[]",
            f"corpus.{split}.texts={{en: [{split}.en], de: [{split}.de]}}",
        )
    ]
    changes = ("corpus.directions=[en-de,de-en]", "training.validation_sentences=5", f"training.watch=[{run}]")
    return train(folder, "both", 4, *files, *changes)


def test_directions_take_turns_in_what_is_translated() -> None:
    config = Config.from_dict({"training": {"validation_sentences": 5}})
    order = [Direction.of(name) for name in ("en-de", "de-zh", "en-fr") * 2]
    parts = dev_parts(config, [*"abcdef"], [*"uvwxyz"], order)
    assert [str(part.direction) for part in parts] == ["en-de", "de-zh", "en-fr"]
    assert [(part.sources, part.targets) for part in parts] == [
        (["a", "d"], ["u", "x"]),
        (["b", "e"], ["v", "y"]),
        (["c", "f"], ["w", "z"]),
    ]
    assert [part.translated for part in parts] == [2, 2, 1]
    assert [part.tokenizer.name for part in parts] == ["13a", "zh", "13a"]
    assert [part.translated for part in dev_parts(config, [*"ab"], [*"uv"], order[:2])] == [1, 1]


def test_directions_are_scored_apart_and_together(both: Path) -> None:
    directory = RunDirectory.existing(str(both))
    translator = Translator.load(directory, directory.config(["decoding.checkpoint=4", "decoding.retry=false"]))
    sources, targets, _ = directory.text("dev")
    order = directory.directions("dev")
    assert order[:4] == [Direction("en", "de"), Direction("de", "en")] * 2
    line = dev_lines(both)[4]
    assert list(line.texts) == ["en-de", "de-en", "run"]
    parts: list[Perplexity] = []
    bleu: list[float] = []
    for name in ("en-de", "de-en"):
        options = replace(translator.options, direction=Direction.of(name), beam_size=1)
        own = [place for place, each in enumerate(order) if str(each) == name]
        texts = [sources[place] for place in own], [targets[place] for place in own]
        prefixes = [translator.source_symbols(options)] * len(own)
        assert len(prefixes[0]) == 1
        parts.append(perplexity(translator.model, translator.subwords, *texts, 90, World(CPU), prefixes=prefixes))
        # The first five lines, in turn: three of the first direction, two of the second.
        count = sum(place < 5 for place in own)
        found = [each.text for each in translator.translate(texts[0][:count], options)]
        bleu.append(corpus_scores(found, [texts[1][:count]], "13a")[0].value)
        assert line.texts[name] == {"perplexity": pytest.approx(parts[-1].pieces, rel=1e-5), "bleu": bleu[-1]}
    nll, pieces = sum(each.nll for each in parts), sum(each.num_pieces for each in parts)
    assert line.perplexity == pytest.approx(math.exp(nll / pieces), rel=1e-5)
    assert line.perplexity == pytest.approx(Perplexity.of_all(parts).pieces, rel=1e-5)
    assert line.word_perplexity == pytest.approx(Perplexity.of_all(parts).words, rel=1e-5)
    assert line.bleu == pytest.approx(sum(bleu) / 2)
    assert parts[0].pieces != pytest.approx(parts[1].pieces, rel=1e-3)


def test_a_text_in_two_languages_is_watched_with_the_symbol_of_its_target(both: Path, run: Path) -> None:
    directory = RunDirectory.existing(str(both))
    translator = Translator.load(directory, directory.config(["decoding.checkpoint=4"]))
    sources, targets, _ = RunDirectory.existing(str(run)).text("dev")
    prefixes = [translator.directions.prefix(translator.subwords, Direction("en", "de"))] * len(sources)
    scored = [
        perplexity(translator.model, translator.subwords, sources, targets, 90, World(CPU), prefixes=each).pieces
        for each in (prefixes, ())
    ]
    assert dev_lines(both)[4].texts["run"]["perplexity"] == pytest.approx(scored[0], rel=1e-5)
    assert scored[0] != pytest.approx(scored[1], rel=1e-4)


def test_pairs_of_all_directions_count_equally() -> None:
    parts = [Perplexity(12.0, 4, 2, 20), Perplexity(3.0, 8, 4, 40, (7,))]
    whole = Perplexity.of_all(parts)
    assert (whole.pieces, whole.words) == (pytest.approx(math.exp(15 / 12)), pytest.approx(math.exp(15 / 6)))
    assert whole.bits == pytest.approx(15 / 60 / math.log(2))


def test_a_line_on_several_directions_is_short() -> None:
    def scores(perplexity: float, bleu: float | None) -> Validated:
        return Validated(perplexity, 9.0, bleu, 0, 40)

    parts = {"en-de": scores(5.0, 24.1), "de-en": scores(7.0, 21.0), "cs-fr": scores(6.5, 17.9)}
    whole = Validated(6.12, 9.0, 21.0, 0, 120, parts)
    assert str(whole) == (
        "dev perplexity 6.12, greedy BLEU 21.0 of 120 sentences (mean of 3 directions, en-de 24.1 the highest, "
        "cs-fr 17.9 the lowest)"
    )
    parts = {name: replace(each, bleu=None) for name, each in parts.items()}
    whole = replace(whole, bleu=None, directions=parts)
    assert str(whole) == "dev perplexity 6.12 (3 directions, de-en 7.00 the highest, en-de 5.00 the lowest)"


def test_curves_have_a_figure_for_each_text(watching: Path, cli: Cli) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(watching / "tensorboard"))
    curves.Reload()
    assert {f"dev/{name}/{figure}" for name in ("run", "toy") for figure in ("perplexity", "bleu")} <= set(
        curves.Tags()["scalars"]
    )
    steps = {event.step: event.value for event in curves.Scalars("dev/run/perplexity")}
    expected = {step: line.texts["run"]["perplexity"] for step, line in dev_lines(watching).items()}
    assert steps == pytest.approx(expected, rel=1e-6)
    assert cli("runs", str(watching.parent)) == 0, cli.err
    assert "new" in cli.out


def test_a_run_that_is_worse_than_its_start_is_told(
    corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    coming = iter([3.0, 5.0, 4.0, 2.0])
    monkeypatch.setattr(Validation, "run", lambda *_: (Validated(next(coming), 4.0, 20.0, 0, 2), {}))
    start = (f"run.start_from={run}", "training.validate_every=1", "training.checkpoint_every=1")
    train(corpus, "tuned", 2, *start)
    train(corpus, "tuned", 3, *start)
    lines = [line for line in capfd.readouterr().err.splitlines() if "dev perplexity" in line]
    ends = ["(before training)", *["(best so far, but worse than before training)"] * 2, "(best so far)"]
    assert [line[line.index("(") :] for line in lines] == ends
