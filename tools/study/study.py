"""Run a grid of arms and seeds, and compare them.

    python tools/study/study.py run tools/study/toy.yaml runs/study --parallel 2
    python tools/study/study.py report tools/study/toy.yaml runs/study

`run` starts what is not finished: the same command goes on after a stop, and repeats nothing.
`report` writes report.md, runs.csv and three figures to the study's directory, from what is
finished.
Exit codes: 0 done, 1 a run failed, 2 wrong usage, 75 stopped by a signal.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grid import load_grid
from page import write_page
from results import read_arms
from runner import arm_runs, run_all, shared_runs

from marlhf_mega.config.exit_codes import EXIT_PREEMPTED, EXIT_USAGE
from marlhf_mega.config.load import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        grid = load_grid(options.grid)
        if options.command == "report":
            arms = read_arms(grid, options.dir)
            print(write_page(arms, grid, options.dir))
            return 0
        groups = arm_runs(grid, options.dir, arms=options.arms, seeds=options.seeds)
        if code := run_all(shared_runs(grid, options.dir), parallel=1):
            return code
        failed = 0
        for group in groups:
            ready = [run for run in group if run.is_ready]
            if (code := run_all(ready, parallel=options.parallel)) == EXIT_PREEMPTED:
                return code
            failed = failed or code
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return failed


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="start what is not finished")
    report = commands.add_parser("report", help="compare what is finished")
    for command in (run, report):
        command.add_argument("grid", type=Path, metavar="GRID", help="a YAML file")
        command.add_argument("dir", type=Path, metavar="DIR", help="the study's directory")
    run.add_argument("--parallel", type=int, default=1, help="runs at a time (default 1)")
    run.add_argument("--arms", nargs="+", default=(), help="only these arms")
    run.add_argument("--seeds", nargs="+", type=int, default=(), help="only these seeds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
