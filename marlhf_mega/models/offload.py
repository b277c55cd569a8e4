"""Weights and optimizer state that are offloaded to the host between the phases that use them.

Offloading resizes a tensor's storage to zero and later back, at another address. Tensors keep
referring to their storage, so views, such as the parameters that Megatron cuts out of one buffer,
stay valid.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from marlhf_mega.config.sections.hardware import MemoryConfig
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.shared_base import unshared_parameters
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.platform.device import Platform
from marlhf_mega.platform.host_memory import HostBuffer, host_buffer

Part = Literal["reference", "rewards", "critic", "policy_optimizer", "critic_optimizer"]
TRAINING: tuple[Part, ...] = ("critic", "policy_optimizer", "critic_optimizer")
"""What an update changes, a checkpoint saves and an export reads, besides the policy's weights."""


class Offloaded:
    """Tensors that are on the device only while they are held there."""

    def __init__(
        self,
        kept: Callable[[], Iterable[Tensor]],
        platform: Platform,
        folder: Path,
        *,
        dropped: Callable[[], Iterable[Tensor]] = tuple,
        constant: bool = False,
    ) -> None:
        """Start with the tensors on the device, held once.

        Args:
            kept: returns the tensors whose values are kept; called whenever they are offloaded.
            platform: this process's platform.
            folder: for files, see `host_buffer`.
            dropped: returns the tensors that come back as zeros.
            constant: the values never change, so they are copied to the host only once.
        """
        self._kept, self._dropped = kept, dropped
        self._platform, self._folder, self._constant = platform, folder, constant
        self._buffer: HostBuffer | None = None
        self._capacity = 0
        self._offloaded: list[tuple[torch.UntypedStorage, int, int | None]] = []
        """Storage, bytes, and where they start in the buffer; None: they come back as zeros."""
        self._holders = 1

    @property
    def num_bytes(self) -> int:
        """Bytes that are offloaded now."""
        return sum(size for _, size, _ in self._offloaded)

    def hold(self) -> None:
        """Load the tensors unless they are held already; call `release` once for every `hold`."""
        self._holders += 1
        if self._holders > 1:
            return
        for storage, size, start in self._offloaded:
            storage.resize_(size)
            if start is None:
                _bytes(storage).zero_()
            else:
                assert self._buffer is not None
                self._buffer.read(start, _bytes(storage))
        self._offloaded = []

    def release(self) -> None:
        """Stop holding the tensors; they are offloaded when nobody holds them any more."""
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
            self._offloaded.append((storage, storage.size(), start))
            start += storage.size()
        self._offloaded += [(storage, storage.size(), None) for storage in dropped]
        for storage, _, _ in self._offloaded:
            storage.resize_(0)
        self._platform.empty_cache()


class Offload:
    """The parts of the PPO models that are offloaded; any other part stays on the device."""

    def __init__(
        self,
        parts: Mapping[Part, Offloaded] | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the parts, all on the device, and the platform's `synchronize` for timing."""
        self._parts = dict(parts or {})
        self._synchronize = synchronize
        self._seconds = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is offloaded at all."""
        return bool(self._parts)

    def start(self) -> None:
        """Offload every part until a phase asks for it."""
        for part in self._parts.values():
            self._timed(part.release)

    def end(self) -> None:
        """Load every part for good."""
        for part in self._parts.values():
            self._timed(part.hold)

    @contextmanager
    def on_device(self, *names: Part) -> Iterator[None]:
        """Hold these parts on the device for the length of a `with` block; blocks may nest."""
        with ExitStack() as stack:
            for part in (self._parts[name] for name in names if name in self._parts):
                self._timed(part.hold)
                stack.callback(self._timed, part.release)
            yield

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank that are offloaded now."""
        return sum(part.num_bytes for part in self._parts.values())

    def drain_seconds(self) -> float:
        """Return the seconds spent on offloading and loading since the last call."""
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
    critic: TrainState | None,
    reference: Sequence[StageModel] | None,
    rewards: Sequence[Sequence[StageModel]],
) -> Offload:
    """Choose what is offloaded between phases; nothing is before `Offload.start`.

    Args:
        memory: its `offload_*` keys.
        platform: this process's platform.
        folder: for files, see `host_buffer`.
        policy: only its optimizer state is offloaded, since every phase needs the weights.
        critic: not used during rollout; None without one.
        reference: used for its log-probs only; None without one.
        rewards: used for the scores only.
    """
    parts: dict[Part, Offloaded] = {}

    def weights(chunks: Sequence[torch.nn.Module]) -> Callable[[], list[Tensor]]:
        found = unshared_parameters(chunks, policy.chunks)  # a base that they share stays
        return lambda: found

    if memory.offload_idle:
        every_reward = [chunk for chunks in rewards for chunk in chunks]
        if reference is not None:
            parts["reference"] = Offloaded(weights(reference), platform, folder, constant=True)
        parts["rewards"] = Offloaded(weights(every_reward), platform, folder, constant=True)
        if critic is not None:
            parts["critic"] = Offloaded(weights(critic.chunks), platform, folder)
    if memory.offload_optimizer:
        learners: dict[Part, TrainState | None] = {
            "policy_optimizer": policy,
            "critic_optimizer": critic,
        }
        for name, state in learners.items():
            if state is not None:
                parts[name] = Offloaded(
                    state.optimizer_tensors, platform, folder, dropped=state.gradient_buffers
                )
    return Offload(parts, platform.synchronize)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the tensors' storages, each once."""
    found = {s._cdata: s for s in (t.untyped_storage() for t in tensors) if s.size()}
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as a uint8 vector."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
