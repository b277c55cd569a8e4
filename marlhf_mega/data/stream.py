"""A resumable order of samples that does not depend on how many ranks read it."""

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.config.load import ConfigError

_WEIGHTED = 3
"""Keeps these draws apart from others of the same seed."""


class SampleStream:
    """An endless sequence of global batches of sample indices.

    Epoch `e` visits every sample once, in an order that is a function of (seed, e) alone; a batch
    may cross the end of an epoch. Every rank makes the same calls and gets the same indices, then
    takes its own slice, so the number of data parallel ranks may change between runs.

    Attributes:
        epoch: epoch of the next sample, from 0.
        offset: position of the next sample in that epoch.
        num_consumed: samples handed out so far.
    """

    def __init__(
        self, *, num_samples: int, batch_size: int, seed: int, shuffle: bool, data_hash: str
    ) -> None:
        """Start at the first sample.

        Args:
            num_samples: size of the data set, at least 1.
            batch_size: global number of samples per batch; may exceed `num_samples`.
            seed: fixes all orders.
            shuffle: False visits the samples in file order.
            data_hash: sha256 of the data, compared when a state is loaded.
        """
        assert num_samples > 0, "an empty data file is reported when it is read"
        assert batch_size > 0, "the config checks batch sizes"
        self._num_samples = num_samples
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

    def next_batch(self) -> Tensor:
        """Return the next [batch_size] int64 global sample indices and move on."""
        parts, missing = [], self._batch_size
        while missing > 0:
            part = self._epoch_order(self.epoch)[self.offset : self.offset + missing]
            parts.append(part)
            missing -= len(part)
            self.num_consumed += len(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the next unseen sample."""
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
        """Go on where `state` was taken; the batch size may differ.

        Raises:
            ConfigError: when the data or its order is not what it was.
            RuntimeError: when the state contradicts itself.
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
        if not self._shuffle:
            return torch.arange(self._num_samples)
        # SeedSequence mixes the two numbers: (0, 1) and (1, 0) give unrelated orders.
        generator = numpy.random.Generator(
            numpy.random.PCG64(numpy.random.SeedSequence((self._seed, epoch)))
        )
        return torch.from_numpy(generator.permutation(self._num_samples))


class WeightedStream:
    """An endless sequence of global batches, drawn with replacement by given probabilities.

    Draw number k is a function of (seed, k) alone. Same interface as `SampleStream`.

    Attributes:
        num_consumed: samples handed out so far.
    """

    def __init__(
        self, probabilities: Tensor, *, batch_size: int, seed: int, data_hash: str
    ) -> None:
        """Start at the first draw.

        Args:
            probabilities: [num_samples], adding up to 1.
            batch_size: global number of samples per batch.
            seed: of the run.
            data_hash: sha256 of the data, compared when a state is loaded.
        """
        self._last = int(probabilities.nonzero().max())
        self._cumulated = probabilities.double().cumsum(0)
        self._batch_size = batch_size
        self._seed = seed
        self._facts = {"seed": seed, "data_hash": data_hash, "num_samples": len(probabilities)}
        self.num_consumed = 0

    def next_batch(self) -> Tensor:
        """Return the next [batch_size] int64 global sample indices and move on."""
        numbers = torch.arange(self.num_consumed, self.num_consumed + self._batch_size)
        draws = uniform(fold(self._seed, _WEIGHTED, numbers))
        self.num_consumed += self._batch_size
        # Rounding may leave the sum a little below 1.
        return torch.searchsorted(self._cumulated, draws, right=True).clamp(max=self._last)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the next draw."""
        return {**self._facts, "num_consumed": self.num_consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ConfigError: when the data is not what it was.
        """
        for name, current in self._facts.items():
            if state[name] != current:
                raise ConfigError(
                    f"data.{name}={current}: must be as in the checkpoint, {state[name]}. Use the "
                    "same data and seed, or start a new run."
                )
        self.num_consumed = state["num_consumed"]
