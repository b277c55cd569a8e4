"""Decode steps that a GPU takes as one launch: CUDA graphs, one for each size that comes back.

A GPU is done with the kernels of a decode step before a CPU has launched them one by one. A graph
launches them together, with the sizes and addresses that it was recorded with. On the last stage
it ends with the tokens, unless a second model has a say in them.
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
from marlhf_mega.rollout.drawing import Drawn, draw
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.work import Decode, Work

SLOT_STEP = 8
GRAPH_LENGTH_STEP = 128
"""Sizes are rounded up to these, so that one graph serves some hundred steps."""

Output = tuple[Tensor, ...]
"""The states that go on; or what is drawn, and, if that is recorded, what filters kept."""
Step = Callable[[], Output]
Record = Callable[[Step], tuple[Output, Callable[[], None]]]
"""Records a step; returns where its result will be, and what repeats it."""


@dataclass(frozen=True)
class _Recorded:
    """A step of one size, and where it reads and writes."""

    work: Decode
    hidden: Tensor | None
    numbers: Tensor | None
    output: Output
    repeat: Callable[[], None]


_Kind = tuple[int, int, SamplingRule | None]
"""Slots, longest sequence, and how tokens are drawn, where they are."""


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
        self._seen: set[_Kind] = set()
        self._recorded: dict[_Kind, _Recorded] = {}

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots, and longest sequence, that there is room for."""
        return self.decoder.cache.num_slots, self.decoder.cache.max_tokens

    def run(self, work: Work, hidden: Tensor | None) -> Tensor:
        """Advance the chunk as `ChunkDecoder.run` does."""
        if not isinstance(work, Decode):
            return self.decoder.run(work, hidden)
        (output,) = self._step(work, hidden, None, None)
        return output[..., : len(work.tokens), :]

    def draw(
        self, work: Decode, hidden: Tensor | None, numbers: Tensor, rule: SamplingRule
    ) -> Drawn:
        """Advance the last chunk, and draw a token for each slot as `drawing.draw` does."""
        columns, *kept = self._step(work, hidden, numbers, rule)
        batch = len(work.tokens)
        return columns[:, :batch], kept[0][:batch] if kept else None

    def _perform(
        self, work: Decode, hidden: Tensor | None, numbers: Tensor | None, rule: SamplingRule | None
    ) -> Output:
        output = self.decoder.run(work, hidden)
        if numbers is None or rule is None:
            return (output,)
        columns, kept = draw([self.decoder], [output], numbers, rule)
        return (columns,) if kept is None else (columns, kept)

    def _step(
        self, work: Decode, hidden: Tensor | None, numbers: Tensor | None, rule: SamplingRule | None
    ) -> Output:
        """Run the step, record it, or repeat its record."""
        cache = self.decoder.cache
        slots = min(round_up(len(work.tokens), SLOT_STEP), cache.num_slots)
        longest = min(round_up(work.longest, GRAPH_LENGTH_STEP), cache.max_tokens)
        kind = (slots, longest, rule)
        if kind in self._recorded:
            return self._repeat(self._recorded[kind], work, hidden, numbers)
        given = _filled_up(work, hidden, numbers, slots=slots, longest=longest)
        perform = partial(self._perform, *given, rule)
        if kind not in self._seen:
            # Libraries allocate what they need in a first, plain step.
            self._seen.add(kind)
            return perform()
        output, repeat = self._record(perform)
        self._recorded[kind] = _Recorded(*given, output, repeat)
        return self._repeat(self._recorded[kind], work, hidden, numbers)

    def _repeat(
        self, recorded: _Recorded, work: Decode, hidden: Tensor | None, numbers: Tensor | None
    ) -> Output:
        # Free slots get what was there before; see `_filled_up`.
        batch = len(work.tokens)
        recorded.work.tokens[:batch].copy_(work.tokens)
        recorded.work.positions[:batch].copy_(work.positions)
        if recorded.hidden is not None and hidden is not None:
            recorded.hidden[:, :batch].copy_(hidden)
        if recorded.numbers is not None and numbers is not None:
            recorded.numbers[:batch].copy_(numbers)
        recorded.repeat()
        # Another graph may write to the same memory while this result is still being sent.
        return tuple(part.clone() for part in recorded.output)


def _filled_up(
    work: Decode, hidden: Tensor | None, numbers: Tensor | None, *, slots: int, longest: int
) -> tuple[Decode, Tensor | None, Tensor | None]:
    """Copy what a step gets into tensors of its own, for so many slots.

    What the tokens of free slots leave in the cache is overwritten before it is read: by the slot's
    next prompt, or by the token that comes to stand there.
    """
    missing = slots - len(work.tokens)
    tokens, positions = F.pad(work.tokens, (0, 0, 0, missing)), F.pad(work.positions, (0, missing))
    return (
        Decode(tokens=tokens, positions=positions, longest=longest),
        None if hidden is None else F.pad(hidden, (0, 0, 0, missing)),
        None if numbers is None else F.pad(numbers, (0, missing)),
    )


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
