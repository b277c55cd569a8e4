"""CUDA graphs: kernels that are captured once and then launched together."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class GraphRecorder:
    """Captures CUDA graphs that share a memory pool, so no two of them may run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Capture the kernels that a function launches, without running them.

        Args:
            step: must have run before, so that libraries do not allocate, and must not synchronise.

        Returns:
            What the step returned, where results will be, and a function that launches the graph.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that saves a checkpoint, may use the device during capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        return output, graph.replay
