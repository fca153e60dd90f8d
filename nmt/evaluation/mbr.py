"""Minimum Bayes risk decoding: of several translations of a line, the one that agrees most with all of them.

    risk of y  =  - sum over y' of P(y') u(y, y'),    u: chrF or BLEU of y against the reference y'

Draws represent the distribution P: each counts once. So the mean over all draws estimates the expected utility, and a
translation that was drawn more often counts more.

u is that of sacreBLEU for one sentence: chrF2, or BLEU with the effective order. sacreBLEU would count the n-grams of
both sides again for each pair of texts. Here they are counted once, and pairs are compared as rows of numbers.

Letters: U different texts, as hypotheses (first) and as references (second); G n-grams.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from nmt.decoding.parts import Rank
from nmt.evaluation.scores import tokenized

METRICS = ("chrf", "bleu")
_CHRF_ORDER, _CHRF_BETA, _BLEU_ORDER = 6, 2.0, 4


def by_agreement(metric: str, tokenizer: str) -> Rank:
    """Return a function from texts to their mean utility against all of them, by chrf or bleu.

    `tokenizer` is sacreBLEU's name of the tokeniser of BLEU.
    """

    def rank(texts: Sequence[str]) -> list[float]:
        drawn = Counter(texts)
        different = list(drawn)
        utility_UU = chrf(different) if metric == "chrf" else bleu(tokenized(different, tokenizer))
        share_U = np.array([drawn[text] for text in different]) / len(texts)
        return [float(dict(zip(different, utility_UU @ share_U, strict=True))[text]) for text in texts]

    return rank


def likeness(metric: str, tokenizer: str) -> Callable[[Sequence[str], str], list[float]]:
    """Return a function from texts and a reference to how like it each text is, by chrf or bleu, 0 to 100.

    `tokenizer` is sacreBLEU's name of the tokeniser of BLEU.
    """

    def like(texts: Sequence[str], reference: str) -> list[float]:
        every = [*texts, reference]
        utility_UU = chrf(every) if metric == "chrf" else bleu(tokenized(every, tokenizer))
        found: list[float] = utility_UU[:-1, -1].tolist()
        return found

    return like


def chrf(texts: Sequence[str]) -> np.ndarray:
    """Return chrF2 of each text against each as the reference, 0 to 100 (float64)."""
    characters = ["".join(text.split()) for text in texts]
    precision_UU, recall_UU, orders_UU = (np.zeros((len(texts), len(texts))) for _ in range(3))
    for match_UU, count_U in _matches(characters, _CHRF_ORDER):
        both_UU = (count_U[:, None] > 0) & (count_U > 0)
        precision_UU += match_UU / np.maximum(count_U, 1)[:, None]
        recall_UU += match_UU / np.maximum(count_U, 1)
        orders_UU += both_UU
    precision_UU, recall_UU = (sums_UU / np.maximum(orders_UU, 1) for sums_UU in (precision_UU, recall_UU))
    factor = _CHRF_BETA**2
    below_UU = factor * precision_UU + recall_UU
    return 100.0 * (1.0 + factor) * precision_UU * recall_UU / np.where(below_UU > 0, below_UU, 1.0)


def bleu(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return sentence BLEU of each text, given its tokens, against each as the reference, 0 to 100 (float64).

    A precision without a match is 100 / (2^m total), for the m-th such order ("exp" smoothing). Orders above the length
    of a text are left out.
    """
    length_U = np.array([len(tokens) for tokens in texts], dtype=np.float64)
    log_sum_UU, smooth_UU = np.zeros((len(texts), len(texts))), np.ones((len(texts), len(texts)))
    any_UU, order_U = np.zeros((len(texts), len(texts)), dtype=bool), np.zeros(len(texts))
    for match_UU, count_U in _matches(texts, _BLEU_ORDER):
        known_U1 = count_U[:, None] > 0
        smooth_UU = np.where(known_U1 & (match_UU == 0), 2.0 * smooth_UU, smooth_UU)
        correct_UU = np.where(match_UU > 0, match_UU, 1.0 / smooth_UU)
        log_sum_UU += np.where(known_U1, np.log(100.0 * correct_UU / np.maximum(count_U, 1)[:, None]), 0.0)
        order_U += count_U > 0
        any_UU |= match_UU > 0
    brevity_UU = np.exp(np.minimum(1.0 - length_U / np.maximum(length_U, 1.0)[:, None], 0.0))
    return np.where(any_UU, brevity_UU * np.exp(log_sum_UU / np.maximum(order_U, 1)[:, None]), 0.0)


def _matches(texts: Sequence[Sequence[Hashable]], orders: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield (match_UU, count_U) for n-grams of each order: how many two texts have in common, and how many each has."""
    for order in range(1, orders + 1):
        counted = [Counter(zip(*(text[start:] for start in range(order)), strict=False)) for text in texts]
        number = {gram: place for place, gram in enumerate(dict.fromkeys(gram for each in counted for gram in each))}
        count_UG = np.zeros((len(texts), len(number)), dtype=np.int32)
        for row_G, each in zip(count_UG, counted, strict=True):
            row_G[[number[gram] for gram in each]] = list(each.values())
        yield np.stack([np.minimum(row_G, count_UG).sum(1) for row_G in count_UG]), count_UG.sum(1)
