"""Batches with a teacher's probabilities, for tests that need no teacher."""

import torch

from nmt.batch import Batch
from nmt.data.shards import TEACHER_BEST

_KINDS = 499  # of rows


def with_teacher(batch: Batch, vocabulary: int) -> Batch:
    """The batch with probabilities of different outputs in about two thirds of its target rows.

    They depend on a target subword and the one before it, so that they are the same however sentences are batched.
    """
    generator = torch.Generator().manual_seed(3)
    ids_NK = torch.rand(_KINDS, vocabulary, generator=generator).argsort(1)[:, :TEACHER_BEST]
    probability_NK = torch.rand(ids_NK.shape, generator=generator) / TEACHER_BEST
    probability_NK[torch.rand(_KINDS, generator=generator) < 1 / 3] = 0.0
    kind_N = (batch.target_in_N * vocabulary + batch.target_out_N) % _KINDS
    return batch._replace(teacher_ids_NK=ids_NK[kind_N], teacher_NK=probability_NK[kind_N])
