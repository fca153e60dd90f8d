"""The paper's BLEU is what Moses' script prints: worked out by hand, and as sacreBLEU without smoothing."""

import math
import random

import pytest
import sacrebleu

from nmt.evaluation.multi_bleu import multi_bleu

WORDS = ["der", "kleine", "Hund", "läuft", "über", "die", "Wiese", ".", ","]


def lines(generator: random.Random, count: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for _ in range(count)]


def spoilt(generator: random.Random, line: str) -> str:
    words = line.split()
    words[generator.randrange(len(words))] = "Katze"
    return " ".join(words)


def test_one_sentence_by_hand() -> None:
    found = multi_bleu(["a b c d e x"], [["a b c d e f g h"]])
    # Of 6, 5, 4 and 3 n-grams, those with x do not match; 6 tokens for 8.
    assert found.precisions == pytest.approx([500 / 6, 400 / 5, 300 / 4, 200 / 3])
    assert found.brevity_penalty == math.exp(1 - 8 / 6)
    assert found.score == pytest.approx(100 * math.exp(1 - 8 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert str(found) == "BLEU = 54.44, 83.3/80.0/75.0/66.7 (BP=0.717, ratio=0.750, hyp_len=6, ref_len=8)"


def test_an_ngram_counts_as_often_as_one_reference_has_it() -> None:
    found = multi_bleu(["a a a a b b"], [["a a c c c c"], ["a a a d b d"]])
    assert found.precisions[0] == pytest.approx(100 * 4 / 6)  # a: 3 of 4, b: 1 of 2


@pytest.mark.parametrize(("lengths", "closest"), [((4, 6), 4), ((6, 4), 4), ((9, 6), 6), ((5, 5), 5), ((1, 8), 8)])
def test_the_closest_reference_counts_and_of_two_the_shorter(lengths: tuple[int, int], closest: int) -> None:
    found = multi_bleu(["w w w w w"], [["w " * length] for length in lengths])
    assert found.reference_length == closest


def test_nothing_is_smoothed() -> None:
    found = multi_bleu(["a b c"], [["a b c"]])
    assert (found.score, found.precisions) == (0.0, [100.0, 100.0, 100.0, 0.0])
    assert multi_bleu(["a b x d e"], [["a b c d e"]]).score == 0.0


@pytest.mark.parametrize(("hypothesis", "reference"), [("", "a b"), ("a", ""), ("", "")])
def test_empty_sides_are_0(hypothesis: str, reference: str) -> None:
    assert multi_bleu([hypothesis], [[reference]]).score == 0.0


def test_only_ascii_blanks_separate_tokens() -> None:
    assert multi_bleu(["a\tb \r c\x0bd\x0c"], [["a b c d"]]).score == pytest.approx(100.0)
    assert multi_bleu(["a\u00a0b c\u2028d e\x85f g\x1ch"], [["x"]]).length == 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_references", [1, 3])
def test_it_is_sacrebleus_bleu_without_smoothing(seed: int, num_references: int) -> None:
    generator = random.Random(seed)
    references = [lines(generator, 20) for _ in range(num_references)]
    hypotheses = [spoilt(generator, generator.choice(each)) for each in zip(*references, strict=True)]
    found = multi_bleu(hypotheses, references)
    theirs = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, references)
    assert found.score == pytest.approx(theirs.score, rel=1e-12)
    assert (found.length, found.reference_length) == (theirs.sys_len, theirs.ref_len)
    assert found.precisions == pytest.approx(theirs.precisions)
    assert found.brevity_penalty == pytest.approx(theirs.bp)


def test_it_differs_from_sacrebleu_where_an_order_has_no_match() -> None:
    hypotheses, references = ["a b x d e"], [["a b c d e"]]
    floor = sacrebleu.BLEU(tokenize="none", smooth_method="floor", force=True).corpus_score(hypotheses, references)
    assert floor.score > 0.0 == multi_bleu(hypotheses, references).score
