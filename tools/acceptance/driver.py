"""Runs the acceptance steps on one GPU, each within its time; see `tools/gpu_acceptance.sh --help`.

All steps share one process; after one that fails, hangs or crashes the rest runs in another. What
is known is on disk after every step. Needs only the standard library.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

SECONDS = {
    "answers": 60,
    "decode": 60,
    "attention": 45,
    "training": 60,
    "copies": 30,
    "quickstart": 60,
    "fp8": 45,
}
"""Step -> the time that it may take, the start of its process included. Together six minutes."""

WORKER = Path(__file__).with_name("worker.py")

Result = dict[str, Any]


class Worker:
    """A process that runs steps in their order and sends the result of each as a line."""

    def __init__(self, steps: list[str], log: Path, *, dry_run: bool) -> None:
        """Start it; what it prints is appended to `log`."""
        self._log = log
        results, sent = os.pipe()
        command = [sys.executable, str(WORKER), str(sent), *steps]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command + ["--dry-run"] * dry_run,
                stdout=output,
                stderr=output,
                pass_fds=[sent],
                start_new_session=True,
            )
        os.close(sent)
        self._results, self._received = results, b""

    def result(self, seconds: float) -> Result:
        """Wait for the next step's result."""
        start = time.monotonic()
        line = self._line(start + seconds)
        taken = round(time.monotonic() - start, 1)
        if line is None:
            error = f"not done after {seconds:.0f} s; ended"
            return {"passed": False, "seconds": taken, "error": error}
        if line:
            return {"seconds": taken} | json.loads(line)
        code = self._process.wait()
        last = self._log.read_text(errors="replace").splitlines()[-20:]
        error = f"the process ended with code {code}"
        return {"passed": False, "seconds": taken, "error": error, "log": last}

    def _line(self, end: float) -> bytes | None:
        """Return the next line; nothing if there is none any more, None if it comes too late."""
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._results], [], [], max(0, end - time.monotonic()))
            if not ready:
                return None
            if not (more := os.read(self._results, 1 << 16)):
                return b""
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def end(self) -> None:
        """Kill the process, with all that it started, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._results)


def run(steps: list[str], out: Path, *, dry_run: bool) -> bool:
    """Run the steps; write `acceptance.json` after each of them. Returns whether all passed."""
    out.mkdir(parents=True, exist_ok=True)
    log, target = out / "acceptance.log", out / "acceptance.json"
    log.unlink(missing_ok=True)
    found: dict[str, Any] = {"date": date.today().isoformat(), "dry_run": dry_run, "steps": {}}
    worker = None
    for number, name in enumerate(steps):
        worker = worker or Worker(steps[number:], log, dry_run=dry_run)
        result = worker.result(SECONDS[name])
        if not result["passed"]:
            worker.end()
            worker = None
        found |= result.pop("machine", {})
        found["steps"][name] = result
        target.write_text(json.dumps(found, indent=1) + "\n")
        show(name, result)
    if worker:
        worker.end()
    passed = all(result["passed"] for result in found["steps"].values())
    print(
        f"{found.get('device', 'no device')}: {'all passed' if passed else 'FAILED'}; see {target}"
    )
    return passed


def show(name: str, result: Result) -> None:
    """Print a step's result: a line, and a line for each of its numbers."""
    state = "passed" if result["passed"] else "FAILED"
    if "skipped" in result:
        state = f"skipped: {result['skipped']}"
    print(f"{name:12}{result['seconds']:6.1f} s  {state}")
    for key, value in result.get("found", {}).items():
        print(f"    {key}: {json.dumps(value)}")
    for line in [result["error"], *result.get("log", [])] if "error" in result else []:
        print(f"    {line}")
    sys.stdout.flush()


def main() -> int:
    """Run the steps that the command line names."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="folder of the results")
    options.add_argument("--dry-run", action="store_true", help="tiny sizes")
    names = list(SECONDS)
    options.add_argument("--steps", nargs="+", choices=names, default=names, help="only these")
    args = options.parse_args()
    return 0 if run(args.steps, args.out, dry_run=args.dry_run) else 1


if __name__ == "__main__":
    sys.exit(main())
