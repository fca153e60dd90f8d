"""The largest logits of each row and the logarithm of its sum of exponentials: what a search needs of the vocabulary.

PyTorch's own selection looks at every logit of a row one by one. Here, vector instructions find the maximum of each
block of logits first. Any of the k largest logits lies in one of the k blocks with the largest maxima, so only these
blocks are searched. This is exact, and takes a third to a half of the time on a CPU.

Letters: R rows, V vocabulary, K logits to select, N blocks of W logits, X candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Logits per block, and blocks per row: more blocks make more maxima to select from, wider ones more candidates.
_LEAST_WIDTH, _MOST_BLOCKS = 8, 1000
# With fewer logits in all rows, PyTorch's selection takes less time than the calls of this one.
_MIN_LOGITS = 2**15
_CACHED_LOGITS = 2**18
"""Logits in float32 whose tensors in between stay in the cache of one processor core."""


class Top(NamedTuple):
    """The largest logits of each row, largest first. Among equal logits, the lower index comes first.

    Minus infinity marks a subword that is not allowed. If a row has fewer than K other logits, it fills the last
    places, with any indexes.
    """

    values_RK: Tensor
    indexes_RK: Tensor  # int64


class Best(NamedTuple):
    """The K largest allowed logits of each row, as in `Top`, and log sum exp of all its logits."""

    values_RK: Tensor
    indexes_RK: Tensor  # int64
    normaliser_R: Tensor


# The fused form compares with every selected block once per selected logit.
_MOST_FUSED, _MOST_VOCABULARY = 32, 2**17


def never_waits(vocabulary: int, k: int) -> bool:
    """Return whether a GPU selects `k` logits without the host, which a recording needs."""
    return k <= _MOST_FUSED and vocabulary <= _MOST_VOCABULARY


def best(
    logits_RV: Tensor, k: int, forbidden_F: Tensor, ends_R: Tensor, eos: int, bias_V: Tensor | None = None
) -> Best:
    """Return the `k` largest allowed logits of each row, or as many as there are logits, and the normalisers.

    `bias_V` is added to the logits first.

    Subwords `forbidden_F` (int64) are not allowed. `ends_R` (bool) is False for rows that may not end: subword `eos` is
    then not allowed either. This may overwrite the logits of subwords that are not allowed.
    """
    k = min(k, logits_RV.shape[1])
    if _fuses(logits_RV, k):
        from nmt.model.kernels.top_k_triton import fused_best

        return Best(*fused_best(logits_RV.contiguous(), k, forbidden_F, ends_R, eos, bias_V))
    return plain_best(logits_RV if bias_V is None else logits_RV + bias_V, k, forbidden_F, ends_R, eos)


def plain_best(logits_RV: Tensor, k: int, forbidden_F: Tensor, ends_R: Tensor, eos: int) -> Best:
    """Return `best` computed with PyTorch operations."""
    normaliser_R = log_sum_exp(logits_RV)
    logits_RV.index_fill_(1, forbidden_F, -torch.inf)
    logits_RV[:, eos].masked_fill_(~ends_R, -torch.inf)
    return Best(*top_k(logits_RV, k), normaliser_R)


def _fuses(logits_RV: Tensor, k: int) -> bool:
    real = logits_RV.dtype in (torch.float32, torch.bfloat16)
    return logits_RV.is_cuda and real and never_waits(logits_RV.shape[1], k)


def top_k(logits_RV: Tensor, k: int) -> Top:
    """Return the `k` largest logits of each row, or all V if there are fewer."""
    k = min(k, logits_RV.shape[1])
    if _fuses(logits_RV, k):
        from nmt.model.kernels.top_k_triton import fused_best

        none_F = torch.zeros(0, dtype=torch.int64, device=logits_RV.device)
        all_R = torch.ones(len(logits_RV), dtype=torch.bool, device=logits_RV.device)
        return Top(*fused_best(logits_RV.contiguous(), k, none_F, all_R, 0)[:2])
    # The logit after the last one shows whether that one was selected among equals.
    values_RX, indexes_RX = _selected(logits_RV, min(k + 1, logits_RV.shape[1]))
    equal_RX = (values_RX[:, 1:] == values_RX[:, :-1]) & (values_RX[:, 1:] > -torch.inf)
    top = Top(values_RX[:, :k], indexes_RX[:, :k])
    if equal_RX.any():
        rows_N = equal_RX.any(1).nonzero().squeeze(1)
        order_NV = logits_RV.index_select(0, rows_N).argsort(dim=1, descending=True, stable=True)
        top = Top(top.values_RK, top.indexes_RK.index_copy(0, rows_N, order_NV[:, :k]))
    return top


def log_sum_exp(logits_RV: Tensor) -> Tensor:
    """Return log sum_v exp(logit_v) of each row, float32 or better: log P of subword v is its logit minus this."""
    exact = torch.promote_types(logits_RV.dtype, torch.float32)
    cached = _CACHED_LOGITS * torch.get_num_threads()
    if logits_RV.is_cuda or logits_RV.numel() <= cached:
        return logits_RV.to(exact).logsumexp(dim=1)
    # A few rows at a time, so that the tensors in between stay in the cache and no new memory is needed for them.
    rows = max(1, cached // logits_RV.shape[1])
    return torch.cat([part_MV.to(exact).logsumexp(dim=1) for part_MV in logits_RV.split(rows)])


def _selected(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values, indexes) of the `k` largest logits of each row, in any order among equals."""
    rows, vocabulary = logits_RV.shape
    width = max(_LEAST_WIDTH, vocabulary // _MOST_BLOCKS)
    blocks = vocabulary // width
    if blocks <= 4 * k or logits_RV.numel() < _MIN_LOGITS:
        values_RK, index_RK = logits_RV.topk(k, dim=1)
        return values_RK, index_RK
    # A block has every N-th logit, so that the maxima of neighbouring blocks are found together.
    blocked_RWN = logits_RV[:, : blocks * width].view(rows, width, blocks)
    block_RK = blocked_RWN.amax(1).topk(k, dim=1).indices
    first_W = torch.arange(0, blocks * width, blocks, device=logits_RV.device)
    rest_RX = torch.arange(blocks * width, vocabulary, device=logits_RV.device).expand(rows, -1)
    index_RX = torch.cat([(block_RK.unsqueeze(2) + first_W).flatten(1), rest_RX], dim=1)
    values_RK, place_RK = logits_RV.gather(1, index_RX).topk(k, dim=1)
    return values_RK, index_RX.gather(1, place_RK)
