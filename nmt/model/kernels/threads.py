"""Threads of a CPU that work on different groups of rows, instead of together on one matrix product after the other.

PyTorch shares every product among its threads. Threads then meet twice per product, which takes longer than a product
of few rows, and all wait for the slowest. Groups of rows are independent, so threads need to meet only once.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import torch

Part = tuple[int, int, int]
"""(group, first row, row after the last) of a group that has rows."""

# What one thread multiplies in about 0.3 ms. Threads need a third of this time to meet.
_MIN_PRODUCTS = 2**24


def share_groups(work: Callable[[list[Part]], None], parts: list[Part], products: int, device: torch.device) -> None:
    """Call `work` with all parts: each thread gets consecutive ones, with about equal numbers of rows.

    `products` is the number of multiplications that all parts take. If it is small, or for a GPU, this thread gets all
    parts, and PyTorch shares each matrix product. `work` must not need gradients.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(parts) < 2 or products < _MIN_PRODUCTS:
        work(parts)
        return
    shares = _equal_shares(parts, threads)
    threads_each = max(1, threads // len(shares))
    futures: list[Future[None]] = [
        _helpers(threads - 1).submit(_work_alone, work, share, threads_each) for share in shares[1:]
    ]
    try:
        torch.set_num_threads(threads_each)
        work(shares[0])
    finally:
        wait(futures)
        # Last, since the setting of any thread is also that of threads that start later.
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def _equal_shares(parts: list[Part], number: int) -> list[list[Part]]:
    """Return at most `number` lists of consecutive parts. The middle row of a part decides which one it is in."""
    begin, rows = parts[0][1], parts[-1][2] - parts[0][1]
    shares: dict[int, list[Part]] = {}
    for part in parts:
        shares.setdefault((part[1] + part[2] - 2 * begin) * number // (2 * rows), []).append(part)
    return list(shares.values())


def _work_alone(work: Callable[[list[Part]], None], parts: list[Part], threads: int) -> None:
    torch.set_num_threads(threads)
    # Gradient modes belong to a thread. This one also allows writing to tensors of the caller's inference mode.
    with torch.inference_mode():
        work(parts)


@cache
def _helpers(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="share_groups")


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_helpers.cache_clear)
