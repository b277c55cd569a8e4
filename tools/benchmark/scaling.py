"""Weak scaling: time a training step on growing numbers of ranks with the same work per rank.

    python tools/benchmark/scaling.py --world 1 2 4 --batch 8 --dtype bfloat16

Starts `train_step.py` once per world size and round. The sizes alternate, so that other load on the
machine affects all of them alike. Further options go to `train_step.py`. Prints readable lines and
one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common


def step_seconds(ranks: int, batch: int, options: list[str]) -> dict[str, float]:
    """Run `train_step.py` on a number of ranks; return the spread of its seconds.

    Raises:
        CalledProcessError: it failed and has printed why.
    """
    script = Path(__file__).with_name("train_step.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(script), "--ranks", str(ranks), *options]
        command += ["--batch", str(batch * ranks), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    spread: dict[str, float] = found["seconds"]["step_s"]
    return spread


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    options.add_argument("--world", type=int, nargs="+", default=[1, 2, 4], help="world sizes")
    options.add_argument("--batch", type=int, default=8, help="sequences per rank")
    options.add_argument("--rounds", type=int, default=5, help="runs per world size")
    options.add_argument("--out", type=Path, help=common.OUT_HELP)
    args, others = options.parse_known_args()
    rounds = [
        {ranks: step_seconds(ranks, args.batch, others)["median"] for ranks in args.world}
        for _ in range(args.rounds)
    ]
    seconds = {ranks: common.spread([r[ranks] for r in rounds]) for ranks in args.world}
    first = seconds[args.world[0]]["median"]
    growth = {ranks: s["median"] / first for ranks, s in seconds.items()}
    for ranks, s in seconds.items():
        line = f"{ranks:3} ranks {s['median']:9.4f} s (min {s['min']:.4f}, max {s['max']:.4f})"
        print(f"{line}, {growth[ranks]:.2f} times that of {args.world[0]}")
    settings = {"batch_per_rank": args.batch, "rounds": args.rounds, "options": others}
    found = {"benchmark": "scaling", "settings": settings, "step_s": seconds, "growth": growth}
    common.write_json(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
