"""Means, standard errors and changes of held-out results, by hand and by the jackknife."""

import json
import math
import random

import pytest

from marlhf_mega.metrics.held_out import (
    HeldOut,
    SinceStart,
    best_of_groups,
    interleave,
    means_of_groups,
    score_interval,
)

NAN = math.nan


def test_a_mean_and_its_standard_error_by_hand():
    """Deviations -2, -1, 0 and 3: their squares sum to 14."""
    found = HeldOut(values={"eval/score_mean": [1.0, 2.0, 3.0, 6.0]}).metrics
    assert found == {
        "eval/score_mean": 3.0,
        "eval/score_stderr": pytest.approx(math.sqrt(14 / (4 * 3))),
    }


def test_a_statistic_of_all_samples_has_no_error_and_is_shown_if_it_is_a_number():
    found = HeldOut(values={"a": [1.0]}, statistics={"b": 2.0, "c": NAN})
    assert found.metrics == {"a": 1.0, "b": 2.0}
    assert HeldOut.from_json(json.loads(json.dumps(found.to_json()))).metrics == found.metrics


def test_groups_have_the_mean_of_what_has_a_value():
    found = means_of_groups([1.0, 2.0, NAN, 4.0, NAN, NAN], 2)
    assert found[:2] == [1.5, 4.0]
    assert math.isnan(found[2])


def test_groups_have_the_value_of_the_highest_score():
    scores = [0.1, 0.9, NAN, -2.0, NAN, NAN, 3.0, 3.0]
    found = best_of_groups([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], scores, 2)
    assert found == [2.0, 4.0, 5.0, 7.0]


def test_an_accuracy_has_the_error_of_a_share():
    found = HeldOut(values={"eval/accuracy": [1.0] * 30 + [0.0] * 10}).metrics
    assert found["eval/accuracy"] == 0.75
    assert found["eval/accuracy_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 39))


def test_a_loss_is_a_mean_over_tokens_and_perplexity_its_exponential():
    """3 tokens at 1 nat and 1 token at 3: (3 + 3) / 4 = 1.5; influences -0.75 and 0.75."""
    found = HeldOut(
        values={"eval/loss": [1.0, 3.0]},
        weights=[3, 1],
        exponentials={"eval/perplexity": "eval/loss"},
    ).metrics
    assert found == {
        "eval/loss": 1.5,
        "eval/loss_stderr": pytest.approx(0.75),
        "eval/perplexity": pytest.approx(math.exp(1.5)),
        "eval/perplexity_stderr": pytest.approx(0.75 * math.exp(1.5)),
    }


def test_a_change_is_paired():
    """Differences 1, 2 and 3: mean 2, squares sum to 2. Unpaired, the error would be 1.29."""
    first = HeldOut(values={"eval/kl": [1.0, 2.0, 3.0]})
    now = HeldOut(values={"eval/kl": [2.0, 4.0, 6.0]})
    assert now.since(first) == {
        "eval/kl_change": pytest.approx(2.0),
        "eval/kl_change_stderr": pytest.approx(math.sqrt(2 / (3 * 2))),
    }


def test_a_change_is_of_samples_that_have_a_value_both_times():
    """Also where a resume judges fewer of the file, or more."""
    first = HeldOut(values={"eval/score_mean": [1.0, 2.0, 5.0, NAN]})
    now = HeldOut(values={"eval/score_mean": [2.0, 4.0, NAN, 7.0, 100.0]})
    assert now.since(first) == {
        "eval/score_change": pytest.approx(1.5),
        "eval/score_change_stderr": pytest.approx(math.sqrt(0.5 / 2)),
    }
    nothing = HeldOut(values={"eval/score_mean": [NAN, 1.0]})
    assert nothing.since(HeldOut(values={"eval/score_mean": [1.0, NAN]})) == {}


def test_values_of_one_sample_have_no_standard_error():
    one = HeldOut(values={"eval/kl": [4.0], "eval/score_mean": [NAN]})
    assert one.metrics == {"eval/kl": 4.0}
    assert one.since(HeldOut(values={"eval/kl": [3.0]})) == {"eval/kl_change": 1.0}


def test_ties_count_half_for_the_win_rate():
    """Wins 1, 1/2, 0 and 1: mean 5/8, squared deviations 9/64 + 1/64 + 25/64 + 9/64 = 11/16."""
    first = HeldOut(
        values={"eval/score_mean": [1.0, 1.0, 1.0, 0.0, NAN, 2.0]}, contest="eval/score_mean"
    )
    now = HeldOut(
        values={"eval/score_mean": [2.0, 1.0, 0.0, NAN, 5.0, 3.0]}, contest="eval/score_mean"
    )
    found = now.since(first)
    assert found["eval/win_rate"] == 5 / 8
    assert found["eval/win_rate_stderr"] == pytest.approx(math.sqrt(11 / 16 / (4 * 3)))


def test_scores_of_a_reward_model_in_training_win_nothing():
    """They may all rise: it is the judge that has changed."""
    scores = HeldOut(values={"eval/score_mean": [1.0, 2.0]})
    assert "eval/win_rate" not in scores.since(scores)


def jackknife(statistic, rows):
    """Return the standard error of a statistic of independent rows, by leaving each one out."""
    left_out = [statistic(rows[:i] + rows[i + 1 :]) for i in range(len(rows))]
    mean = sum(left_out) / len(rows)
    spread = sum((value - mean) ** 2 for value in left_out)
    return math.sqrt(spread * (len(rows) - 1) / len(rows))


def test_errors_of_weighted_means_agree_with_the_jackknife():
    draw = random.Random(7)
    rows = [(draw.randint(1, 30), draw.gauss(3, 1), draw.gauss(2, 0.5)) for _ in range(400)]

    def loss(column):
        return lambda rows: sum(r[0] * r[column] for r in rows) / sum(r[0] for r in rows)

    def results(column):
        return HeldOut(
            values={"eval/loss": [r[column] for r in rows]},
            weights=[r[0] for r in rows],
            exponentials={"eval/perplexity": "eval/loss"},
        )

    now, first = results(2), results(1)
    found = now.metrics | now.since(first)

    def change_of_perplexity(rows):
        return math.exp(loss(2)(rows)) - math.exp(loss(1)(rows))

    for name, statistic in (
        ("eval/loss", loss(2)),
        ("eval/loss_change", lambda rows: loss(2)(rows) - loss(1)(rows)),
        ("eval/perplexity_change", change_of_perplexity),
    ):
        assert found[name] == pytest.approx(statistic(rows))
        assert found[f"{name}_stderr"] == pytest.approx(jackknife(statistic, rows), rel=0.02)


def test_a_resumed_run_compares_with_its_first_results():
    first, now = (
        HeldOut(values={"eval/kl": values}) for values in ([0.0, NAN, 0.0], [1.0, 2.0, 3.0])
    )
    run, resumed, older = SinceStart(), SinceStart(), SinceStart()
    assert run.metrics(first) == first.metrics
    resumed.load_state(json.loads(json.dumps(run.state())))
    assert resumed.metrics(now) == run.metrics(now)
    assert resumed.metrics(now)["eval/kl_change"] == 2.0
    # What a checkpoint without them continues is not its own start.
    elsewhere = SinceStart("of other rows")
    elsewhere.load_state(run.state())
    assert elsewhere.metrics(now) == now.metrics
    assert elsewhere.metrics(first) == first.metrics
    older.load_state(None)
    assert older.metrics(first) == first.metrics
    assert older.metrics(now) == now.metrics
    assert older.state() is None


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_replicas_take_turns_in_the_order_of_the_file(num_replicas):
    rows = list(range(5))
    assert interleave([rows[r::num_replicas] for r in range(num_replicas)]) == rows


@pytest.mark.parametrize(
    ("wins", "low", "high"),
    [
        ([1.0] * 8 + [0.0] * 2, 0.4902, 0.9433),  # Wilson's interval of 8 in 10
        ([1.0] * 10, 0.7225, 1.0),
        ([0.0] * 10, 0.0, 0.2775),
        ([0.5] * 10, 0.5, 0.5),  # two policies that answer alike
        ([1.0], 0.2065, 1.0),
    ],
)
def test_the_interval_of_a_win_rate_by_known_numbers(wins, low, high):
    assert score_interval(wins) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_the_interval_of_a_win_rate_holds_the_rates_within_two_standard_errors():
    """A search over rates, with the variance of the three outcomes written out."""
    draw = random.Random(3)
    for _ in range(50):
        wins = [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(draw.randint(1, 60))]
        size, mean, ties = len(wins), sum(wins) / len(wins), wins.count(0.5) / len(wins)
        inside = []
        for rate in (k / 20000 for k in range(20001)):
            won, lost = rate - ties / 2, 1 - rate - ties / 2
            variance = won * (1 - rate) ** 2 + ties * (0.5 - rate) ** 2 + lost * rate**2
            if (mean - rate) ** 2 <= 1.959964**2 * variance / size + 1e-12:
                inside.append(rate)
        low, high = score_interval(wins)
        assert (low, high) == (
            pytest.approx(min(inside), abs=1e-4),
            pytest.approx(max(inside), abs=1e-4),
        )


def test_two_policies_are_compared_sample_by_sample():
    """Scores: a win, a tie, a loss, a win, and two pairs that lack a score."""
    ours = HeldOut(
        values={"eval/score_mean": [2.0, 1.0, 0.0, 4.0, NAN, 1.0], "eval/kl": [1.0] * 6},
        contest="eval/score_mean",
    )
    theirs = HeldOut(
        values={
            "eval/score_mean": [1.0, 1.0, 3.0, 2.0, 1.0, NAN],
            "eval/gold_mean": [0.0] * 6,
            "eval/kl": [0.0] * 6,
        },
        contest="eval/score_mean",
    )
    found = ours.against(theirs)
    low, high = score_interval([1.0, 0.5, 0.0, 1.0])
    name = "eval/win_rate_over_other"
    assert {key: value for key, value in found.items() if "_rate" in key} == {
        name: 0.625,
        f"{name}_stderr": pytest.approx(math.sqrt(0.6875 / 12)),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_ties": 0.25,
    }
    assert found["other/score_mean"] == pytest.approx(8 / 5)
    assert found["eval/score_change"] == 0.0  # 1, 0, -3 and 2
    assert found["eval/score_change_stderr"] == pytest.approx(math.sqrt(14 / 12))
    assert found["eval/kl_change"] == 1.0
    assert "eval/win_rate" not in found
