"""Estimate how fast this CPU trains, if no run has measured it."""

import time

import torch

_SIDE = 512
# Speed of training the demo, relative to such products, on two cores.
_SHARE = 1 / 3


def guess_cpu_tflops(processes: int, seconds: float = 0.2) -> float:
    """Estimate 10^12 operations per second for each of `processes` that train on this CPU, to a factor of about 2.

    The estimate is a third of the speed of float32 matrix products of 512 x 512 in one thread, times the threads of a
    process. The fastest product within `seconds` counts, so that other load on the machine matters little.
    """
    threads = torch.get_num_threads()
    product, best, begun = torch.randn(_SIDE, _SIDE), float("inf"), time.perf_counter()
    torch.set_num_threads(1)
    try:
        while (started := time.perf_counter()) < begun + seconds:
            product @ product
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return _SHARE * 2 * _SIDE**3 / best / 1e12 * threads / processes
