"""Several models with one vocabulary as one model: an ensemble.

    P(y | x, y before) = (P_1 + ... + P_M) / M        for each subword, and likewise the attention

It is the mean of probabilities, not of their logarithms. The mean is a distribution again, so a score is still a
log-probability. And a subword that one model rules out is not lost: the others may be right.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmt.decoding.search import SearchState, Step, StepOutput


class States(NamedTuple):
    """States of a search with several models."""

    states: tuple[SearchState, ...]

    def take_(self, after: Sequence[Any], columns_R: Tensor) -> None:
        """Do `SearchState.take_` in each state."""
        for state, each in zip(self.states, after, strict=True):
            state.take_(each, columns_R)

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "States":
        """Do `SearchState.shrink` in each state."""
        return States(tuple(state.shrink(columns_R, sentences_B) for state in self.states))


def mean_step(steps: Sequence[Step]) -> Step:
    """Return the step of an ensemble, whose state is `States`, given the steps of its models."""

    def step(previous_KB: Tensor, state: States) -> StepOutput:
        outputs = [step(previous_KB, each) for step, each in zip(steps, state.states, strict=True)]
        return StepOutput(
            mean_log_prob([output.logits_KBV.log_softmax(2) for output in outputs]),
            torch.stack([output.attention_KBS for output in outputs]).mean(0),
            [output.state for output in outputs],
        )

    return step


def mean_log_prob(log_probs: Sequence[Tensor]) -> Tensor:
    """Return the log of the mean of the probabilities of several models."""
    if len(log_probs) == 1:
        return log_probs[0]
    total = log_probs[0]
    for each in log_probs[1:]:
        total = torch.logaddexp(total, each)
    return total - math.log(len(log_probs))
