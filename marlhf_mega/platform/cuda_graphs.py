"""Kernels recorded once and launched together from then on."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphRecorder:
    """Makes CUDA graphs that share their memory, so no two of them may run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record what a function launches.

        Args:
            step: has run before, so that libraries need not allocate; reads nothing back.

        Returns:
            Where the result will be, and what launches it all: the function itself only recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that saves a checkpoint, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        return output, graph.replay
