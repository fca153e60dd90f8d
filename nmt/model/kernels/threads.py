"""Threads of a CPU that work on different groups of rows, instead of together on one matrix product after the other.

PyTorch shares every product among its threads. Threads then meet twice per product, which takes longer than a product
of few rows, and all wait for the slowest. Groups of rows are independent, so threads need to meet only once.
"""

import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

# What one thread multiplies in about 0.3 ms. Threads need a third of this time to meet.
_MIN_PRODUCTS = 2**24


def share_groups(work: Callable[[slice], None], sizes: list[int], products: int, device: torch.device) -> None:
    """Call `work` with slices of the groups that have `sizes` rows: each thread gets about equal numbers of rows.

    `products` is the number of multiplications that all groups take. If it is small, or for a GPU, this thread gets all
    groups, and PyTorch shares each matrix product. `work` must not need gradients. It should find views of the groups
    ready: whenever PyTorch is called, and be it for a view, Python's threads may wait for each other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(sizes) < 2 or products < _MIN_PRODUCTS:
        work(slice(0, len(sizes)))
        return
    shares = _equal_shares(sizes, threads)
    threads_each = max(1, threads // len(shares))
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for number, share in enumerate(shares[1:]):
        _helper(number).put(_Task(work, share, threads_each, ended))
    try:
        torch.set_num_threads(threads_each)
        work(shares[0])
    finally:
        errors = [ended.get() for _ in shares[1:]]
        # Last, since the setting of any thread is also that of threads that start later.
        torch.set_num_threads(threads)
    for error in errors:
        if error:
            raise error


def _equal_shares(sizes: list[int], number: int) -> list[slice]:
    """Return at most `number` slices of groups. The middle row of a group decides which one it is in."""
    total, before = sum(sizes), 0
    ends: dict[int, int] = {}
    for group, size in enumerate(sizes):
        ends[(2 * before + size) * number // (2 * total)] = group + 1
        before += size
    return [slice(begin, end) for begin, end in pairwise([0, *ends.values()])]


class _Task(NamedTuple):
    work: Callable[[slice], None]
    groups: slice
    threads: int
    ended: SimpleQueue[BaseException | None]


@cache
def _helper(_number: int) -> SimpleQueue[_Task]:
    """Return the tasks of a thread. An executor takes 70 microseconds longer per task, a fifth of a small one."""
    tasks: SimpleQueue[_Task] = SimpleQueue()
    Thread(target=_help, args=(tasks,), name="share_groups", daemon=True).start()
    return tasks


def _help(tasks: SimpleQueue[_Task]) -> None:
    while True:
        work, groups, threads, ended = tasks.get()
        try:
            torch.set_num_threads(threads)
            # Gradient modes belong to a thread. This one also allows writing to tensors of an inference mode.
            with torch.inference_mode():
                work(groups)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)
        # A waiting thread must not keep the tensors of its last task alive.
        del work, ended


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_helper.cache_clear)
