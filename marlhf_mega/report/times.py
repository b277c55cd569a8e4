"""Where the seconds of a run went: the phases of its steps, and what lies between the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marlhf_mega.metrics.timing import BETWEEN_STEPS, PHASES
from marlhf_mega.report.run import Points

STEP = "time/step_seconds"


@dataclass(frozen=True)
class StepTimes:
    """Seconds by phase. In every step the phases add up to `time/step_seconds`."""

    steps: Sequence[float]
    phases: Mapping[str, Sequence[float]]
    """phase -> seconds in each step; `other` is what no phase has timed."""
    between: Mapping[str, float]
    """phase outside of the steps -> seconds in all."""

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase in all steps."""
        return {phase: sum(values) for phase, values in self.phases.items()}

    @property
    def total(self) -> float:
        """The seconds of all steps."""
        return sum(self.seconds.values())


def step_times(curves: Mapping[str, Points]) -> StepTimes | None:
    """Split the time of every step into its phases; None if no step was timed."""
    whole = dict(curves.get(STEP, ()))
    if not any(whole.values()):
        return None
    timed = {phase: dict(_seconds(curves, phase)) for phase in PHASES}
    phases = {
        phase: [values.get(step, 0.0) for step in whole]
        for phase, values in timed.items()
        if values
    }
    spent = [sum(values.get(step, 0.0) for values in timed.values()) for step in whole]
    phases["other"] = [max(a - b, 0.0) for a, b in zip(whole.values(), spent, strict=True)]
    between = {phase: sum(v for _, v in _seconds(curves, phase)) for phase in BETWEEN_STEPS}
    return StepTimes(list(whole), phases, {name: value for name, value in between.items() if value})


def is_in_step_times(name: str) -> bool:
    """Whether a metric is part of `StepTimes`, or compares the ranks in one of its phases."""
    phases = ("step", *PHASES, *BETWEEN_STEPS)
    return name.startswith(tuple(f"time/{phase}_" for phase in phases))


def _seconds(curves: Mapping[str, Points], phase: str) -> Points:
    return curves.get(f"time/{phase}_seconds", ())
