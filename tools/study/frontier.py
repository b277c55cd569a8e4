"""Gold reward over KL of methods that ran at several weights of the KL, and their distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from results import KL, Arm, Array, Estimate, estimate, resamples, steps_to


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The ends of one method's arms, by their KL from the reference."""

    name: str
    kl: Array
    """[arms], means over seeds, ascending."""
    gold: Array
    """[arms], likewise."""
    lead: Estimate | None
    """Gold reward less that of the first frontier at equal KL, its mean over the KL that both have.
    None for the first itself."""
    speed_ups: Mapping[str, Estimate]
    """Arm of the first frontier -> its steps until its final gold reward over those until the same
    at its KL; NaN where that is beyond this frontier. Nothing for the first itself."""


def frontiers(arms: Mapping[str, Arm], families: Mapping[str, Sequence[str]]) -> list[Frontier]:
    """Compare the frontiers of those arms that are there, over the seeds that all of them have."""
    there = {name: arm for name, arm in arms.items() if KL in arm.curves}
    known = {
        name: [there[arm] for arm in family if arm in there] for name, family in families.items()
    }
    known = {name: family for name, family in known.items() if family}
    members = [arm for family in known.values() for arm in family]
    if not members:
        return []
    seeds = sorted(set.intersection(*(set(arm.seeds) for arm in members)))
    draws = resamples(len(seeds))
    found: list[Frontier] = []
    first: list[Arm] = []
    for name, family in known.items():
        cut = [arm.of(seeds) for arm in family]
        first = first or cut
        kl, gold = _frontier(cut, draws[0])
        lead, speed_ups = None, {}
        if cut is not first:
            lead = estimate(partial(frontier_lead, cut, first), draws)
            speed_ups = {
                arm.name: estimate(partial(speed_up_at_equal_kl, cut, arm), draws) for arm in first
            }
        found.append(Frontier(name=name, kl=kl, gold=gold, lead=lead, speed_ups=speed_ups))
    return found


def frontier_lead(arms: Sequence[Arm], base: Sequence[Arm], rows: NDArray[np.int64]) -> float:
    """Return the mean difference of two frontiers over the KL that both have; NaN if none."""
    (kl, gold), (base_kl, base_gold) = _frontier(arms, rows), _frontier(base, rows)
    low, high = max(kl[0], base_kl[0]), min(kl[-1], base_kl[-1])
    if low >= high:
        return np.nan
    levels = np.linspace(low, high, 101)
    return float((np.interp(levels, kl, gold) - np.interp(levels, base_kl, base_gold)).mean())


def speed_up_at_equal_kl(arms: Sequence[Arm], base: Arm, rows: NDArray[np.int64]) -> float:
    """Return how many times sooner than an arm its final gold reward is reached with its KL.

    The curve with that KL is the mixture of the two whose final KL are below and above it; NaN if
    there are none.
    """
    kl = np.array([arm.curves[KL][rows][:, -1].mean() for arm in arms])
    wanted = base.curves[KL][rows][:, -1].mean()
    if not kl.min() <= wanted <= kl.max():
        return np.nan
    order = np.argsort(kl)
    curves = np.array([arms[i].gold[rows].mean(0) for i in order])  # [arms, evals]
    mixed = np.array([np.interp(wanted, kl[order], column) for column in curves.T])
    base_curve = base.gold[rows].mean(0)
    needed = steps_to(base_curve[-1], arms[0].steps, mixed)
    return steps_to(base_curve[-1], base.steps, base_curve) / needed if needed else np.nan


def _frontier(arms: Sequence[Arm], rows: NDArray[np.int64]) -> tuple[Array, Array]:
    kl = np.array([arm.curves[KL][rows][:, -1].mean() for arm in arms])
    gold = np.array([arm.gold[rows][:, -1].mean() for arm in arms])
    order = np.argsort(kl)
    return kl[order], gold[order]
