"""Stable counting sort of slots by expert, which groups the rows of the experts.

`sort_slots` chooses between a plain and a fused implementation. On a GPU, the fused one makes five small launches. The
plain one sorts, which is several passes over keys and positions.

Letters: S slots, E experts, A groups of experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The fused sort counts the slots of each expert per block of 256 slots; this bounds the memory of the counts.
_MAX_FUSED_EXPERTS = 16384


class SortedSlots(NamedTuple):
    """Order of slots by expert. Slots of one expert stay in order, and empty slots (expert E) come last."""

    order_S: Tensor  # int64, the slot of each sorted row
    row_S: Tensor  # int64, the sorted row of each slot: the inverse of `order_S`
    ends_E: Tensor  # int32, the row after the last one of each expert


def sort_slots(expert_S: Tensor, num_experts: int) -> SortedSlots:
    """Return the order of slots by their experts, numbers (int64) of 0 to `num_experts`; the last is an empty slot."""
    if expert_S.is_cuda and len(expert_S) and num_experts <= _MAX_FUSED_EXPERTS:
        from nmt.model.kernels.dispatch_triton import fused_sort_slots

        return SortedSlots(*fused_sort_slots(expert_S.contiguous(), num_experts))
    return plain_sort_slots(expert_S, num_experts)


def plain_sort_slots(expert_S: Tensor, num_experts: int) -> SortedSlots:
    """Return `sort_slots` computed with PyTorch operations."""
    sorted_S, order_S = expert_S.to(torch.int32).sort(stable=True)
    row_S = torch.empty_like(order_S)
    row_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    expert_E = torch.arange(num_experts, dtype=torch.int32, device=expert_S.device)
    return SortedSlots(order_S, row_S, torch.searchsorted(sorted_S, expert_E, right=True, out_int32=True))
