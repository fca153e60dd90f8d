"""Record work of a GPU once, and launch all of its kernels at once from then on.

Launching hundreds of kernels one by one takes the host longer than a GPU needs to run them. A recording fixes the
shapes and addresses of all tensors, and every number that the host knows.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from nmt.model.side_by_side import Later

T = TypeVar("T")


class Graph(Generic[T]):
    """A piece of work recorded in a CUDA graph. Its inputs and results are always in the same tensors."""

    def __init__(self, work: Callable[[], T], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        try:
            # Other threads may allocate page-locked memory meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    self.results = work()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            Later.forget()
            # The end of a recording that failed may raise an error of its own, which would hide the first.
            raise failure or error from None

    def replay(self) -> T:
        """Do the work again."""
        self.graph.replay()
        return self.results
