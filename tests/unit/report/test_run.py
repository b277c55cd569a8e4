import pytest

from marlhf_mega.report.run import Stage, results


def found(**curves):
    names = {name.replace("_", "/", 1): points for name, points in curves.items()}
    return results(Stage("run", {}, "", names))


def test_before_and_after_with_standard_errors_by_hand():
    (result,) = found(
        eval_gold_mean=[(0, 0.25), (5, 0.5), (9, 0.75)],
        eval_gold_stderr=[(0, 0.03), (5, 1.0), (9, 0.04)],
        policy_kl=[(1, 1.0)],
    )
    assert (result.name, result.before, result.after) == ("eval/gold_mean", 0.25, 0.75)
    assert result.change == 0.5
    assert result.standard_errors == pytest.approx(10.0)  # 0.5 / sqrt(0.03^2 + 0.04^2)
    assert result.verdict == "good"


def test_a_recorded_change_of_paired_samples_is_the_better_one():
    (result,) = found(
        eval_gold_mean=[(0, 0.25), (9, 0.75)],
        eval_gold_stderr=[(0, 0.03), (9, 0.04)],
        eval_gold_change=[(9, 0.5)],
        eval_gold_change_stderr=[(9, 0.02)],
    )
    assert (result.before, result.change) == (0.25, 0.5)
    assert result.standard_errors == pytest.approx(25.0)


def test_before_is_before_training_and_nothing_else():
    (result,) = found(eval_loss=[(100, 0.9), (300, 0.43)], eval_loss_stderr=[(300, 0.01)])
    assert (result.after, result.after_error) == (0.43, 0.01)
    assert result.before is result.before_error is result.change is result.standard_errors is None
    assert result.verdict is None


def test_one_evaluation_has_no_before():
    (result,) = found(eval_loss=[(0, 0.43)], eval_loss_stderr=[(0, 0.01)])
    assert (result.after, result.before, result.change) == (0.43, None, None)


def test_results_without_standard_errors_are_not_judged():
    (result,) = found(eval_margin=[(0, 1.0), (1, 2.0)])
    assert (result.change, result.standard_errors, result.verdict) == (1.0, None, None)


@pytest.mark.parametrize(
    ("name", "change", "verdict"),
    [
        ("gold_mean", 0.21, "good"),
        ("gold_mean", 0.19, None),  # within two standard errors
        ("gold_mean", -0.21, "bad"),
        ("loss", -0.21, "good"),
        ("kl", 0.5, None),  # neither way is better in itself
        ("response_tokens", -5.0, None),
    ],
)
def test_only_a_clear_change_of_what_has_a_good_direction_is_judged(name, change, verdict):
    stem = name.removesuffix("_mean")
    curves = {f"eval_{name}": [(0, 1.0), (9, 1.0 + change)]}
    curves |= {f"eval_{stem}_stderr": [(0, 0.06), (9, 0.08)]}
    (result,) = found(**curves)
    assert result.verdict == verdict


@pytest.mark.parametrize(
    ("rate", "error", "verdict"), [(0.75, 0.1, "good"), (0.6, 0.1, None), (0.2, 0.1, "bad")]
)
def test_a_win_rate_is_judged_against_one_half(rate, error, verdict):
    (result,) = found(eval_win_rate=[(5, 0.1), (9, rate)], eval_win_rate_stderr=[(9, error)])
    assert result.before is None
    assert result.change == pytest.approx(rate - 0.5)
    assert result.verdict == verdict


def test_scores_of_a_reward_model_in_training_have_no_good_direction():
    curves = {"eval_score_mean": [(0, 0.0), (9, 5.0)], "eval_score_stderr": [(0, 0.1), (9, 0.1)]}
    assert [result.verdict for result in found(**curves)] == ["good"]
    assert [result.verdict for result in found(**curves, reward_loss=[(1, 1.0)])] == [None]


def test_the_job_is_known_by_what_it_alone_writes():
    def job(*names):
        return Stage("x", {}, "", dict.fromkeys(names, ())).job

    assert job("policy/lr", "sft/loss") == "sft"
    assert job("policy/lr", "rollout/score_mean") == "ppo"
    assert job("reward/loss") == "reward"
    assert job("policy/lr", "offline/kl") == "offline"
    assert job("policy/lr") is None


def test_each_value_has_its_standard_error():
    curves = {
        "eval/gold_mean": [(0, 1.0), (5, 2.0)],
        "eval/gold_stderr": [(5, 0.25)],
        "x": [(1, 1)],
    }
    stage = Stage("run", {}, "", curves)
    assert list(stage.errors("eval/gold_mean")) == [0.0, 0.25]
    assert list(stage.errors("x")) == []


def test_another_policy_is_beside_the_own_results():
    results = found(
        eval_score_mean=[(0, 1.0)],
        eval_score_change=[(0, 0.25)],
        eval_score_change_stderr=[(0, 0.05)],
        eval_win_rate_over_other=[(0, 0.75)],
        eval_win_rate_over_other_stderr=[(0, 0.1)],
        eval_win_rate_over_other_low=[(0, 0.55)],
        eval_win_rate_over_other_high=[(0, 0.9)],
        eval_win_rate_over_other_ties=[(0, 0.5)],
        other_score_mean=[(0, 0.75)],
        other_score_stderr=[(0, 0.125)],
    )
    score, rate = results
    assert (score.before, score.before_error, score.is_before_other) == (0.75, 0.125, True)
    assert (score.change, score.standard_errors, score.verdict) == (0.25, 5.0, "good")
    assert (rate.name, rate.change, rate.interval) == (
        "eval/win_rate_over_other",
        0.25,
        (0.55, 0.9),
    )
