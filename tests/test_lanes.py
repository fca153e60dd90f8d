"""Recorded searches against live ones. A CPU replays a piece of work by doing it again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nmt.batch import _fit_rows, source_batch, source_rectangle
from nmt.config import DecodingConfig, ModelConfig
from nmt.decoding import lanes
from nmt.decoding.lanes import rounded_count, rounded_length
from nmt.decoding.searcher import Searcher, can_record
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.model.experts import ExpertShard
from nmt.model.seq2seq import Seq2Seq
from nmt.tokens import EOS, PAD

VOCABULARY = 40
OPTIONS = replace(Options.of(DecodingConfig()), beam_size=3, alpha=0.6, max_length_ratio=1.5, batch_tokens=600)
CPU = torch.device("cpu")


class Again:
    """A recording that does the work again, and keeps nothing but what the work leaves in its tensors."""

    made = 0

    def __init__(self, work: Callable[[], Any], pool: Any) -> None:
        type(self).made += 1
        self.replay = work


@pytest.fixture(params=["parallel", "feedback", "norms"])
def model(request: pytest.FixtureRequest, tiny_config: Callable[..., ModelConfig]) -> Seq2Seq:
    changes = {"norm": "layers", "size": 6, "heads": 2} if request.param == "norms" else {"wiring": request.param}
    model = Seq2Seq(tiny_config(output_bias=True, **changes), VOCABULARY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    # So that some hypotheses end.
    model.output.bias.data[EOS] = 2.0
    return model


def sources_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(4, VOCABULARY, length) for length in lengths]


def recorded(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch) -> Searcher:
    monkeypatch.setattr(lanes, "Graph", Again)
    monkeypatch.setattr(lanes, "_LEAST_SENTENCES", 2)
    Again.made = 0
    searcher = Searcher([model], CPU, range(3))
    searcher.records = True
    return searcher


def check_equal(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [each.tokens for each in ours] == [each.tokens for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.finished == other.finished
            assert one.token_log_probs == pytest.approx(other.token_log_probs, abs=1e-4)
            assert one.score == pytest.approx(other.score, abs=1e-4)
            if other.attention_TS is not None:
                torch.testing.assert_close(torch.tensor(one.attention_TS), torch.tensor(other.attention_TS))


@pytest.mark.slow
@pytest.mark.parametrize("n_best", [1, 3])
def test_a_recorded_search_is_a_live_one(model: Seq2Seq, n_best: int, monkeypatch: pytest.MonkeyPatch):
    """Batches of several lanes, lanes that are used again, and lanes that pass on what is left of them."""
    options = replace(OPTIONS, n_best=n_best, attention=n_best > 1)
    sources = sources_of(*[3, 9, 30, 1, 8, 8, 7, 2] * 5, 70, 12)
    searcher = recorded(model, monkeypatch)
    passed: list[int] = []
    continue_ = lanes.Search.continue_
    monkeypatch.setattr(
        lanes.Search,
        "continue_",
        lambda self, other, chosen: passed.append(len(chosen)) or continue_(self, other, chosen),
    )
    expected = Searcher([model], CPU, range(3)).search(sources, options)
    assert {each.finished for found in expected for each in found} == {True, False}
    for _ in range(2):
        check_equal(searcher.search(sources, options), expected)
    assert passed
    made = Again.made
    searcher.search(sources, options)
    assert Again.made == made


def test_runs_that_may_not_repeat_are_recorded_too(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch):
    options, sources = replace(OPTIONS, no_repeat_ngram=2), sources_of(*[3, 9, 30, 1, 8] * 3)
    expected = Searcher([model], CPU, range(3)).search(sources, options)
    searcher = recorded(model, monkeypatch)
    check_equal(searcher.search(sources, options), expected)
    assert Again.made


def test_what_is_not_recorded(tiny_config: Callable[..., ModelConfig]):
    gpu = torch.device("cuda")
    with torch.device("meta"):
        model = Seq2Seq(tiny_config(), VOCABULARY)
        shared = Seq2Seq(tiny_config(), VOCABULARY, ExpertShard(0, 2))
        uneven = Seq2Seq(tiny_config(gating="strictly_balanced"), VOCABULARY)
    assert can_record([model], gpu)
    for models, device in (([model], CPU), ([model, model], gpu), ([shared], gpu), ([uneven], gpu)):
        assert not can_record(models, device)


def test_wide_beams_are_not_recorded(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch):
    """A GPU would ask the host about equal logits."""
    searcher = recorded(model, monkeypatch)
    searcher.search(sources_of(3, 2), replace(OPTIONS, beam_size=16))
    made = Again.made
    searcher.search(sources_of(3, 2), replace(OPTIONS, beam_size=17))
    assert Again.made == made > 0


def test_a_rectangle_is_a_padded_batch():
    """Sentences keep their order, where a packed batch sorts them."""
    sources = sources_of(3, 1, 6)
    source_N, rows = source_rectangle(sources, 4, 9)
    _, packed = source_batch(sources)
    fitted = _fit_rows(packed, (4,) * 9, 4)[0]
    order_B = fitted.rank_B.long().argsort()
    for b, source in enumerate(sources):
        assert source_N.view(9, 4)[:, b].tolist() == [*source, EOS, *[PAD] * (8 - len(source))]
    for name in ("begin_L", "length_B", "previous_N"):
        assert torch.equal(getattr(rows, name), getattr(fitted, name))
    for name in ("turn_N", "real_N"):
        found, expected = (getattr(each, name).view(9, 4) for each in (rows, fitted))
        if name == "turn_N":
            found, expected = found // 4, expected // 4  # the position that it leads to
        assert torch.equal(found[:, order_B], expected)
    assert torch.equal(rows.cell_N[rows.real_N].sort().values, fitted.cell_N[fitted.real_N].sort().values)
    assert (rows.cell_N[~rows.real_N] == 36).all()


@pytest.mark.slow
def test_other_options_need_other_recordings(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch):
    searcher, live = recorded(model, monkeypatch), Searcher([model], CPU, range(3))
    sources = sources_of(4, 9, 2)
    for options in (
        OPTIONS,
        replace(OPTIONS, beam_size=1),
        replace(OPTIONS, alpha=0.0),
        replace(OPTIONS, no_repeat_ngram=2),
        OPTIONS,
    ):
        check_equal(searcher.search(sources, options), live.search(sources, options))
    made = Again.made
    searcher.search(sources, replace(OPTIONS, max_source_pieces=7))
    assert Again.made == made
    for beam_size in range(1, 9):
        searcher.search(sources, replace(OPTIONS, beam_size=beam_size))
    assert len(searcher._lanes) == 4


@pytest.mark.slow
def test_old_lanes_are_given_up(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lanes, "_MOST_LANES", 2)
    searcher = recorded(model, monkeypatch)
    sources = sources_of(4, 19, 2, 41, 60)
    options = replace(OPTIONS, batch_tokens=16)
    check_equal(searcher.search(sources, options), Searcher([model], CPU, range(3)).search(sources, options))
    assert [len(each.lanes) for each in searcher._lanes.values()] == [2]


def test_a_batch_too_large_for_memory_is_halved(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch):
    sources = sources_of(*range(1, 12))
    expected = Searcher([model], CPU, range(3)).search(sources, OPTIONS)
    searcher, load = recorded(model, monkeypatch), lanes.Lane.load

    def short(lane: lanes.Lane, batch: list[np.ndarray], rules: Any, symbols: int) -> None:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        load(lane, batch, rules, symbols)

    monkeypatch.setattr(lanes.Lane, "load", short)
    check_equal(searcher.search(sources, OPTIONS), expected)


def test_shapes_are_few_and_hold_what_they_must():
    lengths = [rounded_length(length) for length in range(1, 1000)]
    assert all(rounded >= length for length, rounded in enumerate(lengths, start=1))
    assert len(set(lengths)) < 30
    assert [rounded_count(count) for count in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("experts", [0, 4])
def test_a_search_on_a_gpu_is_that_on_a_cpu(tiny_config: Callable[..., ModelConfig], experts: int):
    torch.manual_seed(0)
    model = Seq2Seq(tiny_config(num_experts=experts), VOCABULARY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    sources, options = sources_of(*[3, 9, 30, 1, 8, 8, 7, 2] * 9, 70, 12), replace(OPTIONS, n_best=2, attention=True)
    expected = Searcher([model], CPU, range(3)).search(sources, options)
    on_gpu = Searcher([model.cuda()], torch.device("cuda"), range(3))
    assert on_gpu.records
    found = on_gpu.search(sources, options)
    again = on_gpu.search(sources, options)
    check_equal(again, found)
    same = [ours[0].tokens == theirs[0].tokens for ours, theirs in zip(found, expected, strict=True)]
    assert sum(same) >= 0.95 * len(same)
    on_gpu.records = False
    live = on_gpu.search(sources, options)
    same = [ours[0].tokens == theirs[0].tokens for ours, theirs in zip(found, live, strict=True)]
    assert sum(same) >= 0.95 * len(same)
