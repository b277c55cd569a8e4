"""Degrees of parallelism of a world of known size."""

from dataclasses import dataclass

from marlhf_mega.config.limits import context_multiple, describe_layout
from marlhf_mega.config.sections.hardware import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class WorldLayout:
    """Degrees of parallelism. Tensor parallelism does not split expert weights."""

    tensor: int
    pipeline: int
    chunks: int
    """Model chunks on every rank (virtual pipeline stages)."""
    context: int
    expert: int
    data: int
    sequence_parallel: bool
    overlap: bool = False
    """Whether communication of gradients and weights overlaps with computation."""

    @staticmethod
    def of(parallel: ParallelConfig, world_size: int) -> "WorldLayout":
        """Return the layout; data-parallel size = world / (TP x PP x CP)."""
        return WorldLayout(
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
        """Ranks that norms and residuals are split over, along the sequence."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def context_multiple(self) -> int:
        """What sequence lengths must be a multiple of: two pieces per context-parallel rank."""
        return context_multiple(self.context)

    def describe(self) -> str:
        """Return the layout as text, such as `TP8 x PP4 x DP4 + SP`."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.chunks, "CP": self.context}
        sizes |= {"EP": self.expert, "DP": self.data}
        return describe_layout(sizes, sequence_parallel=self.sequence_parallel)
