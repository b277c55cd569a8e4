"""What the runs of a study have come to: curves over seeds, paired with those of the baseline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from grid import Grid
from numpy.typing import NDArray
from runner import arm_runs, run_dir
from scipy.stats import ttest_rel

from marlhf_mega.report.run import Points, Stage, read_stage

Array = NDArray[np.float64]

GOLD, SCORE, KL = "eval/gold_mean", "eval/score_mean", "eval/kl"
EXPLAINED, SPREAD = "critic/explained_variance", "policy/advantage_std"
BESIDE = ("eval/response_tokens", EXPLAINED, SPREAD)
"""Columns of the CSV besides these three; absent where runs have no such metric."""
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of one arm."""

    name: str
    seeds: tuple[int, ...]
    steps: Array
    """[evals]."""
    curves: Mapping[str, Array]
    """Metric -> [seeds, evals], of the metrics that all runs have."""
    seconds: Array
    """[seeds, evals], of training until then."""
    has_own_jobs: bool = False
    """Whether its steps are those of another job than the baseline's."""

    @property
    def gold(self) -> Array:
        """[seeds, evals]."""
        return self.curves[GOLD]

    def of(self, seeds: Sequence[int]) -> "Arm":
        """Return some of the runs, in this order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        curves = {name: values[rows] for name, values in self.curves.items()}
        return replace(self, seeds=tuple(seeds), curves=curves, seconds=self.seconds[rows])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval over resampled seeds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm against the baseline, over the seeds that both have."""

    arm: str
    seeds: tuple[int, ...]
    final: Estimate
    """Gold reward at the end."""
    area: Estimate | None
    """Mean gold reward over the steps of the run. None where there is one evaluation, at the end,
    or where steps are those of another job."""
    kl: float
    """From the reference, at the end, in nats per response; NaN where it was not measured."""
    difference: Estimate | None
    """Gold reward at the end less the baseline's, same seeds. None for the baseline itself."""
    p_value: float | None
    """Of a paired t-test of these differences."""
    speed_up: Estimate | None
    """Steps of the baseline until its final gold reward, over those of this arm until the same. 0
    where the arm never gets there."""
    score_speed_up: Estimate | None
    """The same of the score that is trained on."""
    at_equal_kl: Estimate | None
    """Gold reward less the baseline's at half the KL of the baseline's end."""


def read_arms(grid: Grid, folder: Path) -> dict[str, Arm]:
    """Read the runs that are done, with these settings.

    Raises:
        ValueError: there is none of the baseline.
    """
    found = {}
    for name in grid.arms:
        stages = {
            seed: read_stage(run_dir(folder, name, seed))
            for seed in grid.seeds
            if arm_runs(grid, folder, arms=[name], seeds=[seed])[-1][-1].is_done
        }
        if stages:
            arm = _arm(name, stages)
            found[name] = replace(arm, has_own_jobs=grid.has_own_jobs(name))
    if grid.baseline not in found:
        raise ValueError(
            f"{folder}: must have a finished run of the baseline {grid.baseline}. Run it first."
        )
    return found


def _arm(name: str, stages: Mapping[int, Stage]) -> Arm:
    steps = sorted(set.intersection(*({s for s, _ in x.curves[GOLD]} for x in stages.values())))
    shared = set.intersection(*(set(x.curves) for x in stages.values()))
    wanted = [metric for metric in (GOLD, SCORE, KL, *BESIDE) if metric in shared]

    def at(points: Points) -> Array:
        known = np.array(points)
        return np.interp(steps, known[:, 0], known[:, 1])

    curves = {m: np.array([at(x.curves[m]) for x in stages.values()]) for m in wanted}
    seconds = np.array([_seconds(x, steps) for x in stages.values()])
    return Arm(
        name=name, seeds=tuple(stages), steps=np.array(steps), curves=curves, seconds=seconds
    )


def _seconds(stage: Stage, steps: Sequence[float]) -> Array:
    taken = np.array(stage.curves.get("time/step_seconds", ())).reshape(-1, 2)
    return np.array([taken[taken[:, 0] <= step, 1].sum() for step in steps])


def compare(arms: Mapping[str, Arm], baseline: str) -> list[Row]:
    """Compare every arm with the baseline."""
    return [_compare(arm, arms[baseline]) for arm in arms.values()]


def _compare(arm: Arm, base: Arm) -> Row:
    if arm is not base:
        seeds = [seed for seed in base.seeds if seed in arm.seeds]
        arm, base = arm.of(seeds), base.of(seeds)
    draws = resamples(len(arm.seeds))
    others = arm is not base
    ends, base_ends = arm.gold[:, -1], base.gold[:, -1]
    tested = others and len(arm.seeds) > 1
    steps_compare = not arm.has_own_jobs
    return Row(
        arm=arm.name,
        seeds=arm.seeds,
        final=estimate(lambda rows: ends[rows].mean(), draws),
        area=estimate(lambda rows: area(arm.steps, arm.gold[rows].mean(0)), draws)
        if steps_compare
        else None,
        kl=arm.curves[KL][:, -1].mean() if KL in arm.curves else np.nan,
        difference=estimate(lambda rows: (ends - base_ends)[rows].mean(), draws)
        if others
        else None,
        p_value=float(ttest_rel(ends, base_ends).pvalue) if tested else None,
        speed_up=estimate(lambda rows: speed_up(arm, base, rows), draws)
        if others and steps_compare
        else None,
        score_speed_up=estimate(lambda rows: speed_up(arm, base, rows, metric=SCORE), draws)
        if others and steps_compare and SCORE in arm.curves
        else None,
        at_equal_kl=estimate(lambda rows: at_equal_kl(arm, base, rows), draws)
        if others and steps_compare and KL in arm.curves
        else None,
    )


def resamples(num_seeds: int) -> NDArray[np.int64]:
    """[RESAMPLES, seeds] indices; the first row is the seeds themselves. Always the same."""
    drawn = np.random.default_rng(0).integers(num_seeds, size=(RESAMPLES, num_seeds))
    drawn[0] = np.arange(num_seeds)
    return drawn


def estimate(statistic: Callable[[NDArray[np.int64]], float], draws: NDArray[np.int64]) -> Estimate:
    """Return a statistic of the runs and its percentiles over the resampled seeds that have one."""
    # A handful of seeds has few different resamples.
    kinds, counts = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    values = np.array([statistic(rows) for rows in kinds])
    known = ~np.isnan(values)
    low, high = (
        np.quantile(np.repeat(values[known], counts[known]), [0.025, 0.975])
        if known.any()
        else (np.nan, np.nan)
    )
    return Estimate(value=float(statistic(draws[0])), low=float(low), high=float(high))


def area(steps: Array, gold: Array) -> float:
    """Return the mean of a curve [evals] over its steps."""
    return float(np.trapezoid(gold, steps) / (steps[-1] - steps[0]))


def steps_to(level: float, steps: Array, gold: Array) -> float:
    """Return where a curve [evals] first reaches a level, between evaluations too; inf if never."""
    reached = np.flatnonzero(gold >= level)
    if not len(reached):
        return np.inf
    after = reached[0]
    if after == 0:
        return float(steps[0])
    before = after - 1
    share = (level - gold[before]) / (gold[after] - gold[before])
    return float(steps[before] + share * (steps[after] - steps[before]))


def speed_up(arm: Arm, base: Arm, rows: NDArray[np.int64], *, metric: str = GOLD) -> float:
    """Return how many times sooner the mean curve of a metric reaches the end of the baseline's."""
    curve, base_curve = arm.curves[metric][rows].mean(0), base.curves[metric][rows].mean(0)
    level = base_curve[-1]
    needed = steps_to(level, arm.steps, curve)
    return steps_to(level, base.steps, base_curve) / needed if needed else np.nan


def at_equal_kl(arm: Arm, base: Arm, rows: NDArray[np.int64]) -> float:
    """Return the lead in gold reward where both have half of the baseline's final KL.

    NaN if the arm never has.
    """
    level = base.curves[KL][rows][:, -1].mean() / 2
    found = []
    for run in (arm, base):
        kl, gold = run.curves[KL][rows].mean(0), run.gold[rows].mean(0)
        first = steps_to(level, run.steps, kl)
        found.append(np.nan if np.isinf(first) else np.interp(first, run.steps, gold))
    return float(found[0] - found[1])


def table(arms: Mapping[str, Arm]) -> Iterator[dict[str, float | str]]:
    """Yield a row of the CSV for each evaluation of each run."""
    for arm in arms.values():
        for i, seed in enumerate(arm.seeds):
            for j, step in enumerate(arm.steps):
                measured = {name: values[i, j] for name, values in arm.curves.items()}
                yield {
                    "arm": arm.name,
                    "seed": seed,
                    "step": step,
                    "seconds": arm.seconds[i, j],
                } | measured
