"""Labels of preference pairs that move towards what the reward model says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from marlhf_mega.algorithm.reward_models import smooth_labels
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.metrics.held_out import interleave
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh

_BLOCK = 4096
"""Pairs that one replica lays out at a time."""


class MovingLabels(Sequence[PreferencePair]):
    """Training pairs with their current soft labels, one for each pair, equal on all ranks."""

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        score: Callable[[TrainState, Sequence[PreferencePair]], Tensor],
        mesh: Mesh,
        *,
        rate: float,
    ) -> None:
        """Start with the labels of the data.

        Args:
            pairs: as read.
            score: of a replica's pairs, [chosen and rejected, pairs].
            mesh: this rank's mesh.
            rate: of `smooth_labels`.
        """
        self._pairs, self._score, self._mesh, self._rate = pairs, score, mesh, rate
        self._epoch = 0
        labels = [pair.chosen_probability for pair in pairs]
        self._labels = torch.tensor(labels, dtype=torch.float64)

    def enter(self, epoch: int, state: TrainState) -> None:
        """Move all labels if a new epoch begins, by the model as it is. All ranks call it."""
        if epoch == self._epoch:
            return
        mesh, leads = self._mesh, list[float]()
        for start in range(0, len(self), _BLOCK * mesh.dp_size):
            block = range(start, min(start + _BLOCK * mesh.dp_size, len(self)))
            own = [self._pairs[i] for i in block[mesh.dp_rank :: mesh.dp_size]]
            chosen, rejected = self._score(state, own)
            leads += interleave(gather_objects((chosen - rejected).tolist(), mesh.groups.dp))
        found = torch.tensor(leads, dtype=torch.float64)
        self._labels = smooth_labels(self._labels, found, rate=self._rate)
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the labels and the epoch that they belong to."""
        return {"epoch": self._epoch, "chosen_probability": self._labels.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with labels of the same pairs."""
        self._epoch = state["epoch"]
        self._labels = torch.tensor(state["chosen_probability"], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """Return a pair with its current label."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        label = self._labels[index].item()
        return replace(self._pairs[index], chosen_probability=label)
