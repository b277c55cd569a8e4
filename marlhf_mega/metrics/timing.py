"""Wall-clock seconds per phase of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("rollout", "experience", "update")
"""The phases of a step, in order. They do not overlap; with the rest they make up `step`."""
BETWEEN_STEPS = ("evaluate", "checkpoint", "export")
"""Phases outside of the steps."""


class PhaseTimers:
    """Adds up the seconds of each named phase until they are read.

    Phases may nest. A phase entered again adds to its seconds.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        observe: Callable[[str | None], None] = lambda phase: None,
    ) -> None:
        """Take what to call at every boundary.

        Args:
            synchronize: the platform's, so that a GPU has done its work when the clock is read.
            observe: gets the innermost open phase from here on, None if none is open.
        """
        self._synchronize = synchronize
        self._observe = observe
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a `with` block as part of `phase`, also when it raises."""
        self._synchronize()
        start = time.perf_counter()
        self._open.append(phase)
        try:
            self._observe(phase)
            yield
            self._synchronize()
        finally:
            self._open.pop()
            self._seconds[phase] = self.seconds(phase) + time.perf_counter() - start
        self._observe(self._open[-1] if self._open else None)

    def seconds(self, phase: str) -> float:
        """Return the seconds of a phase so far."""
        return self._seconds.get(phase, 0.0)

    def drain(self) -> dict[str, float]:
        """Return `time/PHASE_seconds` of every phase and reset all to zero."""
        drained = {f"time/{phase}_seconds": value for phase, value in self._seconds.items()}
        self._seconds = {}
        return drained
