"""Host memory of one machine: what saving, loading, offloading and data take beside the devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marlhf_mega.config.limits import READ_BLOCK_BYTES, SMALL_DATA_BYTES
from marlhf_mega.config.lora import FUSED
from marlhf_mega.config.sections.data import DataSource
from marlhf_mega.plan.memory import StageMemory
from marlhf_mega.plan.parameters import stage_parameters
from marlhf_mega.plan.workload import GENERATING_ROLES, Workload

_COPY_AHEAD = 10_000_000
"""Bytes that torch's writer copies from the device before it writes them."""
_BYTES_PER_TOKEN = 118
"""Of a small training file in each process, measured."""
_MAPPED_BYTES_PER_TOKEN = 4
"""Of a larger one in the cache that all ranks of a machine map, beside its text."""
_CHARACTERS_PER_TOKEN = 4
"""Of English text, by the tokenizers of current models."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Peaks in bytes on one machine, all of its ranks together."""

    save: int
    """Copies of what its ranks write, or buffers if a save is not done in the background."""
    load: int
    """Buffers of reads; a rank reads straight into the tensors that it owns."""
    export: int
    """Weights of the model whose adapters are merged for its export, as they were before."""
    offload: int
    """Weights and optimizer states that are on the host between the phases that use them."""
    data: int | None
    """Tokenised training data, estimated from the size of the files; None if they are not here. Of
    a file that ranks map, the system takes back what is not in use."""

    @property
    def total(self) -> int:
        """Sum of what is held at the same time: loads come first, exports when all is saved."""
        return max(self.save, self.load, self.export) + self.offload + (self.data or 0)


def host_memory(
    work: Workload,
    stages: Sequence[StageMemory],
    *,
    gpus_per_node: int,
    checkpoint_bytes: int,
    element: int,
) -> HostMemory:
    """Return the host memory that the ranks of one machine take.

    Args:
        work: the job.
        stages: memory of the training ranks of each pipeline stage.
        gpus_per_node: ranks of a machine.
        checkpoint_bytes: size of a checkpoint, which the training ranks write in equal shares.
        element: bytes of a weight.
    """
    copies = work.config.checkpoint.async_save
    save = -(-checkpoint_bytes // work.layout.world) if copies else _COPY_AHEAD
    return HostMemory(
        save=save * gpus_per_node,
        load=READ_BLOCK_BYTES * gpus_per_node,
        export=max(_merged(work, stage.stage) for stage in stages) * element * gpus_per_node,
        offload=max(_offloaded(work, stage) for stage in stages) * gpus_per_node,
        data=_data(work.config.data.train_path, num_ranks=gpus_per_node),
    )


def _merged(work: Workload, stage: int) -> int:
    """Return the weights of a rank that adapters are merged into, of the model with the most."""
    if not work.config.checkpoint.export_hf:
        return 0
    learning = [role for role in work.roles if role.learns]
    return max(
        sum(
            p.size
            for chunk in stage_parameters(role.model, work.layout, head=role.head, stage=stage)
            for p in chunk
            if any(
                p.name.endswith(f".{projection}.weight") and role.model.lora.adapted(projection)
                for projection in FUSED
            )
        )
        for role in learning
    )


def _offloaded(work: Workload, stage: StageMemory) -> int:
    """Return the bytes of one rank's host buffers; gradients come back as zeros and have none."""
    memory = work.config.memory
    found = 0
    if work.job == "ppo" and memory.offload_idle:
        idle = stage.roles.keys() - GENERATING_ROLES
        found += sum(stage.roles[name].weights for name in idle)
    if work.job == "ppo" and memory.offload_optimizer:
        found += sum(role.optimizer for role in stage.roles.values())
    return found


def _data(sources: Sequence[DataSource] | None, *, num_ranks: int) -> int | None:
    paths = [Path(file) for source in sources or () for file in source.files()]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return sum(_of_file(path.stat().st_size, num_ranks=num_ranks) for path in paths)


def _of_file(size: int, *, num_ranks: int) -> int:
    tokens = size // _CHARACTERS_PER_TOKEN
    if size < SMALL_DATA_BYTES:
        return tokens * _BYTES_PER_TOKEN * num_ranks
    return tokens * _MAPPED_BYTES_PER_TOKEN + 2 * size  # rows, and their prompts as text
