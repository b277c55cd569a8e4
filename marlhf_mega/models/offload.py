"""Weights and optimizer state that leave the device between the phases that use them.

A tensor's storage gives its memory back and gets it again at another address, so every view of it,
such as the parameters that Megatron cuts out of one buffer, stays what it was.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from marlhf_mega.config.schema import MemoryConfig
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.platform.device import Platform
from marlhf_mega.platform.host_memory import HostBuffer, host_buffer

Part = Literal["reference", "rewards", "critic", "policy_optimizer", "critic_optimizer"]
TRAINING: tuple[Part, ...] = ("critic", "policy_optimizer", "critic_optimizer")
"""What an update changes, a checkpoint saves and an export reads, beside the policy's weights."""


class Parked:
    """Tensors that are on the device only while someone holds them there."""

    def __init__(
        self,
        kept: Callable[[], Iterable[Tensor]],
        platform: Platform,
        folder: Path,
        *,
        dropped: Callable[[], Iterable[Tensor]] = tuple,
        constant: bool = False,
    ) -> None:
        """Leave the tensors where they are until `park`.

        Args:
            kept: the tensors whose values count, asked for at every `park`.
            platform: of this process.
            folder: for files, see `host_buffer`.
            dropped: tensors that come back as zeros.
            constant: the values never change, so they are copied out once.
        """
        self._kept, self._dropped = kept, dropped
        self._platform, self._folder, self._constant = platform, folder, constant
        self._buffer: HostBuffer | None = None
        self._capacity = 0
        self._away: list[tuple[torch.UntypedStorage, int, int | None]] = []
        self._holders = 1

    @property
    def num_bytes(self) -> int:
        """Bytes that are off the device now."""
        return sum(size for _, size, _ in self._away)

    def hold(self) -> None:
        """Have the tensors on the device until `park` is called as often."""
        self._holders += 1
        if self._holders > 1:
            return
        for storage, size, start in self._away:
            storage.resize_(size)
            if start is None:
                _bytes(storage).zero_()
            else:
                assert self._buffer is not None
                self._buffer.read(start, _bytes(storage))
        self._away = []

    def park(self) -> None:
        """Let go of the tensors; the last one to do so sends them away."""
        self._holders -= 1
        if self._holders:
            return
        kept, dropped = _storages(self._kept()), _storages(self._dropped())
        total = sum(storage.size() for storage in kept)
        fresh = total > self._capacity
        if fresh:
            self._buffer = host_buffer(total, self._platform, self._folder)
            self._capacity = total
        start = 0
        for storage in kept:
            assert self._buffer is not None
            if fresh or not self._constant:
                self._buffer.write(start, _bytes(storage))
            self._away.append((storage, storage.size(), start))
            start += storage.size()
        self._away += [(storage, storage.size(), None) for storage in dropped]
        for storage, _, _ in self._away:
            storage.resize_(0)
        self._platform.empty_cache()


class Offload:
    """The parts of ppo's models that wait on the host; a part it does not have never leaves."""

    def __init__(
        self,
        parts: Mapping[Part, Parked] | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the parts, all on the device, and the platform's `synchronize` for the clock."""
        self._parts = dict(parts or {})
        self._synchronize = synchronize
        self._seconds = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything leaves the device."""
        return bool(self._parts)

    def start(self) -> None:
        """Send everything away that no phase holds yet."""
        for part in self._parts.values():
            self._timed(part.park)

    def end(self) -> None:
        """Have everything on the device for good."""
        for part in self._parts.values():
            self._timed(part.hold)

    @contextmanager
    def present(self, *names: Part) -> Iterator[None]:
        """Have these parts on the device for the length of a `with` block; blocks may nest."""
        with ExitStack() as stack:
            for part in (self._parts[name] for name in names if name in self._parts):
                self._timed(part.hold)
                stack.callback(self._timed, part.park)
            yield

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank that are off the device now."""
        return sum(part.num_bytes for part in self._parts.values())

    def drain_seconds(self) -> float:
        """Return the seconds spent on moving since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, act: Callable[[], None]) -> None:
        self._synchronize()
        start = time.perf_counter()
        act()
        self._synchronize()
        self._seconds += time.perf_counter() - start


def create_offload(
    memory: MemoryConfig,
    platform: Platform,
    folder: Path,
    *,
    policy: TrainState,
    critic: TrainState,
    reference: Sequence[StageModel],
    rewards: Sequence[Sequence[StageModel]],
) -> Offload:
    """Say what leaves the device between phases; nothing does so before `Offload.start`.

    Args:
        memory: what is asked for.
        platform: of this process.
        folder: for files, see `host_buffer`.
        policy: its weights stay: every phase needs them.
        critic: rests during rollout.
        reference: rests but for its log-probs.
        rewards: rest but for the scores.
    """
    parts: dict[Part, Parked] = {}

    def weights(chunks: Iterable[torch.nn.Module]) -> Callable[[], list[Tensor]]:
        found = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
        return lambda: found

    if memory.offload_idle:
        every_reward = [chunk for chunks in rewards for chunk in chunks]
        parts["reference"] = Parked(weights(reference), platform, folder, constant=True)
        parts["rewards"] = Parked(weights(every_reward), platform, folder, constant=True)
        parts["critic"] = Parked(weights(critic.chunks), platform, folder)
    if memory.offload_optimizer:
        for name, state in (("policy_optimizer", policy), ("critic_optimizer", critic)):
            parts[name] = Parked(  # type: ignore[index]
                state.optimizer_tensors, platform, folder, dropped=state.gradient_buffers
            )
    return Offload(parts, platform.synchronize)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return what holds the tensors' memory, each piece once."""
    found = {s._cdata: s for s in (t.untyped_storage() for t in tensors) if s.size()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as a vector of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
