"""Where the report of a run has its metrics."""

import json
import math

from marlhf_mega.metrics.glossary import is_beside, lookup
from marlhf_mega.metrics.progress import TERMINAL_METRICS
from marlhf_mega.report.page import GROUPS
from marlhf_mega.report.run import read_stage


def assert_reported(run_dir, job, *, without=()):
    """Every metric is a number and explained under a heading; the screen's are there.

    Args:
        run_dir: of a run.
        job: that it was.
        without: metrics of the screen that its method does not have.
    """
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(value) for line in lines for value in json.loads(line).values())
    stage = read_stage(run_dir)
    assert stage.job == job
    for name in stage.curves:
        group = name.partition("/")[0]
        assert group in GROUPS, name
        assert lookup(name).about or is_beside(name) or group in ("time", "perf"), name
    assert {*TERMINAL_METRICS[job].values()} - {*stage.curves} == {*without}
