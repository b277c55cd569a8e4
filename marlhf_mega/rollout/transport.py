"""How a PPO step's samples reach the training ranks: asked for first, collected later."""

import base64
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.assignment import own_samples, select
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import Rollout, RolloutOptions


@dataclass(frozen=True, kw_only=True)
class Request:
    """The samples of one step."""

    step: int
    prompts: list[list[int]]
    """Token ids of every sample, in the order of their global index."""
    first: int = 0
    """Global index of the first one: so many samples of the step were asked for before."""


@dataclass(frozen=True, kw_only=True)
class End:
    """There will be no more requests."""

    code: int
    """The exit code of all ranks."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated for a request."""

    parts: Sequence[Rollout]
    """Rollouts that hold at least the samples that this rank trains on."""
    seconds: float
    """That generating took."""

    def state_dict(self) -> dict[str, Any]:
        """Return all samples for a checkpoint, as JSON.

        A float32 is exact in JSON, which writes all digits of a double.
        """
        samples = range(sum(len(part.responses) for part in self.parts))
        rollout = select(self.parts, samples, torch.device("cpu"))
        state = {
            "responses": rollout.responses,
            "finished": rollout.finished,
            "seconds": self.seconds,
        }
        for name in ("logprobs", "full_logprobs"):
            if (grid := getattr(rollout, name)) is not None:
                rows = zip(grid, rollout.responses, strict=True)
                state[name] = [row[: len(response)].tolist() for row, response in rows]
        for name in ("kept", "routing"):
            if (recorded := getattr(rollout, name)) is not None:
                state[name] = _encode(recorded)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prompts: list[list[int]]) -> Self:
        """Read what `state_dict` returned; the prompts' token ids are not in it."""
        grids = {
            name: pad_sequence([torch.tensor(row) for row in state[name]], batch_first=True)
            for name in ("logprobs", "full_logprobs")
            if name in state
        }
        recorded = {name: _decode(state[name]) for name in ("kept", "routing") if name in state}
        rollout = Rollout(
            prompts=prompts,
            responses=state["responses"],
            finished=state["finished"],
            sample_indices=list(range(len(prompts))),
            **recorded,
            **grids,
        )
        return cls(parts=[rollout], seconds=state["seconds"])


def _encode(recorded: Tensor) -> dict[str, Any]:
    """Return what is replayed as text: it is many numbers, most of them alike."""
    packed = zlib.compress(recorded.contiguous().view(torch.uint8).numpy().tobytes())
    name = str(recorded.dtype).removeprefix("torch.")
    return {"dtype": name, "shape": [*recorded.shape], "zlib": base64.b64encode(packed).decode()}


def _decode(state: Mapping[str, Any]) -> Tensor:
    packed = zlib.decompress(base64.b64decode(state["zlib"]))
    flat = torch.frombuffer(bytearray(packed), dtype=getattr(torch, state["dtype"]))
    return flat.view(state["shape"])


class Moves(Protocol):
    """What moves weights to those that generate."""

    seconds: float
    """Duration of the last move on this rank."""
    total_bytes: int
    """Bytes that all ranks together send in one move."""

    def move(self) -> None:
        """Bring the weights as they are now."""


class LocalTransport:
    """The training ranks generate themselves, each replica the samples that it trains on.

    All of them call each method, in the same order: `ask`, then `answer`, and `end` at last.
    """

    def __init__(
        self,
        generator: ResponseGenerator,
        config: Config,
        mesh: Mesh,
        *,
        resharder: Moves | None = None,
    ) -> None:
        """Take what generates.

        Args:
            generator: takes the prompts of a training replica.
            config: of the run.
            mesh: this rank's mesh in training.
            resharder: moves the weights to what generates; None where those that train do.
        """
        self._generator, self._config, self._resharder = generator, config, resharder
        self._mesh = mesh
        self.num_ranks = mesh.world_size
        """Ranks that generate."""

    def ask(self, request: Request) -> None:
        """Note the request: it is answered when it is waited for."""
        self._request = request

    def answer(self) -> Answer:
        """Generate this replica's samples."""
        request, start = self._request, time.perf_counter()
        count, first = len(request.prompts), request.first
        own = own_samples(self._config, self._mesh, count, first=first)
        prompts = [request.prompts[i - first] for i in own]
        options = RolloutOptions.of(self._config, step=request.step, for_training=True, masked=True)
        rollout = self._generator.generate(prompts, own, options)
        return Answer(parts=[rollout], seconds=time.perf_counter() - start)

    def end(self, end: End) -> None:
        """Nobody else waits."""

    def metrics(self) -> dict[str, float]:
        """Return what moving the weights cost, if they move."""
        return {} if self._resharder is None else move_metrics(self._resharder)


def move_metrics(resharder: Moves) -> dict[str, float]:
    """Return seconds and bytes of the last move of weights."""
    return {
        "time/reshard_seconds": resharder.seconds,
        "rollout/reshard_gib": resharder.total_bytes / 2**30,
    }
