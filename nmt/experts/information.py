"""Statistics of tables of counts, compared with chance: information, cautious rates, expected pairs.

Letters: E experts, V labels (subwords, domains), C (expert, label) combinations, L labellings (first the true one, then
shuffled ones).
"""

from dataclasses import dataclass

import numpy as np

Z = 2.576
"""Half the width of a 99% interval, in standard deviations."""


@dataclass(frozen=True)
class Purity:
    """Mutual information between a token's label and one of its experts, compared with that of shuffled labels."""

    bits: float
    label_bits: float
    """Entropy of the labels: the largest possible value of `bits`."""
    share: float
    """bits / label_bits: 0 if the expert has no information on the label, 1 if it determines the label."""
    shuffles: int
    chance_share: float
    """Mean over the shuffles."""
    chance_max_share: float


def entropy_bits(count: np.ndarray) -> float:
    """Return the entropy of the distribution given by counts of any shape."""
    p = count[count > 0] / max(count.sum(), 1)
    return float(-(p * np.log2(p)).sum())


def information(expert_C: np.ndarray, label_C: np.ndarray, count_C: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the sum of n log2 lift for each expert, from the counts n of each (expert, label).

    Divided by the expert's count, this is the Kullback-Leibler divergence of its labels from all labels. The sum over
    all experts, divided by the total count, is the mutual information I(expert; label).
    """
    expert_C, label_C, count_C = expert_C[count_C > 0], label_C[count_C > 0], count_C[count_C > 0]
    count_E, count_V = np.bincount(expert_C, count_C, num_experts), np.bincount(label_C, count_C)
    lift_C = count_C * count_C.sum() / (count_E[expert_C] * count_V[label_C])
    return np.bincount(expert_C, count_C * np.log2(lift_C), num_experts)


def make_purity(bits_L: np.ndarray, label_bits: float) -> Purity:
    """Return the purity from mutual informations: first with the true labels, then with shuffled ones."""
    share, *chance = (bits_L / max(label_bits, 1e-9)).clip(0).tolist()
    return Purity(float(bits_L[0]), label_bits, share, len(chance), float(np.mean(chance)), max(chance))


def least_rate(count: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Return the lower end of Wilson's 99% interval of count / trials: close to it if there are many trials."""
    p, z2n = count / trials, Z * Z / trials
    return (p + z2n / 2 - Z * np.sqrt((p * (1 - p) + z2n / 4) / trials)) / (1 + z2n)


def expected_pairs(together_EE: np.ndarray) -> np.ndarray:
    """Return how often two experts would be chosen together if only their loads mattered.

    A token never chooses an expert twice, so products of loads are too large. Under quasi-independence, the count of a
    pair is a_i a_j off the diagonal, with the vector a that reproduces each expert's total number of partners.
    """
    partners_E = together_EE.sum(1) - together_EE.diagonal()
    a_E = partners_E / np.sqrt(max(partners_E.sum(), 1.0))
    for _ in range(100):
        a_E = np.sqrt(a_E * partners_E / np.maximum(a_E.sum() - a_E, 1e-30))
    expected_EE = np.outer(a_E, a_E)
    np.fill_diagonal(expected_EE, 0.0)
    return expected_EE


def rank_in_runs(key: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2, ... within each run of equal keys."""
    index = np.arange(len(key))
    starts = np.append(True, key[1:] != key[:-1])[: len(key)]
    return index - np.maximum.accumulate(np.where(starts, index, 0))
