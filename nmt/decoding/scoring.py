"""Forced decoding: the log-probabilities of given translations.

Perplexity, explanations and scores of sentence pairs all use this file. Forced decoding of a hypothesis found by a
search returns the search's log-probabilities, subword by subword.

Letters: T target positions, B sentences, N rows of the packed target.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import Batch, Rows
from nmt.data.held_out import HeldOut, eval_batches
from nmt.data.subwords import Subwords, split_words
from nmt.decoding.ensemble import mean_log_prob
from nmt.device import shortage_told
from nmt.errors import CheckpointError
from nmt.model.loss import SoftmaxInput, token_log_probs, top_probabilities
from nmt.model.one_pass import ChangeGate, Gates
from nmt.model.rows import unpack
from nmt.model.seq2seq import Encoded, Seq2Seq
from nmt.tokens import EOS

NOT_FINITE = (
    "the model's outputs are not finite (NaN or infinite), so its parameters are damaged: choose another "
    "decoding.checkpoint or model"
)
SCORE_DIGITS = 6
"""Decimals of scores in JSON."""
_BATCH_TOKENS = 4096  # per batch when scoring pairs, including padding
_MOST_NATS = 700.0  # whose exp is finite


class Scores(NamedTuple):
    """Results of forced decoding."""

    log_prob_TB: Tensor  # at least float32: log P of each subword and of EOS, in nats; 0 at padding
    gates: Gates  # decisions of the gates in this pass


def score(model: Seq2Seq, batch: Batch, experts_per_token: int = 0) -> Scores:
    """Return the log-probability of every target subword of a batch, given its source and the subwords before it.

    The model must be in evaluation mode, and computes in its own precision. Call this without gradients.
    """
    encoded, gates = model.encode(batch.source_N, batch.source, experts_per_token)
    scores = score_target(model, encoded, batch.target_in_N, batch.target_out_N, batch.target, experts_per_token)
    return scores._replace(gates=gates | scores.gates)


def ensemble_log_probs(models: Sequence[Seq2Seq], batch: Batch, experts_per_token: int = 0) -> Tensor:
    """Return log_prob_TB of `score`, by one model or by an ensemble."""
    return mean_log_prob([score(model, batch, experts_per_token).log_prob_TB for model in models])


def score_target(
    model: Seq2Seq,
    encoded: Encoded,
    target_in_N: Tensor,
    target_out_N: Tensor,
    rows: Rows,
    experts_per_token: int = 0,
    change_gate: ChangeGate | None = None,
) -> Scores:
    """Return what `score` does, for an encoded source."""
    x_ND, gates = model.decode(target_in_N, rows, encoded, experts_per_token, change_gate)
    log_prob_N = token_log_probs(x_ND, model.output.weight, model.output.bias, target_out_N)
    return Scores(unpack(log_prob_N[:, None], rows).squeeze(2), gates)


# ----------------------------------------------------------------------------------------------- pairs of sentences


class WordScore(NamedTuple):
    """A word of a translation, or its end, "</s>"."""

    word: str
    log_prob: float
    """log P of the word, in nats: the sum of those of its subwords."""


def word_scores(pieces: Sequence[str], log_probs: Sequence[float]) -> tuple[WordScore, ...]:
    """Return the words of a translation with their log-probabilities, given those of its subwords."""
    left = iter(log_probs)
    return tuple(WordScore(word, math.fsum(next(left) for _ in range(count))) for word, count in split_words(pieces))


@dataclass(frozen=True)
class PairScore:
    """Probability of a given translation."""

    log_prob: float
    """log P(target | source) in nats: the sum of `log_probs`."""
    pieces: tuple[str, ...]
    """Subwords of the target; the last is "</s>", the end of the sentence."""
    log_probs: tuple[float, ...]
    """log P of each subword, given the source and the subwords before it."""
    complete: bool = True
    """False if a side was too long, so that only its beginning was read."""

    @cached_property
    def words(self) -> tuple[WordScore, ...]:
        """Words of the target, which blanks separate, and its end, with their log-probabilities."""
        return word_scores(self.pieces, self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per subword."""
        return perplexity_per(self.log_prob, len(self.pieces))

    @property
    def word_perplexity(self) -> float:
        """exp of the mean negative log-probability per word; the end of the sentence counts as one."""
        return perplexity_per(self.log_prob, len(self.words))

    def to_dict(self, *, words: bool = False) -> dict[str, Any]:
        """Return the score as values of JSON, rounded to 6 decimals; `words` adds the score of each word."""
        result: dict[str, Any] = {
            "log_prob": round(self.log_prob, SCORE_DIGITS),
            "word_perplexity": round(self.word_perplexity, SCORE_DIGITS),
            "complete": self.complete,
        }
        if words:
            result["words"] = [[each.word, round(each.log_prob, SCORE_DIGITS)] for each in self.words]
        return result


def perplexity_per(log_prob: float, count: int) -> float:
    """Return exp(-log P / count), which is finite for any probability."""
    return math.exp(min(-log_prob / count, _MOST_NATS))


def pair_log_probs(models: Sequence[Seq2Seq], held_out: HeldOut, experts_per_token: int = 0) -> list[list[float]]:
    """Return the log-probabilities of each target's subwords and its end, in the order of the pairs.

    Several models score as an ensemble. All must be in evaluation mode and on one device. Results do not depend on the
    order of the pairs. MemoryLimitError if memory does not suffice.
    """
    found: list[list[float]] = [[] for _ in held_out.sources]
    if not found:
        return found
    for batch in eval_batches(held_out.sources, held_out.targets, _BATCH_TOKENS):
        with shortage_told(lambda: "scoring sentence pairs", "score fewer or shorter ones"), torch.inference_mode():
            log_prob_BT = ensemble_log_probs(models, batch.to(models[0].device), experts_per_token).T.tolist()
        for pair, log_prob_T in zip(batch.pairs_B.tolist(), log_prob_BT, strict=True):
            found[pair] = log_prob_T[: len(held_out.targets[pair]) + 1]
    return found


def best_subwords(
    models: Sequence[Seq2Seq], held_out: HeldOut, count: int, experts_per_token: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids_TK, probability_TK) of each pair: the `count` most probable subwords at each target position.

    The last position is that of EOS. Otherwise as `pair_log_probs`.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(held_out.sources)
    for batch in eval_batches(held_out.sources, held_out.targets, _BATCH_TOKENS) if found else ():
        with shortage_told(lambda: "scoring sentence pairs", "score fewer or shorter ones"), torch.inference_mode():
            best = _best_of_rows(models, batch.to(models[0].device), count, experts_per_token)
        ids_NK, probability_NK = (each_NK.cpu().numpy() for each_NK in best)
        begin_T, rank_B = batch.target.begin_L[:-1].numpy(), batch.target.rank_B.numpy()
        for sentence, pair in enumerate(batch.pairs_B.tolist()):
            row_T = begin_T[: len(held_out.targets[pair]) + 1] + rank_B[sentence]
            found[pair] = ids_NK[row_T], probability_NK[row_T]
    return found


def _best_of_rows(models: Sequence[Seq2Seq], batch: Batch, count: int, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Return (ids_NK, probability_NK) of the rows of a batch's target."""
    inputs = []
    for model in models:
        encoded, _ = model.encode(batch.source_N, batch.source, experts_per_token)
        x_ND, _ = model.decode(batch.target_in_N, batch.target, encoded, experts_per_token)
        inputs.append(SoftmaxInput(x_ND, model.output.weight, model.output.bias))
    return top_probabilities(inputs, count)


def pair_scores(subwords: Subwords, held_out: HeldOut, log_probs: Sequence[Sequence[float]]) -> Iterator[PairScore]:
    """Yield the score of each pair, given what `pair_log_probs` returns for them.

    CheckpointError if the model's outputs are not finite.
    """
    cut = set(held_out.cut)
    for pair, found in enumerate(log_probs):
        pieces = subwords.pieces([*held_out.targets[pair].tolist(), EOS])
        if not all(map(math.isfinite, found)):
            raise CheckpointError(NOT_FINITE)
        yield PairScore(math.fsum(found), tuple(pieces), tuple(found), pair not in cut)
