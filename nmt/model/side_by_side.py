"""Independent pieces of work that a GPU may do at the same time."""

from collections.abc import Callable

import torch
from torch import Tensor


def side_by_side(*works: Callable[[], Tensor]) -> list[Tensor]:
    """Return the results of independent pieces of work, which must not draw random numbers.

    In a step that is recorded, a GPU does them at the same time, forward and backward: an LSTM alone leaves most of the
    GPU idle. Otherwise they follow each other, as launching them would take longer than they do.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [work() for work in works]
    main = torch.cuda.current_stream()
    results = []
    sides = [main, *(torch.cuda.Stream() for _ in works[1:])]
    for side in sides[1:]:
        side.wait_stream(main)
    for side, work in zip(sides, works, strict=True):
        with torch.cuda.stream(side):
            results.append(work())
    for side in sides[1:]:
        main.wait_stream(side)
    return results
