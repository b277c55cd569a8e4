"""Faults on purpose, for tests. Nothing happens unless the environment asks for it.

    MARLHF_FAULT="rank=1,step=3,phase=update,kind=kill;rank=0,step=5,phase=rollout,kind=hang"

A fault happens as its rank enters the phase of the step, named as in metrics.jsonl, and once: a
mark in `run.dir`/faults keeps it from happening again after a restart.

    kill, stop    SIGKILL or SIGSTOP to this process; `seconds=S`: so long after the phase begins
    exit          the rank ends as by an error of its own
    hang          an endless loop
    nan           the output of the first layer that runs is not a number
    slow          sleeps `seconds=S`, in this and all later steps, again after every restart
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
    """What happens to which rank, and when."""

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
            ValueError: it names no fault there is.
        """
        asked = parse(os.environ.get(VARIABLE, ""))
        self._marks = run_dir / "faults"
        self._mine = {number: fault for number, fault in enumerate(asked) if fault.rank == rank}

    def enter(self, step: int, phase: str) -> None:
        """Let happen what is due at the start of this phase."""
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
    """Read a list of faults, none from an empty text.

    Raises:
        ValueError: the text is not one.
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
                f"{', '.join(KINDS)}, and seconds=T where it applies. Mend or unset it."
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
