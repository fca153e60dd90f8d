"""Forced decoding: the log-probabilities of given translations.

Perplexity, explanations and scores of sentence pairs all use this file. Forced decoding of a hypothesis found by a
search returns the search's log-probabilities, subword by subword.

Letters: T target positions, B sentences, N rows of the packed target.
"""

from typing import NamedTuple

from torch import Tensor

from nmt.batch import Batch, Rows
from nmt.model.loss import token_log_probs
from nmt.model.one_pass import ChangeGate, Gates
from nmt.model.rows import unpack
from nmt.model.seq2seq import Encoded, Seq2Seq


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
