from collections.abc import Sequence

import pytest
import torch

from marlhf_mega.config.sections.reward import RewardConfig
from marlhf_mega.rewards.combine import check_enough_valid, combine, constrain
from marlhf_mega.rewards.scores import Scores


def given(values: list[float], valid: list[bool] | None = None) -> Scores:
    mask = torch.tensor([True] * len(values) if valid is None else valid)
    return Scores(torch.tensor(values), mask, ["failed"] * int((~mask).sum()))


def combined(*parts: Scores, weights: Sequence[float] = (), **config: object) -> Scores:
    terms = [{"source": "a:b", "weight": weight} for weight in weights or [1.0] * len(parts)]
    settings = RewardConfig.model_validate({"source": terms, **config})
    return combine(parts, settings, sum_over_data=lambda vector: vector)


def test_a_weighted_sum_by_hand_needs_every_source():
    total = combined(
        given([1.0, 2.0, 3.0], [True, True, False]),
        given([4.0, 6.0, 8.0], [True, False, True]),
        weights=[2.0, -0.5],
    )
    assert total.scores.tolist() == [0.0, 0.0, 0.0]
    assert total.valid.tolist() == [True, False, False]
    assert total.errors == ["failed", "failed"]
    assert combined(given([1.0, -2.0]), weights=[3.0]).scores.tolist() == [3.0, -6.0]


def test_a_sum_beyond_float32_is_no_score():
    total = combined(given([1e38, 1.0]), given([1.0, 2.0]), weights=[10.0, 1.0])
    assert total.scores.tolist() == [0.0, 12.0]
    assert total.valid.tolist() == [False, True]
    assert total.errors == ["the weighted sum of the scores is too large"]


def test_an_ensemble_takes_weighted_scores():
    parts = given([1.0, 2.0]), given([1.0, -1.0])
    found = combined(*parts, weights=[1.0, 3.0], combine="robust", robust_weight=0.5)
    assert found.scores.tolist() == [1.5, -3 + 0.5 * 2.5]


def test_the_worst_group_is_that_of_all_ranks_valid_samples():
    config = RewardConfig.model_validate(
        {"source": [{"source": "a:b"}, {"source": "c:d"}], "combine": "maxmin"}
    )
    parts = given([1.0, 9.0, 1.0], [True, False, True]), given([2.0, 0.0, 2.0])
    alone = combine(parts, config, sum_over_data=lambda vector: vector)
    assert alone.scores.tolist() == [1.0, 0.0, 1.0]
    others = torch.tensor([5.0, 0.0, 1.0])
    found = combine(parts, config, sum_over_data=lambda vector: vector + others)
    assert found.scores.tolist() == [2.0, 0.0, 2.0]
    assert found.valid.tolist() == [True, False, True]


def test_constraints_hold_from_their_thresholds_on():
    scores = given([1.0, 2.0, 3.0, 4.0])
    judged = [
        (0.5, given([0.5, 0.4, 1.0, 1.0])),
        (-1.0, given([0.0, 0.0, -2.0, 0.0], [True, True, True, False])),
    ]
    found = constrain(scores, judged)
    assert found.holds is not None
    assert found.holds.tolist() == [True, False, False, True]
    assert found.valid.tolist() == [True, True, True, False]
    assert found.scores.tolist() == [1, 2, 3, 0]
    assert found.errors == ["failed"]
    assert constrain(scores, []) is scores


def test_too_many_failures_stop_the_run_and_name_the_commonest_reason():
    enough = given([1.0] * 8, [True, False] * 4)
    check_enough_valid(enough, max_invalid_fraction=0.5, sum_over_data=lambda vector: vector)
    mine = Scores(torch.zeros(4), torch.tensor([True, False, False, False]), ["a", "b", "b"])
    others = torch.tensor([2.0, 4.0])  # four samples of another replica, of which two are valid
    with pytest.raises(RuntimeError) as caught:
        check_enough_valid(
            mine, max_invalid_fraction=0.5, sum_over_data=lambda vector: vector + others
        )
    assert str(caught.value) == (
        "reward.max_invalid_fraction=0.5: at most this fraction of a step's samples may fail; "
        "5 of 8 have no score, most often: b. Fix reward.source."
    )


def test_the_message_holds_without_a_reason_on_this_rank():
    with pytest.raises(RuntimeError, match=r"1 of 1 have no score\. Fix"):
        check_enough_valid(
            Scores(torch.zeros(0), torch.zeros(0, dtype=torch.bool), []),
            max_invalid_fraction=0.0,
            sum_over_data=lambda _: torch.tensor([0.0, 1.0]),
        )
