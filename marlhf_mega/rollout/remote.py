"""Ranks that only generate, as the training ranks see them; `train.rollout_server` is their side.

Of each step a request comes first, with the weights, and then its answer; a training rank may do
other work in between. Both worlds make the same exchanges in the same order.
"""

from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.transport import Answer, End, LocalTransport, Moves, Request, move_metrics


class RemoteTransport:
    """The ranks that only generate, as the training ranks see them. All of these call it."""

    def __init__(self, resharder: Moves, mesh: Mesh) -> None:
        """Take what gives the others the weights, and this rank's mesh in training."""
        self._resharder, self._launch = resharder, mesh.launch
        self.num_ranks = mesh.launch.size - mesh.world_size
        self._first, self._seconds = mesh.world_size, 0.0

    def ask(self, request: Request) -> None:
        """Send a request and the weights as they are now; returns once they are there."""
        self._launch.broadcast(request, source=0)
        self._resharder.move()

    def answer(self) -> Answer:
        """Wait for the answer to the last request."""
        received: Answer = self._launch.broadcast(None, source=self._first)
        self._seconds = received.seconds
        return received

    def end(self, end: End) -> None:
        """Let the others go."""
        self._launch.broadcast(end, source=0)

    def metrics(self) -> dict[str, float]:
        """Return what moving the weights cost, and how long the others generated."""
        return {**move_metrics(self._resharder), "time/generation_seconds": self._seconds}


RolloutTransport = LocalTransport | RemoteTransport
"""Brings samples to the training ranks."""
