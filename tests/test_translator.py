"""A line's translation depends on the line alone: not on its batch, its place or its neighbours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmt.batch import make_batch
from nmt.checkpoint import list_checkpoints
from nmt.config import Config, DecodingConfig
from nmt.decoding.loading import longest_source
from nmt.decoding.retry import loops
from nmt.decoding.rules import Rules
from nmt.decoding.search import length_penalty
from nmt.decoding.searcher import batches
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options, Translation
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, MemoryLimitError
from nmt.run import RunDirectory
from nmt.text.segment import join, split
from nmt.tokens import EOS

Load = Callable[..., Translator]


@pytest.fixture
def run(run: Path) -> RunDirectory:
    return RunDirectory.existing(str(run))


@pytest.fixture
def load(run: RunDirectory) -> Load:
    def build(**decoding: Any) -> Translator:
        config = run.config()
        # The model is hardly trained, so it repeats itself all the time.
        decoding = {"retry": False} | decoding
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


@pytest.mark.slow
@pytest.mark.parametrize(("beam_size", "retry"), [(1, True), (3, False)])
def test_batches_do_not_matter(load: Load, lines: list[str], beam_size: int, retry: bool) -> None:
    translator = load(beam_size=beam_size, retry=retry)
    alone = [translator.translate([line])[0] for line in lines]
    for batch_tokens in (1, 40, 100, 4000):
        found = load(beam_size=beam_size, batch_tokens=batch_tokens, retry=retry).translate(lines)
        assert texts(found) == texts(alone), batch_tokens
        assert scores(found) == pytest.approx(scores(alone), abs=1e-4), batch_tokens


@pytest.mark.slow
def test_the_order_of_the_file_does_not_matter(load: Load, lines: list[str]) -> None:
    translator = load(batch_tokens=50)
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


def test_a_long_line_without_words_is_not_cut(load: Load) -> None:
    translator = load()
    line = "\u3000 " + "- " * 200
    assert translator.translate([line])[0] == Translation(line)
    assert translator.translate([line], replace(translator.options, paragraphs=True))[0].text == line


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
    for (found,) in translator.searcher.search(
        translator.subwords.encode_batch(["the dog runs", "a meadow"]), translator.options
    ):
        assert not set(found.tokens) & set(forbidden)


def fit(translator: Translator, most: int, texts: Sequence[str]) -> list[bool]:
    return [len(pieces) <= most for pieces in translator.subwords.encode_batch(texts)]


def test_a_long_line_is_its_parts(load: Load) -> None:
    translator = load(max_source_pieces=8, beam_size=2)
    sentences = ["The small dog runs over a meadow. ", "A cat! "]
    parts = split("".join(sentences), partial(fit, translator, 8))
    assert len(parts) > 2
    assert parts[-1] == sentences[-1]
    alone = translator.translate(parts)
    assert all(each.num_parts == 1 for each in alone)
    (found,) = translator.translate(["".join(sentences)])
    assert found.text == join(parts, texts(alone))
    assert found.num_parts == len(parts)
    assert found.finished == all(each.finished for each in alone)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.3)])
def test_the_score_of_parts_is_that_of_one_translation(load: Load, alpha: float, beta: float) -> None:
    translator = load(max_source_pieces=8, alpha=alpha, beta=beta)
    line = "The dog. A cat! The small dog runs over a green meadow."
    parts = split(line, partial(fit, translator, 8))
    found = [
        best for (best,) in translator.searcher.search(translator.subwords.encode_batch(parts), translator.options)
    ]
    lengths = [len(each.tokens) + each.finished for each in found]
    log_prob = sum(each.log_prob for each in found)
    coverage = sum(
        each.score - each.log_prob / length_penalty(length, alpha) for each, length in zip(found, lengths, strict=True)
    )
    (translation,) = translator.translate([line])
    assert translation.score == pytest.approx(log_prob / length_penalty(sum(lengths), alpha) + coverage)
    if alpha == beta == 0.0:
        assert translation.score == pytest.approx(sum(scores(translator.translate(parts))))


def test_paragraphs_are_translated_sentence_by_sentence(load: Load) -> None:
    translator = load(beam_size=2)
    paragraphs = replace(translator.options, paragraphs=True)
    alone = texts(translator.translate(["A heading", "The M. dog runs.", "A cat!"]))
    (whole,) = translator.translate(["A heading\n\nThe M. dog runs.  A cat!"], paragraphs)
    assert whole.text == f"{alone[0].strip()}\n\n{alone[1].strip()}  {alone[2].strip()}"
    assert whole.num_parts == 3
    # One sentence is the same with and without.
    lines = ["The dog runs.", "", " ", "a cat", "?"]
    assert translator.translate(lines, paragraphs) == translator.translate(lines)


def looping(monkeypatch: pytest.MonkeyPatch, translator: Translator, cured: bool) -> list[Options]:
    """Make a search return "a meadow", but the first one a loop for "the dog" and nothing for "a cat"; with `cured`
    False, the second one, too. Return the options of each search."""
    search = translator.searcher.search
    dog, cat, meadow = (translator.subwords.encode(text).tolist() for text in ("the dog", "a cat", "a meadow"))
    asked: list[Options] = []

    def replaced(sources: Any, options: Options, *others: Any) -> list[list[Hypothesis]]:
        asked.append(options)
        troubles = {tuple(dog): 4 * dog, tuple(cat): []} if options.retry or not cured else {}
        chosen = [troubles.get(tuple(source.tolist()), meadow) for source in sources]
        return [
            [each[0]._replace(tokens=tokens)]
            for each, tokens in zip(search(sources, options, *others), chosen, strict=True)
        ]

    monkeypatch.setattr(translator.searcher, "search", replaced)
    return asked


def test_loops_and_empty_translations_are_searched_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = load(beam_size=2, retry=True)
    asked = looping(monkeypatch, translator, cured=True)
    found = translator.translate(["a dog", "the dog", "a cat", "the dog", ""])
    assert texts(found) == [*["a meadow"] * 4, ""]
    assert [(each.beam_size, each.no_repeat_ngram) for each in asked] == [(2, 0), (4, 3)]
    retried = [[flag.detail for flag in each.flags if flag.kind == "retried"] for each in found]
    assert [len(each) for each in retried] == [0, 1, 1, 1, 0]
    assert retried[1] == ["the translation had “the dog” 4 times; this one is from beam_size=4 and no_repeat_ngram=3"]
    assert retried[2] == ["the translation was empty; this one is from beam_size=4 and no_repeat_ngram=3"]
    assert found[1].flags == found[3].flags


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6),
    st.lists(st.integers(3, 5), max_size=4),
)
def test_loops_are_phrases_three_times_in_a_row(sequences: list[list[int]], phrase: list[int]) -> None:
    def repeats(ids: list[int]) -> bool:
        starts = [(start, size) for size in range(1, len(ids) // 3 + 1) for start in range(len(ids) - 3 * size + 1)]
        return any(ids[start : start + 3 * size] == 3 * ids[start : start + size] for start, size in starts)

    sequences = [*sequences, 3 * phrase, 2 * phrase + phrase[:-1]]
    assert loops(sequences) == [repeats(each) for each in sequences]


def test_a_second_translation_that_is_no_better_is_not_used(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = load(beam_size=2, retry=True)
    looping(monkeypatch, translator, cured=False)
    found = translator.translate(["the dog", "a cat"])
    assert texts(found) == [translator.subwords.decode(4 * translator.subwords.encode("the dog").tolist()), ""]
    for translation, kind in zip(found, ("loop", "length"), strict=True):
        details = {flag.kind: flag.detail for flag in translation.flags}
        assert kind in details
        assert details["retried"].endswith("; beam_size=4 and no_repeat_ngram=3 did not help")


def test_a_second_search_without_enough_memory_leaves_the_first(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = load(beam_size=2, retry=True)
    looping(monkeypatch, translator, cured=False)
    first = translator.searcher.search

    def short(sources: Any, options: Options, *others: Any) -> list[list[Hypothesis]]:
        if not options.retry:
            raise MemoryLimitError("no memory")
        return first(sources, options, *others)

    monkeypatch.setattr(translator.searcher, "search", short)
    (found,) = translator.translate(["the dog"])
    assert {"loop", "retried"} <= {flag.kind for flag in found.flags}


@pytest.mark.parametrize("options", [{"retry": False}, {"temperature": 1.0}])
def test_a_second_search_is_not_for_everyone(
    load: Load, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    translator = load(beam_size=2, retry=True)
    asked = looping(monkeypatch, translator, cured=False)
    translator.translate(["the dog"], replace(translator.options, **options))
    assert len(asked) == 1


def test_exactly_the_limit_is_not_long(load: Load) -> None:
    line = "the small dog"
    translator = load()
    translator.longest_seen = len(translator.subwords.encode(line))
    assert translator.translate([line])[0].num_parts == 1
    translator.longest_seen -= 1
    assert translator.translate([line])[0].num_parts == 2


def test_the_longest_line_of_training_is_the_limit(load: Load, run: RunDirectory) -> None:
    longest = run.corpus_info()["longest_source_pieces"]
    assert load().max_pieces() == longest
    assert load(max_source_pieces=longest - 1).max_pieces() == longest - 1
    training = (run.path.parent / "train.en").read_text().splitlines()
    assert max(len(pieces) for pieces in load().subwords.encode_batch(training)) == longest


def test_a_run_that_does_not_know_its_longest_line_has_the_limit_of_its_filter(load: Load, run: RunDirectory) -> None:
    config = run.config()
    assert longest_source({}, config) == config.corpus.filters.max_pieces
    for value in (None, [1], "x", float("nan"), -1):
        with pytest.raises(CheckpointError, match="not a number of subwords"):
            longest_source({"longest_source_pieces": value}, config)
    assert longest_source(run.corpus_info(), config) == load().longest_seen


def test_pieces_of_a_longer_line_are_cut_although_they_fit(load: Load) -> None:
    translator = load()
    line = "A cat! A dog. "
    assert translator.translate([line])[0].num_parts == 1
    found = translator.translate([line, line], long={1})
    assert [each.num_parts for each in found] == [1, 2]
    assert found[1].text == join(["A cat! ", "A dog. "], texts(translator.translate(["A cat! ", "A dog. "])))


def test_a_part_without_words_stays_as_it_is(load: Load) -> None:
    translator = load(max_source_pieces=8)
    found = translator.translate(["A cat!  ...  The small dog runs over a green meadow. --- A dog."])[0]
    assert "  ...  " in found.text
    assert " --- " in found.text


def test_a_translation_that_is_cut_off_says_so(load: Load) -> None:
    translator = load(max_length_ratio=0.01)
    for name, parameter in translator.model.named_parameters():
        torch.nn.init.constant_(parameter, 1.0 if "bias" in name else 0.0)
    # All outputs of the LSTMs are now positive, so that the end is the only unlikely subword.
    torch.nn.init.constant_(translator.model.output.weight[EOS], -1.0)
    found = translator.translate(["the dog", "", "..."])
    assert [each.finished for each in found] == [False, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_an_error(load: Load, value: float) -> None:
    translator = load()
    translator.model.target_embedding.weight.data[4:] = value
    with pytest.raises(CheckpointError, match="outputs are not finite"):
        translator.translate(["the dog"])


def test_options_are_of_one_call(load: Load, lines: list[str]) -> None:
    translator = load(beam_size=2)
    before = translator.translate(lines)
    options = replace(translator.options, beam_size=4, n_best=3, alpha=1.0, max_source_pieces=5, attention=True)
    changed = translator.translate(lines, options)
    assert changed == load(beam_size=4, alpha=1.0, max_source_pieces=5).translate(lines, options)
    assert changed != before
    assert translator.translate(lines) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("beam_size", "n_best") for value in (0, -1, 1.5, "2", True)),
        ("n_best", 5),
        ("max_source_pieces", 0),
        ("experts_per_token", -1),
        ("alpha", math.nan),
        ("beta", "x"),
        ("max_length_ratio", 0.0),
    ],
)
def test_options_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}|^{name}='{value}'"):
        replace(Options.of(DecodingConfig()), **{name: value})


def test_more_experts_than_there_are_are_refused(load: Load) -> None:
    translator = load()
    with pytest.raises(ValueError, match="experts_per_token=99"):
        translator.translate(["the dog"], replace(translator.options, experts_per_token=99))


def test_the_best_few(load: Load, lines: list[str]) -> None:
    translator = load(beam_size=5)
    few = translator.translate(lines, replace(translator.options, n_best=4))
    assert max(len(each.hypotheses) for each in few) == 4
    for line, each, alone in zip(lines, few, translator.translate(lines), strict=True):
        if each.num_parts == 1:
            ranked = [one.score for one in each.hypotheses]
            assert ranked == sorted(ranked, reverse=True)
        pieces = [one.pieces for one in each.hypotheses]
        assert len(set(pieces)) == len(pieces)
        assert bool(pieces) == any(character.isalnum() for character in line)
        if pieces:
            best = each.hypotheses[0]
            assert (each.text, each.score, each.finished) == (best.text, best.score, best.finished)
            # To go on until four are finished may find a better one, never a worse one.
            assert each.score >= alone.score - 1e-5


def test_a_part_with_fewer_hypotheses_gives_its_last(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = load(beam_size=3, prune_margin=0.0)
    (first, second), (third, _) = translator.searcher.search(
        translator.subwords.encode_batch(["the dog", "a cat"]), replace(translator.options, n_best=2)
    )
    monkeypatch.setattr(translator.searcher, "search", lambda *_: [[first, second], [third]])
    line = "The dog. A cat!"
    (found,) = translator.translate([line], long={0})
    one, two, three = (translator.subwords.decode(each.tokens).strip() for each in (first, second, third))
    parts = ["The dog. ", "A cat!"]
    assert [each.text for each in found.hypotheses] == [join(parts, [one, three]), join(parts, [two, three])]
    assert one != two
    log_probs = [(*each.token_log_probs, *third.token_log_probs) for each in (first, second)]
    assert [each.log_probs for each in found.hypotheses] == log_probs


def test_pieces_with_log_probabilities_and_attention(load: Load) -> None:
    translator = load(beam_size=3, max_source_pieces=8)
    lines = ["The dog. A cat! ... The small dog runs over a green meadow.", "a", "..."]
    options = replace(translator.options, n_best=2, attention=True)
    found = translator.translate(lines, options)
    assert found[0].num_parts > found[1].num_parts == 1
    assert found[2].hypotheses == found[2].source_pieces == ()
    for each in found[:2]:
        assert each.source_pieces[-1] == "</s>"
        for one in each.hypotheses:
            assert one.attention is not None
            assert one.attention.shape == (len(one.pieces), len(each.source_pieces))
            assert len(one.log_probs) == len(one.pieces)
            assert one.attention.sum(1) == pytest.approx(np.ones(len(one.pieces)), abs=1e-5)
            assert max(one.log_probs) < 0
            # Every part of the source has a row that looks at it.
            assert (one.attention.max(0) > 0).all()
    ends = [place for place, piece in enumerate(found[0].source_pieces) if piece == "</s>"]
    spoken = [each for each in split(lines[0], partial(fit, translator, 8)) if each.strip(" .")]
    assert len(ends) == len(spoken)
    assert translator.translate(lines[:1])[0].hypotheses[0].attention is None


def test_progress_rises_to_the_whole(load: Load, lines: list[str]) -> None:
    told: list[float] = []
    load(batch_tokens=48).translate(lines, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) > 2


def test_a_score_is_the_log_probability_of_the_greedy_translation(load: Load, lines: list[str]) -> None:
    translator = load(beam_size=1, alpha=0.0, beta=0.0)
    for line in lines[:6]:
        source = translator.subwords.encode(line)
        ((found,),) = translator.searcher.search([source], translator.options)
        target, score = found.tokens, found.score
        longest = int(len(source) * translator.options.max_length_ratio) + 10
        batch = make_batch(np.arange(1), [source], [np.array(target)])
        with torch.inference_mode():
            nll = float(translator.model(batch).nll)
            if len(target) >= longest:
                # Cut at the limit: whether the end was scored is the search's affair.
                encoded, _ = translator.model.encode(batch.source_N, batch.source)
                x_ND, _ = translator.model.decode(batch.target_in_N, batch.target, encoded)
                log_probabilities = translator.model.logits(x_ND[-1]).log_softmax(-1)
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
    for source, (found,) in zip(sources, translator.searcher.search(sources, translator.options), strict=True):
        target = found.tokens
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
        for replaced in (replace(run.config().decoding, checkpoint=str(each.step)) for each in found)
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


def test_batches_are_bounded_and_cover_every_sentence_once() -> None:
    lengths = [3, 100_000, 17, 16, 40, 1, 40, 999]
    found = list(batches(lengths, 100))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(16, *(lengths[index] for index in batch)) <= 100
    flat = [lengths[index] for batch in found for index in batch]
    assert flat == sorted(lengths, reverse=True)
    assert [4, 6] in found


def test_a_batch_that_does_not_fit_in_memory_is_halved(
    load: Load, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = load(beam_size=2)
    expected = texts(translator.translate(lines))
    search, tried = translator.searcher._search_live, []

    def short(sources: list[np.ndarray], rules: Rules, options: Options) -> list[list[Hypothesis]]:
        tried.append(len(sources))
        if len(sources) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return search(sources, rules, options)

    monkeypatch.setattr(translator.searcher, "_search_live", short)
    assert texts(translator.translate(lines)) == expected
    assert max(tried) > 3 > min(tried)
