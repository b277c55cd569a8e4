"""Runs beside each other, by hand."""

from marlhf_mega.report.compare import comparisons
from marlhf_mega.report.run import Stage


def ppo(config, **curves):
    scores = {"rollout/score_mean": [(1, 0.0), (2, 1.0)]}
    return Stage("run", config, "", scores | curves)


A = ppo(
    {"run": {"name": "a", "dir": "/a", "seed": 1}, "macro": {"rule": "token", "n": 5}},
    **{"eval/gold_mean": [(0, 0.0), (2, 0.5)], "eval/gold_stderr": [(0, 0.1), (2, 0.0625)]},
)
B = ppo(
    {"run": {"name": "b", "dir": "/b", "seed": 1}, "macro": {"rule": "fixed_ngram", "n": 5}},
    **{"eval/gold_mean": [(4, 0.75)], "policy/kl": [(1, 2.0), (2, 3.0)]},
)
SFT = Stage("sft", {}, "", {"sft/loss": [(1, 1.0)]})


def test_runs_of_one_job_are_compared():
    (found,) = comparisons([SFT, A, B], ["sft", "a", "b"])
    assert (found.job, found.names) == ("ppo", ["a", "b"])
    # Names and directories differ, but are no difference.
    assert found.settings == {"macro.rule": ["token", "fixed_ngram"]}


def test_the_table_has_the_last_values_with_their_errors():
    (found,) = comparisons([A, B], ["a", "b"])
    assert {row.name: row.values for row in found.rows} == {
        "eval/gold_mean": [(0.5, 0.0625), (0.75, None)],
        "rollout/score_mean": [(1.0, None), (1.0, None)],
        "policy/kl": [None, (3.0, None)],
    }


def test_curves_are_of_the_runs_that_have_several_values():
    (found,) = comparisons([A, B], ["a", "b"])
    assert {metric: list(series) for metric, series in found.curves.items()} == {
        "eval/gold_mean": ["a"],
        "rollout/score_mean": ["a", "b"],
        "policy/kl": ["b"],
    }


def test_curves_have_the_standard_errors_that_were_recorded():
    (found,) = comparisons([A, B], ["a", "b"])
    assert found.errors == {
        "eval/gold_mean": {"a": [0.1, 0.0625]},
        "rollout/score_mean": {},
        "policy/kl": {},
    }


def test_what_is_constant_in_all_runs_is_no_curve():
    flat = ppo({}, **{"policy/kl": [(1, 2.0), (2, 2.0)]})
    (found,) = comparisons([flat, flat], ["x", "y"])
    assert list(found.curves) == ["rollout/score_mean"]


def test_different_jobs_are_not_compared():
    assert comparisons([SFT, A], ["sft", "a"]) == []
    empty = Stage("empty", {}, "", {})
    assert comparisons([empty, empty], ["x", "y"]) == []
