"""nmt evaluate --tune: settings of the search are chosen on the dev set, and remain in the run."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nmt.evaluation.tune
from nmt.config import DecodingConfig
from nmt.decoding.translation import Options
from nmt.evaluation.scores import paired_bootstrap
from nmt.evaluation.sets import EvaluationSet
from nmt.evaluation.tune import Point, Tuned, tune
from nmt.run import RunDirectory
from tests.toy import Cli, train

REFERENCES = [f"the small dog runs over meadow {number} this morning" for number in range(100)]
Mistakes = Callable[[Point], int]
"""Number of sentences of REFERENCES that a search with these settings gets wrong."""


def search(mistakes: Mistakes, done: list[Point], _translator: Any, sources: Sequence[str], options: Options) -> Any:
    """Stand in for `timed`: the sources come back, some of them wrong."""
    point = Point(options.alpha, options.beta, options.beam_size)
    done.append(point)
    wrong = mistakes(point)
    return ["that is wrong" if place < wrong else line for place, line in enumerate(sources)], 1.0


def stand_in(monkeypatch: pytest.MonkeyPatch, mistakes: Mistakes, done: list[Point]) -> None:
    """Replace the searches; 100 samples of the bootstrap are enough for the differences here."""
    monkeypatch.setattr(nmt.evaluation.tune, "timed", partial(search, mistakes, done))
    monkeypatch.setattr(nmt.evaluation.tune, "paired_bootstrap", partial(paired_bootstrap, samples=100))


def tuned(monkeypatch: pytest.MonkeyPatch, mistakes: Mistakes, **decoding: Any) -> tuple[Tuned, list[Point]]:
    """What is chosen if searches make these mistakes, and which points were searched."""
    done: list[Point] = []
    stand_in(monkeypatch, mistakes, done)
    translator: Any = SimpleNamespace(options=Options.of(DecodingConfig(**decoding)))
    text = EvaluationSet("dev", "dev", REFERENCES, [REFERENCES], [])
    return tune(translator, text, "13a", lambda line: None), done


def away(point: Point, **best: float) -> float:
    """Sum of distances from the best values."""
    return sum(abs(getattr(point, name) - value) for name, value in best.items())


def test_each_setting_walks_to_its_best_value_and_stops_soon_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistakes(point: Point) -> int:
        return round(2 + 40 * away(point, alpha=0.8) + 60 * away(point, beta=0.1) + 2 * away(point, beam_size=8))

    found, done = tuned(monkeypatch, mistakes)
    assert (found.before, found.chosen) == (Point(0.2, 0.2, 4), Point(0.8, 0.1, 8))
    assert {point.alpha for point in done} == {0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2}
    assert {point.beta for point in done if point.alpha == 0.8} == {0.0, 0.1, 0.2, 0.4, 0.8}
    assert {point.beam_size for point in done} == {1, 2, 4, 8, 16}
    assert len(done) == len(set(done)) == 6 + 5 + 4  # each is searched once
    first = found.tried[0]
    assert (first.setting, first.point, first.against) == ("alpha", Point(0.0, 0.2, 4), found.before)
    assert [line.split(" (")[0] for line in found.verdicts()] == [
        "decoding.alpha: 0.2 -> 0.8",
        "decoding.beta: 0.2 -> 0.1",
        "decoding.beam_size: 4 -> 8",
    ]


def test_a_gain_inside_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tuned(monkeypatch, lambda point: 20 - (point == Point(0.4, 0.2, 4)))
    assert found.chosen == found.before
    alpha, beta, beam = found.verdicts()
    assert re.fullmatch(
        r"decoding.alpha stays 0.2: the gain of 0.4 is inside noise \(\+0\.\d\d BLEU, p = 0\.\d+\)", alpha
    )
    assert beta == "decoding.beta stays 0.2: no other value is better"
    assert beam == "decoding.beam_size stays 4: no other value is better"


def test_narrower_beams_are_tried_past_a_worse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = tuned(monkeypatch, lambda point: {1: 0, 2: 30}.get(point.beam_size, 20))
    assert found.chosen == Point(0.2, 0.2, 1)
    assert {point.beam_size for point in done} == {1, 2, 4, 8}


def test_greedy_search_has_no_alpha_so_the_default_beam_tunes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistakes(point: Point) -> int:
        return 20 if point.beam_size == 1 else round(40 * away(point, alpha=0.6))

    found, done = tuned(monkeypatch, mistakes, beam_size=1)
    assert found.before == Point(0.2, 0.2, 1)
    assert found.chosen == Point(0.6, 0.2, 2)
    assert {point.beam_size for point in done if point.alpha == 0.0} == {4}


def test_values_off_the_grid_are_kept_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = tuned(monkeypatch, lambda point: 9, alpha=0.35, beta=0.3, beam_size=5)
    assert found.chosen == found.before == Point(0.35, 0.3, 5)
    assert {point.alpha for point in done} == {0.0, 0.2, 0.35, 0.4, 0.6}
    assert {point.beam_size for point in done} == {2, 4, 5, 8}


def test_the_table_has_a_row_per_search_and_a_part_per_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tuned(monkeypatch, lambda point: 40 - round(40 * min(point.alpha, 0.6)))
    head, *rows = found.table().split("\n")
    assert head.split()[:3] == ["alpha", "beta", "beam"]
    assert rows.count("") == 2
    assert [row.split()[0] for row in rows[: rows.index("")]] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert "p = " not in rows[1]  # compared with itself
    assert all("p = " in row for place, row in enumerate(rows[: rows.index("")]) if place != 1)


# ------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose searches return the sources, and most of them with alpha 0.6."""
    path = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report")))
    (tmp_path / "text").write_text("".join(f"{line}\n" for line in REFERENCES))

    def mistakes(point: Point) -> int:
        return round(50 * min(away(point, alpha=0.6), 1.0))

    stand_in(monkeypatch, mistakes, [])
    return path


def on_text(copy: Path) -> tuple[str, ...]:
    text = str(copy.parent / "text")
    return ("evaluate", str(copy), "--tune", "--source", text, "--reference", text)


def settings_of(run: Path) -> tuple[float, float, int]:
    decoding = RunDirectory(run).config().decoding
    return decoding.alpha, decoding.beta, decoding.beam_size


@pytest.mark.slow
def test_chosen_values_are_written_and_every_later_command_has_them(cli: Cli, copy: Path, tmp_path: Path) -> None:
    before = RunDirectory(copy).config()
    assert cli(*on_text(copy)) == 0, cli.err
    assert "decoding.alpha: 0.2 -> 0.6 (" in cli.out
    assert "decoding.beta stays 0.2" in cli.out
    assert "a value is changed if its gain has p < 0.05" in cli.out
    assert f"written to {copy / 'config.yaml'}" in cli.err
    assert "text has only 100 sentences: its BLEU is uncertain by" in cli.err
    after = RunDirectory(copy).config()
    assert after == replace(before, decoding=replace(before.decoding, alpha=0.6))
    report = json.loads((copy / "report" / "tune.json").read_text())
    assert report["started"] == report["before"] == {"alpha": 0.2, "beta": 0.2, "beam_size": 4}
    assert report["chosen"] == {"alpha": 0.6, "beta": 0.2, "beam_size": 4}
    assert report["sources_sha256"]
    assert len(report["tried"]) == sum(bool(re.match(r"\d\.\d ", line)) for line in cli.out.splitlines())
    assert cli("evaluate", str(copy)) == 0
    assert "alpha 0.6, beta 0.2" in cli.out
    assert cli("export", str(copy), str(tmp_path / "exported")) == 0, cli.err
    assert settings_of(tmp_path / "exported") == (0.6, 0.2, 4)
    # Tuned again, from 0.6.
    assert cli(*on_text(copy)) == 0
    assert "decoding.alpha stays 0.6: no other value is better" in cli.out
    assert cli.err.splitlines()[-1] == "nothing was changed"


def test_an_exported_model_is_not_changed(cli: Cli, copy: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert cli("export", str(copy), str(exported)) == 0
    before = (exported / "config.yaml").read_bytes()
    _, _, *arguments = on_text(copy)
    assert cli("evaluate", str(exported), *arguments) == 0, cli.err
    assert "exported model, which is not changed" in cli.err
    assert "decoding.alpha=0.6 decoding.beta=0.2 decoding.beam_size=4" in cli.err
    assert (exported / "config.yaml").read_bytes() == before
    assert RunDirectory.existing(str(exported)).exported


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_tuned_unless_other_values_are_given(
    cli: Cli, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(corpus, "tuned", 2)
    directory = RunDirectory(run)
    directory.write_tuned({"alpha": 0.6, "beta": 0.4, "beam_size": 8}, {})
    directory.write_tuned({"alpha": 0.8, "beta": 0.4, "beam_size": 8}, {})
    cli.capfd.readouterr()
    train(corpus, "tuned", 4)  # with the settings that it was started with
    assert settings_of(run) == (0.8, 0.4, 8)
    assert "decoding" not in cli.capfd.readouterr().err
    assert cli("train", str(run), "training.max_steps=5") == 0, cli.err
    assert settings_of(run) == (0.8, 0.4, 8)
    assert "decoding" not in cli.err
    assert cli("train", str(run), "training.max_steps=6", "decoding.alpha=0.3") == 0, cli.err
    assert settings_of(run) == (0.3, 0.4, 8)
    assert "changed since the run was started: decoding.alpha: 0.8 -> 0.3" in cli.err
    # The record is of values that the run no longer has.
    train(corpus, "tuned", 7)
    assert settings_of(run) == (0.2, 0.2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[]", '{"started": {"alpha": 0.2}}', '{"started": {}, "chosen": {"x": 1}}'])
def test_a_damaged_record_changes_nothing(corpus: Path, content: str) -> None:
    run = train(corpus, "damaged", 2)
    RunDirectory(run).write_tuned({"alpha": 0.6}, {})
    (run / "report" / "tune.json").write_text(content)
    train(corpus, "damaged", 3)
    assert settings_of(run) == (0.2, 0.2, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--split", "test"), ("--tune on the test set",)),
        (("--hypothesis", "x"), ("--tune takes a single set",)),
        (("--split", "dev", "--split", "dev"), ("--tune takes a single set",)),
        (("--ter",), ("--tune with --ter",)),
        (("--dial", "1"), ("--dial",)),
        (("--show", "1"), ("--tune with --show",)),
        (("decoding.alpha=0.5",), ("--tune chooses decoding.alpha",)),
        (("decoding.beam_size=2",), ("--tune chooses decoding.beam_size",)),
    ],
    ids=str,
)
def test_what_tuning_does_not_take(cli: Cli, copy: Path, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    cli.refuses(2, "evaluate", str(copy), "--tune", *arguments, says=says)
