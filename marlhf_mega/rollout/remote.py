"""Rollouts of ranks that only generate: what the training ranks ask them for, and their answers.

Of each step a request comes first, with the weights, and then its answer; a training rank may do
other work in between. Both worlds make the same exchanges in the same order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.transfer import Mover
from marlhf_mega.rollout.deal import gather_rollouts
from marlhf_mega.rollout.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Request:
    """The samples of one step."""

    step: int
    prompts: list[list[int]]
    """Token ids of every sample, in the order of their global index."""


@dataclass(frozen=True, kw_only=True)
class End:
    """There will be no more requests."""

    code: int
    """The exit code of all ranks."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a request."""

    parts: list[Rollout]
    """Of every replica; all samples together."""
    seconds: float
    """That generating took."""


class RemoteGenerator:
    """The ranks that only generate, as the training ranks see them. All of these call it."""

    def __init__(self, mover: Mover, mesh: Mesh) -> None:
        """Take what gives the others the weights, and this rank's place in training."""
        self.mover, self._launch = mover, mesh.launch
        self.num_ranks = mesh.launch.size - mesh.world_size
        self._first = mesh.world_size

    def ask(self, request: Request) -> None:
        """Send a request and the weights as they are now; returns once they are there."""
        self._launch.broadcast(request, source=0)
        self.mover.move()

    def answer(self) -> Answer:
        """Wait for the answer to the last request."""
        received: Answer = self._launch.broadcast(None, source=self._first)
        return received

    def end(self, end: End) -> None:
        """Let the others go."""
        self._launch.broadcast(end, source=0)


def serve(
    mover: Mover,
    mesh: Mesh,
    generate: Callable[[Request, Sequence[int]], Rollout],
    *,
    enter: Callable[[int | None], None],
) -> End:
    """Answer requests until they end. All ranks that only generate call it.

    Args:
        mover: brings the weights.
        mesh: of these ranks.
        generate: answers some samples of a request, by their global index.
        enter: is told the step that begins to be generated; none: waiting begins.
    """
    launch = mesh.launch
    first = launch.size - mesh.world_size
    while True:
        enter(None)
        request: Request | End = launch.broadcast(None, source=0)
        if isinstance(request, End):
            return request
        enter(request.step)
        mover.move()
        start = time.perf_counter()
        own = range(mesh.dp_rank, len(request.prompts), mesh.dp_size)
        parts = gather_rollouts(generate(request, own), mesh)
        answer = Answer(parts=parts, seconds=time.perf_counter() - start)
        enter(None)
        launch.broadcast(answer if mesh.rank == 0 else None, source=first)
