import pytest
import torch
from torch import Tensor

from marlhf_mega.algorithm.rewards import RunningMoments
from marlhf_mega.config.schema import RewardConfig
from marlhf_mega.rewards.combine import check_enough_valid, shape, weighted_sum
from marlhf_mega.rewards.rule import Scores


def given(values: list[float], valid: list[bool] | None = None) -> Scores:
    mask = torch.tensor([True] * len(values) if valid is None else valid)
    return Scores(torch.tensor(values), mask, ["failed"] * int((~mask).sum()))


def shaped(
    scores: Scores,
    ends_with_eos: list[bool] | None = None,
    moments: RunningMoments | None = None,
    **config: object,
) -> tuple[Tensor, RunningMoments]:
    ends = torch.ones_like(scores.valid) if ends_with_eos is None else torch.tensor(ends_with_eos)
    return shape(
        scores,
        ends,
        config=RewardConfig(**config),
        moments=moments or RunningMoments(),
        sum_over_data=lambda vector: vector,
    )


def test_a_weighted_sum_by_hand_needs_every_source():
    total = weighted_sum(
        [
            (2.0, given([1.0, 2.0, 3.0], [True, True, False])),
            (-0.5, given([4.0, 6.0, 8.0], [True, False, True])),
        ]
    )
    assert total.scores.tolist() == [0.0, 0.0, 0.0]
    assert total.valid.tolist() == [True, False, False]
    assert total.errors == ["failed", "failed"]
    assert weighted_sum([(3.0, given([1.0, -2.0]))]).scores.tolist() == [3.0, -6.0]


def test_scores_pass_unchanged_by_default():
    assert shaped(given([1.0, -30.0]), [True, False])[0].tolist() == [1.0, -30.0]


def test_missing_eos_is_treated_after_the_clip():
    scores = given([5.0, 5.0])
    ends = [True, False]
    subtracted, _ = shaped(scores, ends, clip=2.0, missing_eos="subtract", missing_eos_penalty=3.0)
    assert subtracted.tolist() == [2.0, -1.0]
    replaced, _ = shaped(scores, ends, clip=2.0, missing_eos="replace", missing_eos_penalty=9.0)
    assert replaced.tolist() == [2.0, -9.0]


def test_a_sample_without_a_score_is_zero_and_outside_the_moments():
    scores = given([1.0, 0.0, 3.0], [True, False, True])
    values, moments = shaped(
        scores, [True, False, True], normalize="running", missing_eos="replace"
    )
    assert (moments.count, moments.mean) == (2.0, 2.0)
    assert values.tolist() == pytest.approx([-(0.5**0.5), 0.0, 0.5**0.5])


def test_history_and_other_ranks_count_in_the_normalisation():
    config = RewardConfig(normalize="running")
    # Each of two ranks holds a half; both see the sums of the whole.
    _, moments = shape(
        given([1.0, 2.0]),
        torch.tensor([True, True]),
        config=config,
        moments=RunningMoments().update(torch.tensor([4.0, 16.0, 1.0])),  # one score before: 4
        sum_over_data=lambda vector: vector + torch.tensor([13.0, 85.0, 2.0]),  # 6 and 7
    )
    assert moments.count == 5
    assert moments.mean == pytest.approx(4.0)  # of 4, 1, 2, 6, 7
    assert moments.std == pytest.approx(6.5**0.5)  # 0 + 9 + 4 + 4 + 9 over 4


def test_a_batch_without_any_score_changes_nothing():
    before = RunningMoments(count=3.0, mean=1.0, square_deviation=2.0)
    values, moments = shaped(given([0.0], [False]), moments=before, normalize="running")
    assert moments == before
    assert values.tolist() == [0.0]


def test_too_many_failures_stop_the_run_and_name_the_commonest_reason():
    check_enough_valid(num_invalid=4, num_samples=8, max_invalid_fraction=0.5, errors=["a"])
    with pytest.raises(RuntimeError) as caught:
        check_enough_valid(
            num_invalid=5, num_samples=8, max_invalid_fraction=0.5, errors=["a", "b", "b"]
        )
    assert str(caught.value) == (
        "reward.max_invalid_fraction=0.5: no more samples of a step than this may fail; "
        "5 of 8 have no score, most often: b. Mend reward.source."
    )


def test_the_message_holds_without_a_reason_on_this_rank():
    with pytest.raises(RuntimeError, match=r"1 of 1 have no score\. Mend"):
        check_enough_valid(num_invalid=1, num_samples=1, max_invalid_fraction=0.0, errors=[])
