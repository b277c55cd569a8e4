"""Runs acceptance steps in one process: worker.py FILE_DESCRIPTOR STEP... [--dry-run].

Sends one line of JSON for each step to the file descriptor, and ends at the first that fails: after
an error of a GPU nothing in its process can be trusted.
"""

import json
import os
import sys
import traceback
from typing import Any

import steps
import torch

from marlhf_mega import platform


def run(name: str, sizes: steps.Sizes) -> dict[str, Any]:
    """Run one step; returns what it found, or why it failed or was skipped."""
    try:
        found = steps.STEPS[name](sizes)
    except steps.Skip as reason:
        return {"passed": True, "skipped": str(reason)}
    except Exception:  # noqa: BLE001 - the driver prints it
        trace = traceback.format_exc().splitlines()
        return {"passed": False, "error": trace[-1], "log": trace[-30:]}
    return {"passed": True, "found": found}


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    here = platform.current()
    engine = here.transformer_engine
    return {
        "device": here.device_name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformer_engine": "usable" if engine else engine.reason,
    }


def main() -> None:
    """Run the steps of the command line."""
    descriptor, *words = sys.argv[1:]
    sizes = steps.SMALL if "--dry-run" in words else steps.BILLION
    with os.fdopen(int(descriptor), "w") as results:
        for name in words:
            if name.startswith("--"):
                continue
            result = run(name, sizes) | {"machine": machine()}
            results.write(json.dumps(result) + "\n")
            results.flush()
            if not result["passed"]:
                sys.exit(1)


if __name__ == "__main__":
    main()
