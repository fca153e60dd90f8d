"""Forced decoding: the log-probabilities of given translations.

Perplexity, explanations and scores of sentence pairs all use this file. Forced decoding of a hypothesis found by a
search returns the search's log-probabilities, subword by subword.

Letters: S source positions, T target positions, B sentences, R = columns x B decoder columns (column r belongs to
sentence r mod B), N real (not padding) target positions.
"""

from typing import NamedTuple

from torch import Tensor

from nmt.batch import Batch
from nmt.model.attention import Memory
from nmt.model.loss import token_log_probs
from nmt.model.rows import put_rows, take_rows
from nmt.model.seq2seq import Seq2Seq
from nmt.model.walk import ChangeGate, Gates


class Scores(NamedTuple):
    """Results of forced decoding."""

    log_prob_TR: Tensor  # at least float32: log P of each subword and of EOS, in nats; 0 at padding
    attention_TRS: Tensor
    gates: Gates  # decisions of the gates in this pass


def score(model: Seq2Seq, batch: Batch, experts_per_token: int = 0) -> Scores:
    """Return the log-probability of every target subword of a batch, given its source and the subwords before it.

    The model must be in evaluation mode, and computes in its own precision. Call this without gradients.
    """
    memory, gates = model.encode(batch.source_SB, batch.source_length_B, batch.source_rows_N, experts_per_token)
    scores = score_target(
        model, memory, batch.target_in_TB, batch.target_out_TB, batch.target_rows_N, experts_per_token
    )
    return scores._replace(gates=gates | scores.gates)


def score_target(
    model: Seq2Seq,
    memory: Memory,
    target_in_TR: Tensor,
    target_out_TR: Tensor,
    rows_N: Tensor | None,
    experts_per_token: int = 0,
    change_gate: ChangeGate | None = None,
) -> Scores:
    """Return what `score` does, for an encoded source.

    `rows_N` has the flat positions of real target subwords; None: no position is padding.
    """
    decoded = model.decode(target_in_TR, memory, None, rows_N, experts_per_token, change_gate)
    x_MD, target_M = decoded.x_TRD.flatten(0, 1), target_out_TR.flatten()
    if rows_N is not None:
        x_MD, target_M = take_rows(x_MD, rows_N), target_M.index_select(0, rows_N)
    log_prob_M = token_log_probs(x_MD, model.output.weight, model.output.bias, target_M)
    if rows_N is not None:
        log_prob_M = put_rows(log_prob_M[:, None], rows_N, target_out_TR.numel()).squeeze(1)
    return Scores(log_prob_M.view(target_out_TR.shape), decoded.weights_TRS, decoded.gates)
