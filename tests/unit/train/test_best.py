"""The best evaluation, and which metrics it can be by."""

import math

import pytest

from marlhf_mega.train.best import Best


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval/loss", [3.0, 2.0, 2.0, 4.0], (2, 2.0, 2)),
        ("eval/score_mean", [3.0, 2.0, 4.0], (3, 4.0, 0)),
        ("eval/loss", [math.nan, 2.0, math.nan], (2, 2.0, 1)),
    ],
)
def test_the_best_is_the_first_with_the_best_value(metric, values, best):
    found = Best(metric=metric)
    for step, value in enumerate(values, start=1):
        found.update(step, {metric: value})
        found.update(step, {"eval/other": 0.0})
    assert (found.step, found.value, found.num_worse) == best
    lines = [{"step": step, metric: value} for step, value in enumerate([-1e9, *values])]
    assert Best.of_run(metric, lines, first_step=len(values)) == found
    assert Best.of_run(metric, lines, first_step=0).step is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["evaluate.patience=2"],
            "evaluate.patience=2: counts evaluations that are no better by checkpoint.keep_best, "
            "which is not set. Set it, for example to eval/loss.",
        ),
        (
            ["checkpoint.keep_best=eval/loss", "data.validation_path=null"],
            "checkpoint.keep_best=eval/loss: needs held-out data; data.validation_path is not set. "
            "Set it, or remove the key.",
        ),
    ],
)
def test_keys_that_would_do_nothing_are_refused(refusal, overrides, line):
    assert refusal("sft", *overrides) == line


def test_a_metric_without_a_better_way_is_refused(refusal):
    line = refusal("sft", "checkpoint.keep_best=eval/response_tokens")
    assert line.startswith(
        "checkpoint.keep_best=eval/response_tokens: must be a held-out metric of which more or "
        "less is better. Use one of eval/accuracy, eval/gold_mean, eval/score_mean, "
    )
