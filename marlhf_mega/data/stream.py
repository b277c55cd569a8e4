"""Resumable orders of samples that do not depend on the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.config.load import ConfigError

_WEIGHTED = 3
"""Separates these draws from others with the same seed."""


@dataclass(frozen=True)
class SourcePart:
    """Consecutive samples that are visited equally often."""

    num_samples: int
    weight: float = 1.0
    """Visits of each of them in one epoch."""

    @property
    def num_draws(self) -> int:
        """Visits of all of them in one epoch."""
        return max(1, round(self.num_samples * self.weight))


def epoch_size(parts: Sequence[SourcePart]) -> int:
    """Return the number of visits in one epoch."""
    return sum(part.num_draws for part in parts)


class SampleStream:
    """An endless sequence of global batches of sample indices.

    An epoch visits every part as often as its weight says: with a whole number every sample that
    often, with a fraction the next samples of the part's own endless sequence of passes, so that
    each is visited before any is again. All visits of epoch `e` are in one order that is a function
    of (seed, e) only; a batch may cross the end of an epoch. Every rank makes the same calls, gets
    the same indices and takes its own slice, so the number of data-parallel ranks may change when a
    run resumes.

    Attributes:
        epoch: epoch of the next sample, from 0.
        offset: position of the next sample in that epoch.
        num_consumed: samples returned so far.
    """

    def __init__(
        self,
        parts: Sequence[SourcePart],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        data_hash: str,
    ) -> None:
        """Start at the first sample.

        Args:
            parts: of the data, in the order of its indices, each with at least one sample.
            batch_size: samples per batch, over all ranks; may exceed an epoch.
            seed: determines all orders.
            shuffle: False visits the samples in file order.
            data_hash: sha256 of the data, compared when a state is loaded.
        """
        assert all(part.num_samples for part in parts), "an empty file is reported when it is read"
        assert batch_size > 0, "the config checks batch sizes"
        self._parts = tuple(parts)
        self._num_samples = epoch_size(parts)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._data_hash = data_hash
        self.num_consumed = 0
        self._order_epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self.num_consumed // self._num_samples

    @property
    def offset(self) -> int:
        """Position of the next sample in its epoch."""
        return self.num_consumed % self._num_samples

    def next_batch(self, size: int | None = None) -> Tensor:
        """Return the indices of the next batch, [batch_size] or [size] int64, and advance."""
        parts, missing = [], self._batch_size if size is None else size
        while missing > 0:
            part = self._epoch_order(self.epoch)[self.offset : self.offset + missing]
            parts.append(part)
            missing -= len(part)
            self.num_consumed += len(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to resume with the next unseen sample."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_samples": self._num_samples,
            "data_hash": self._data_hash,
            "epoch": self.epoch,
            "offset": self.offset,
            "num_consumed": self.num_consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; the batch size may differ.

        Raises:
            ConfigError: the data or its order has changed.
            RuntimeError: the state contradicts itself.
        """
        rules = {
            "data_hash": (self._data_hash, "the data file changed since the checkpoint"),
            "num_samples": (self._num_samples, "the number of samples changed"),
            "seed": (self._seed, "the order of the samples changed"),
            "shuffle": (self._shuffle, "the order of the samples changed"),
        }
        for name, (current, consequence) in rules.items():
            if state[name] != current:
                raise ConfigError(
                    f"data.{name}={current}: must be as in the checkpoint, {state[name]}; "
                    f"{consequence}. Use the same data and seed, or start a new run."
                )
        expected = state["epoch"] * self._num_samples + state["offset"]
        if state["num_consumed"] != expected or not 0 <= state["offset"] < self._num_samples:
            raise RuntimeError(
                f"data.num_consumed={state['num_consumed']}: must be epoch * num_samples + offset "
                f"= {expected}; the checkpoint contradicts itself. Use an earlier checkpoint."
            )
        self.num_consumed = state["num_consumed"]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._order_epoch:
            self._order = self._make_order(epoch)
            self._order_epoch = epoch
        return self._order

    def _make_order(self, epoch: int) -> Tensor:
        first, found = 0, []
        for number, part in enumerate(self._parts):
            found.append(first + self._visits(number, epoch))
            first += part.num_samples
        visits = torch.cat(found)
        return visits[_permutation(len(visits), self._seed, epoch)] if self._shuffle else visits

    def _visits(self, number: int, epoch: int) -> Tensor:
        """Return which samples of a part an epoch visits, counted from the part's first."""
        size, count = self._parts[number].num_samples, self._parts[number].num_draws
        start, stop = epoch * count, (epoch + 1) * count
        # The order inside of whole passes does not matter.
        shuffles = self._shuffle and count % size != 0
        passes = [
            _permutation(size, self._seed, index, number + 1) if shuffles else torch.arange(size)
            for index in range(start // size, -(-stop // size))
        ]
        return torch.cat(passes)[start % size :][:count]


def _permutation(size: int, *seeds: int) -> Tensor:
    # SeedSequence mixes the numbers: (0, 1) and (1, 0) give unrelated orders.
    generator = numpy.random.Generator(numpy.random.PCG64(numpy.random.SeedSequence(seeds)))
    return torch.from_numpy(generator.permutation(size))


class WeightedStream:
    """An endless sequence of global batches, drawn with replacement by given probabilities.

    Draw number k is a function of (seed, k) only. Same interface as `SampleStream`.

    Attributes:
        num_consumed: samples returned so far.
    """

    def __init__(
        self, probabilities: Tensor, *, batch_size: int, seed: int, data_hash: str
    ) -> None:
        """Start at the first draw.

        Args:
            probabilities: [num_samples], adding up to 1.
            batch_size: samples per batch, over all ranks.
            seed: determines all draws.
            data_hash: sha256 of the data, compared when a state is loaded.
        """
        self._last = int(probabilities.nonzero().max())
        self._cumulated = probabilities.double().cumsum(0)
        self._batch_size = batch_size
        self._seed = seed
        self._facts = {"seed": seed, "data_hash": data_hash, "num_samples": len(probabilities)}
        self.num_consumed = 0

    def next_batch(self) -> Tensor:
        """Return the indices of the next batch, [batch_size] int64, and advance."""
        numbers = torch.arange(self.num_consumed, self.num_consumed + self._batch_size)
        draws = uniform(fold(self._seed, _WEIGHTED, numbers))
        self.num_consumed += self._batch_size
        # Rounding may leave the sum a little below 1.
        return torch.searchsorted(self._cumulated, draws, right=True).clamp(max=self._last)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to resume with the next draw."""
        return {**self._facts, "num_consumed": self.num_consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`.

        Raises:
            ConfigError: the data has changed.
        """
        for name, current in self._facts.items():
            if state[name] != current:
                raise ConfigError(
                    f"data.{name}={current}: must be as in the checkpoint, {state[name]}. Use the "
                    "same data and seed, or start a new run."
                )
        self.num_consumed = state["num_consumed"]
