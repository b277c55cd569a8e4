"""Fault injection for tests, through an environment variable.

    MARLHF_FAULT="rank=1,step=3,phase=update,kind=kill;rank=0,step=5,phase=rollout,kind=hang"

A fault occurs when its rank enters the phase of the step, named as in metrics.jsonl. It occurs
once: a mark in `run.dir`/faults prevents it after a restart.

    kill, stop    SIGKILL or SIGSTOP to this process, `seconds=S` after the phase begins
    exit          the rank ends as after an error of its own
    hang          an endless loop
    nan           the output of the first layer that runs is NaN
    slow          sleeps for `seconds=S` in this and all later steps, also after restarts
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

VARIABLE = "MARLHF_FAULT"
KINDS = ("kill", "stop", "exit", "hang", "nan", "slow")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault, and the rank, step and phase where it occurs."""

    rank: int
    step: int
    phase: str
    kind: str
    seconds: float = 0.0


class Faults:
    """The faults of one rank."""

    def __init__(self, rank: int, run_dir: Path) -> None:
        """Read the environment.

        Raises:
            ValueError: the variable cannot be parsed.
        """
        asked = parse(os.environ.get(VARIABLE, ""))
        self._marks = run_dir / "faults"
        self._mine = {number: fault for number, fault in enumerate(asked) if fault.rank == rank}

    def enter(self, step: int, phase: str) -> None:
        """Trigger the faults that are due at the start of this phase."""
        for number, fault in self._mine.items():
            if fault.phase != phase:
                continue
            if fault.kind == "slow":
                time.sleep(fault.seconds if step >= fault.step else 0.0)
            elif step == fault.step:
                self._happen_once(fault, self._marks / f"{number:03d}")

    def _happen_once(self, fault: Fault, mark: Path) -> None:
        if mark.exists():
            return
        mark.parent.mkdir(exist_ok=True)
        match fault.kind:
            case "kill" | "stop":
                number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
                if fault.seconds:
                    timer = threading.Timer(fault.seconds, _signal, (mark, number))
                    timer.daemon = True
                    timer.start()
                else:
                    _signal(mark, number)
            case "exit":
                mark.touch()
                sys.exit(1)
            case "hang":
                mark.touch()
                while True:
                    time.sleep(0.01)
            case "nan":
                mark.touch()
                _spoil_next_output()


def parse(text: str) -> list[Fault]:
    """Parse a list of faults; an empty text means none.

    Raises:
        ValueError: the text is not a list of faults.
    """
    faults = []
    for part in filter(None, text.split(";")):
        try:
            given: dict[str, Any] = dict(item.split("=") for item in part.split(","))
            for name, kind in (("rank", int), ("step", int), ("seconds", float)):
                if name in given:
                    given[name] = kind(given[name])
            fault = Fault(**given)
        except (TypeError, ValueError):
            fault = None
        if fault is None or fault.kind not in KINDS:
            raise ValueError(
                f"{VARIABLE}={part}: must be rank=R,step=S,phase=P,kind=K with K one of "
                f"{', '.join(KINDS)}, and seconds=T where it applies. Fix or unset it."
            )
        faults.append(fault)
    return faults


def _signal(mark: Path, number: signal.Signals) -> None:
    mark.touch()
    os.kill(os.getpid(), number)


def _spoil_next_output() -> None:
    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * torch.nan

    handle = register_module_forward_hook(spoil)
