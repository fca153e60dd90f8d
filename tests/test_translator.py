"""A line's translation depends on the line alone: not on its batch, its place or its neighbours."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import one_thread, trained_run  # noqa: F401

from nmt.batch import EOS, make_batch
from nmt.checkpoint import list_checkpoints
from nmt.config import Config
from nmt.decoding.translator import Translation, Translator
from nmt.errors import CheckpointError
from nmt.run import RunDirectory

Load = Callable[..., Translator]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return RunDirectory.existing(str(trained_run(tmp_path_factory)))


@pytest.fixture
def load(run: RunDirectory) -> Load:
    def build(**decoding: Any) -> Translator:
        config = run.config()
        return Translator.load(run, replace(config, decoding=replace(config.decoding, **decoding)))

    return build


@pytest.fixture
def lines(run: RunDirectory) -> list[str]:
    sources = run.text("test")[0]
    return [*sources[:8], "", "dog " * 20, "?", " ", *sources[:2], "the\rdog"]


def texts(found: list[Translation]) -> list[str]:
    return [translation.text for translation in found]


def scores(found: list[Translation]) -> list[float]:
    return [translation.score for translation in found]


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("batch_sentences", [1, 2, 7, 64])
def test_batches_do_not_matter(load: Load, lines: list[str], beam_size: int, batch_sentences: int) -> None:
    translator = load(beam_size=beam_size, batch_sentences=batch_sentences)
    found = translator.translate(lines)
    alone = [translator.translate([line])[0] for line in lines]
    assert texts(found) == texts(alone)
    assert scores(found) == pytest.approx(scores(alone), abs=1e-4)


def test_the_order_of_the_file_does_not_matter(load: Load, lines: list[str]) -> None:
    translator = load(batch_sentences=5)
    assert texts(translator.translate(lines[::-1])) == texts(translator.translate(lines))[::-1]
    assert len(set(texts(translator.translate(lines)))) > 1


def test_no_lines_and_blank_lines(load: Load) -> None:
    translator = load()
    assert translator.translate([]) == []
    assert translator.translate(["", " ", "\u3000"]) == [Translation(line, 0.0) for line in ("", " ", "\u3000")]


def test_lines_without_a_letter_or_digit_come_back_as_they_are(load: Load) -> None:
    translator = load()
    lines = ["-", "...", " \u2028\x1b*", "\n", "🚂"]
    found = translator.translate([*lines, "a"])
    assert found[:5] == [Translation(line, 0.0) for line in ("-", "...", "   *", " ", "🚂")]
    assert found[5].score < 0


def test_unlearned_characters_are_named(load: Load) -> None:
    found = load().translate(["the dog", "🦆 the 東 dog 🦆", "🦆", "- 東京 -"])
    assert [each.unlearned for each in found] == ["", "🦆東🦆", "", "-東京-"]
    # No letter of these was ever seen in training.
    assert [each.text for each in found[2:]] == ["🦆", "- 東京 -"]


def test_the_search_never_outputs_what_is_forbidden(load: Load) -> None:
    translator = load(beam_size=2)
    forbidden = translator.subwords.forbidden_ids
    with torch.no_grad():
        translator.model.output.weight.zero_()
        # These are now the likeliest at every position.
        translator.model.output.weight[forbidden] = 100.0 * torch.randn(
            len(forbidden), translator.model.output.weight.shape[1]
        )
    for pieces, _ in translator.search(translator.subwords.encode_batch(["the dog runs", "a meadow"])):
        assert not set(pieces) & set(forbidden)


def test_a_long_line_is_its_parts(load: Load) -> None:
    translator = load(max_source_pieces=4, beam_size=2)
    line = "the small dog runs over a green meadow"
    pieces = translator.subwords.encode(line)
    assert len(pieces) > 8
    parts = [pieces[start : start + 4] for start in range(0, len(pieces), 4)]
    expected = [(translator.subwords.decode(found), score) for found, score in translator.search(parts)]
    short = translator.subwords.decode([int(piece) for piece in pieces[:2]])
    found = translator.translate([short, line])
    assert translator.num_long_lines == 1
    assert found[1].text == " ".join(filter(None, (text for text, _ in expected)))
    assert found[1].score == pytest.approx(sum(score for _, score in expected), abs=1e-4)
    translator.translate([line, line])
    assert translator.num_long_lines == 3


def test_exactly_the_limit_is_not_long(load: Load) -> None:
    line = "the small dog"
    translator = load()
    translator.decoding = replace(translator.decoding, max_source_pieces=len(translator.subwords.encode(line)))
    translator.translate([line])
    assert translator.num_long_lines == 0


def test_a_score_is_the_log_probability_of_the_greedy_translation(load: Load, lines: list[str]) -> None:
    translator = load(beam_size=1, alpha=0.0, beta=0.0)
    for line in lines[:6]:
        source = translator.subwords.encode(line)
        ((target, score),) = translator.search([source])
        longest = int(len(source) * translator.decoding.max_length_ratio) + 10
        batch = make_batch(np.arange(1), [source], [np.array(target)])
        with torch.inference_mode():
            nll = float(translator.model(batch).nll)
            if len(target) >= longest:
                # Cut at the limit: whether the end was scored is the search's affair.
                memory, _ = translator.model.encode(batch.source_SB, batch.source_length_B, batch.source_rows_N)
                decoded = translator.model.decode(batch.target_in_TB, memory, None)
                log_probabilities = translator.model.logits(decoded.x_TRD[-1]).log_softmax(-1)
                without_end = nll + float(log_probabilities.view(-1)[EOS])
                assert min(abs(-score - nll), abs(-score - without_end)) < 1e-3
            else:
                assert -score == pytest.approx(nll, abs=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0])
def test_an_untrained_model_ends_within_the_limit(load: Load, lines: list[str], ratio: float) -> None:
    translator = load(max_length_ratio=ratio, beam_size=2)
    for parameter in translator.model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sources = [source for source in translator.subwords.encode_batch(lines) if len(source)]
    for source, (target, _) in zip(sources, translator.search(sources), strict=True):
        assert len(target) <= ratio * len(source) + 10
        assert EOS not in target


def test_a_beam_wider_than_the_vocabulary(load: Load) -> None:
    translator = load(beam_size=200)
    assert len(translator.translate(["the dog", "", "a"])) == 3


@pytest.mark.parametrize("which", ["best", "last", "average", "2"])
def test_load_takes_the_checkpoint_that_is_named(load: Load, run: RunDirectory, which: str) -> None:
    translator = load(checkpoint=which, average_checkpoints=2)
    found = list_checkpoints(run.checkpoints)
    models = [
        Translator.load(run, replace(Config(), model=run.config().model, decoding=replaced)).model
        for replaced in (replace(translator.decoding, checkpoint=str(each.step)) for each in found)
    ]
    wanted = {
        "best": [min(range(len(found)), key=lambda index: found[index].score or 0.0)],
        "last": [-1],
        "average": [-2, -1],
        "2": [0],
    }[which]
    for name, parameter in translator.model.named_parameters():
        mean = torch.stack([dict(models[index].named_parameters())[name] for index in wanted]).mean(0)
        torch.testing.assert_close(parameter, mean)


def test_a_run_without_vocabulary_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocabulary"):
        Translator.load(RunDirectory(tmp_path), run.config())
