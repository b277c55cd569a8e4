"""Degrees of parallelism with the size of the world: who shares what with how many."""

from dataclasses import dataclass

from marlhf_mega.config.limits import context_multiple
from marlhf_mega.config.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of a world. Expert weights are spread whole: no tensor parallelism inside them."""

    tensor: int
    pipeline: int
    chunks: int
    """Model chunks on every rank (virtual pipeline stages)."""
    context: int
    expert: int
    data: int
    sequence_parallel: bool
    overlap: bool = False
    """Gradients and new weights travel while passes compute."""

    @staticmethod
    def of(parallel: ParallelConfig, world_size: int) -> "Layout":
        """Lay a world out; what is left of it is data parallel."""
        return Layout(
            tensor=parallel.tensor_size,
            pipeline=parallel.pipeline_size,
            chunks=parallel.virtual_pipeline_size,
            context=parallel.context_size,
            expert=parallel.expert_size,
            data=world_size // parallel.model_size,
            sequence_parallel=parallel.sequence_parallel,
            overlap=parallel.overlap,
        )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def sequence_share(self) -> int:
        """Tensor-parallel ranks among which norms and residuals are split along the sequence."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def context_multiple(self) -> int:
        """Sequences are a multiple of this: two pieces for each rank that shares them."""
        return context_multiple(self.context)

    def describe(self) -> str:
        """Say the layout, such as `TP8 x PP4 x DP4 + SP`."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VPP{self.chunks}"] if self.chunks > 1 else []
        parts += [f"CP{self.context}"] if self.context > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"DP{self.data}"]
        return " x ".join(parts) + (" + SP" if self.sequence_parallel else "")


def round_up(value: int, multiple: int) -> int:
    """Round a count up to a multiple."""
    return -(-value // multiple) * multiple
