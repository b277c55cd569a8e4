"""Decode steps that a GPU takes as one launch: CUDA graphs, one for each size that comes back.

A GPU is done with the kernels of a decode step before a CPU has launched them one by one. A graph
launches them together, with the sizes and addresses that it was recorded with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.config.limits import round_up
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import any_rank
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform.cuda_graphs import GraphRecorder
from marlhf_mega.rollout.decoder import ChunkDecoder
from marlhf_mega.rollout.work import Decode, Work

SLOT_STEP = 8
GRAPH_LENGTH_STEP = 128
"""Sizes are rounded up to these, so that one graph serves some hundred steps."""

Step = Callable[[], Tensor]
Record = Callable[[Step], tuple[Tensor, Callable[[], None]]]
"""Records a step; returns where its result will be, and what repeats it."""


@dataclass(frozen=True)
class _Recorded:
    """A step of one size, and where it reads and writes."""

    work: Decode
    hidden: Tensor | None
    output: Tensor
    repeat: Callable[[], None]


class RecordedSteps:
    """Runs one decoder; records a size of decode step when it comes the second time.

    Weights and cache must stay where they are for as long as it lives. All ranks of a replica see
    the same sizes, so that they record, and repeat, together.
    """

    def __init__(self, decoder: ChunkDecoder, record: Record | None = None) -> None:
        """Record nothing yet.

        Args:
            decoder: of one model chunk.
            record: how; none: CUDA graphs that share their memory.
        """
        self.decoder = decoder
        self._record = record or GraphRecorder()
        self._seen: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots, and longest sequence, that there is room for."""
        return self.decoder.cache.num_slots, self.decoder.cache.max_tokens

    def run(self, work: Work, hidden: Tensor | None) -> Tensor:
        """Advance the chunk as `ChunkDecoder.run` does."""
        if not isinstance(work, Decode):
            return self.decoder.run(work, hidden)
        batch = len(work.tokens)
        work, hidden = self._filled_up(work, hidden)
        size = (len(work.tokens), work.longest)
        if size in self._recorded:
            output = self._repeat(self._recorded[size], work, hidden)
        elif size in self._seen:
            output, repeat = self._record(partial(self.decoder.run, work, hidden))
            self._recorded[size] = recorded = _Recorded(work, hidden, output, repeat)
            output = self._repeat(recorded, work, hidden)
        else:
            # Libraries allocate what they need in a first, plain step.
            self._seen.add(size)
            output = self.decoder.run(work, hidden)
        return output[..., :batch, :]

    def _filled_up(self, work: Decode, hidden: Tensor | None) -> tuple[Decode, Tensor | None]:
        """Round the size up.

        What the tokens of free slots leave in the cache lies where the slot's next prompt will.
        """
        batch, cache = len(work.tokens), self.decoder.cache
        missing = min(round_up(batch, SLOT_STEP), cache.num_slots) - batch
        work = Decode(
            tokens=F.pad(work.tokens, (0, 0, 0, missing)),
            positions=F.pad(work.positions, (0, missing)),
            longest=min(round_up(work.longest, GRAPH_LENGTH_STEP), cache.max_tokens),
        )
        return work, None if hidden is None else F.pad(hidden, (0, 0, 0, missing))

    def _repeat(self, recorded: _Recorded, work: Decode, hidden: Tensor | None) -> Tensor:
        recorded.work.tokens.copy_(work.tokens)
        recorded.work.positions.copy_(work.positions)
        if recorded.hidden is not None and hidden is not None:
            recorded.hidden.copy_(hidden)
        recorded.repeat()
        # Another graph may write to the same memory while this result is still being sent.
        return recorded.output.clone()


class KeptSteps:
    """A generator's recorded steps, and with them the caches, kept from one rollout to the next.

    They are made anew when a rollout needs more room, or when weights have moved: an optimizer
    writes them in place, but those of a layout of its own are freed between rollouts.
    """

    def __init__(self, chunks: Sequence[StageModel], mesh: Mesh) -> None:
        """Take the model; nothing is allocated yet."""
        self._chunks, self._mesh = chunks, mesh
        self._steps: list[list[RecordedSteps]] = []
        self._addresses: list[int] = []

    def take(
        self, num_groups: int, *, num_slots: int, max_tokens: int
    ) -> list[list[RecordedSteps]]:
        """Return the steps of each group of slots and each chunk, with empty caches.

        All ranks of a replica call it, and get new ones if any of them has to.
        """
        addresses = [p.data_ptr() for chunk in self._chunks for p in chunk.parameters()]
        sizes = [steps.sizes for group in self._steps for steps in group]
        fits = len(self._steps) >= num_groups and addresses == self._addresses
        fits &= all(slots >= num_slots and tokens >= max_tokens for slots, tokens in sizes)
        if not any_rank(not fits, self._mesh.device, self._mesh.groups.tp_ep_pp):
            for steps in (steps for group in self._steps for steps in group):
                steps.decoder.cache.clear()
            return self._steps[:num_groups]
        # Other rollouts may be a little longer.
        max_tokens = round_up(max_tokens, GRAPH_LENGTH_STEP)
        slots, tokens = (max(x) for x in zip(*sizes, (num_slots, max_tokens), strict=True))
        num_groups = max(num_groups, len(self._steps))
        self._steps = []  # frees the old caches before there are new ones
        self._addresses = addresses
        self._steps = [
            [
                RecordedSteps(ChunkDecoder(chunk, num_slots=slots, max_tokens=tokens))
                for chunk in self._chunks
            ]
            for _ in range(num_groups)
        ]
        return self._steps[:num_groups]
