"""Decode steps that a GPU takes as one launch: CUDA graphs, one for each size that comes back.

A GPU is done with the kernels of a decode step before a CPU has launched them one by one. A graph
launches them together, with the sizes and addresses that it was recorded with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.config.limits import round_up
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
        self._decoder = decoder
        self._record = record or GraphRecorder()
        self._seen: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def run(self, work: Work, hidden: Tensor | None) -> Tensor:
        """Advance the chunk as `ChunkDecoder.run` does."""
        if not isinstance(work, Decode):
            return self._decoder.run(work, hidden)
        batch = len(work.tokens)
        work, hidden = self._filled_up(work, hidden)
        size = (len(work.tokens), work.longest)
        if size in self._recorded:
            output = self._repeat(self._recorded[size], work, hidden)
        elif size in self._seen:
            output, repeat = self._record(partial(self._decoder.run, work, hidden))
            self._recorded[size] = recorded = _Recorded(work, hidden, output, repeat)
            output = self._repeat(recorded, work, hidden)
        else:
            # Libraries allocate what they need in a first, plain step.
            self._seen.add(size)
            output = self._decoder.run(work, hidden)
        return output[..., :batch, :]

    def _filled_up(self, work: Decode, hidden: Tensor | None) -> tuple[Decode, Tensor | None]:
        """Round the size up.

        What the tokens of free slots leave in the cache lies where the slot's next prompt will.
        """
        batch, cache = len(work.tokens), self._decoder.cache
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
