"""How fast this CPU may train, where nothing has been trained yet."""

import time

import torch

_SIDE = 512
# What training the demo reached of such products, on two cores.
_SHARE = 1 / 3


def guess_cpu_tflops(processes: int, seconds: float = 0.2) -> float:
    """10^12 operations a second of each of `processes` that train on this CPU: a guess, good to a factor of about 2.

    A third of what float32 matrix products of 512 x 512 reach in one thread, times the threads of a process. The best
    of many in so many `seconds` counts, so that what else the machine does matters little.
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
