"""`marlhf report`: its arguments, and where the page goes."""

import argparse
import os
import sys
from pathlib import Path


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`, which takes runs instead of a configuration."""
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN", help="run directory, finished or not"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run directory; of several runs, in the folder "
        "that holds them all)",
    )


def run_report(options: argparse.Namespace) -> int:
    """Write the page and say where it is.

    Raises:
        ValueError: a directory is not a run's, or a file of it is damaged.
    """
    # Templates and charts take time to load, and the command line knows all commands.
    from marlhf_mega.report.page import report

    folder = Path(os.path.commonpath([path.resolve() for path in options.run_dirs]))
    out = options.out or folder / "report.html"
    report(options.run_dirs, out)
    sys.stdout.write(f"report: {out}\n")
    return 0
