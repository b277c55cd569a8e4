"""Preference pairs beside other pairs of the same user, which tell what that user prefers."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from marlhf_mega.data.datasets import PreferencePair


class InContext(Sequence[PreferencePair]):
    """Pairs with their `context`, which is a function of the seed and of the pair's number."""

    def __init__(self, pairs: Sequence[PreferencePair], *, size: int, seed: int, key: str) -> None:
        """Find the pairs of each user.

        Args:
            pairs: as read.
            size: most pairs of a context.
            seed: of the run.
            key: that names the data.

        Raises:
            ValueError: a pair has no user, or a user no other pair.
        """
        self._pairs, self._size, self._seed = pairs, size, seed
        self._of_user: dict[str, list[int]] = {}
        for number, pair in enumerate(pairs):
            self._of_user.setdefault(pair.user, []).append(number)
        alone = next((user for user, own in self._of_user.items() if len(own) < 2), None)
        if nobody := len(self._of_user.get("", ())):
            raise ValueError(
                f"{key}: pairs for reward_model.latent_size must say whose preference they are; "
                f"{nobody} of {len(pairs)} do not. Add the field user, or say which field it is: "
                "data.fields.user=FIELD"
            )
        if alone is not None:
            raise ValueError(
                f"{key}: users must have two pairs or more for reward_model.latent_size, which "
                f"reads their other ones; {alone} has one. Leave that pair out, or add others."
            )

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """Return a pair with its context."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = self._pairs[index]
        number = index % len(self)
        own = self._of_user[pair.user]
        place, others = bisect_left(own, number), len(own) - 1
        draw = random.Random(f"{self._seed}-{number}")
        chosen = sorted(draw.sample(range(others), min(self._size, others)))
        context = [own[other + (other >= place)] for other in chosen]
        return replace(
            pair,
            number=number,
            context=[replace(self._pairs[i], number=i) for i in context],
        )
