"""From raw scores to rewards: the order of what is done, its statistics, and failed samples."""

import pytest
import torch
from torch import Tensor

from marlhf_mega.algorithm.rewards import RunningMoments
from marlhf_mega.config.sections.reward import RewardConfig
from marlhf_mega.rewards.scores import Scores
from marlhf_mega.rewards.shaping import Answers, Shaper


def given(values: list[float], valid: list[bool] | None = None) -> Scores:
    mask = torch.tensor([True] * len(values) if valid is None else valid)
    return Scores(torch.tensor(values), mask, ["failed"] * int((~mask).sum()))


def answers(
    ends: list[bool], lengths: list[int] | None = None, references: list[list[float]] | None = None
) -> Answers:
    return Answers(
        lengths=torch.tensor(lengths or [1] * len(ends)),
        finished=torch.tensor(ends),
        references=None if references is None else torch.tensor(references),
    )


def shaper(moments: RunningMoments | None = None, others: Tensor | None = None, **config: object):
    """Return one whose other ranks have the given sums."""
    found = Shaper(
        RewardConfig(**config),
        longest=100,
        sum_over_data=lambda vector: vector if others is None else vector + others,
    )
    found.moments = moments or RunningMoments()
    return found


def shaped(
    scores: Scores,
    ends: list[bool] | None = None,
    moments: RunningMoments | None = None,
    **config: object,
) -> tuple[Tensor, RunningMoments]:
    one = shaper(moments, **config)
    values = one.shape(scores, answers(ends or [True] * len(scores.valid)))
    return values, one.moments


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
    one = shaper(
        RunningMoments().update(torch.tensor([4.0, 16.0, 1.0])),  # one score before: 4
        torch.tensor([13.0, 85.0, 2.0]),  # 6 and 7 on another rank
        normalize="running",
    )
    one.shape(given([1.0, 2.0]), answers([True, True]))
    assert one.moments.count == 5
    assert one.moments.mean == pytest.approx(4.0)  # of 4, 1, 2, 6, 7
    assert one.moments.std == pytest.approx(6.5**0.5)  # 0 + 9 + 4 + 4 + 9 over 4


def test_a_batch_without_any_score_changes_nothing():
    before = RunningMoments(count=3.0, mean=1.0, square_deviation=2.0)
    values, moments = shaped(given([0.0], [False]), moments=before, normalize="running")
    assert moments == before
    assert values.tolist() == [0.0]


def test_the_functions_are_applied_in_their_order():
    facts = answers([True] * 3, [80, 90, 100], [[1.0], [1.0], [1.0]])
    scores = given([1.0, 1.0, 1.0])
    one = shaper(shaping=("par", "overlong", "length_penalty"), length_coef=0.1, length_limit=90)
    assert one.shape(scores, facts).tolist() == pytest.approx([0.5, 0.0, -1.5])
    two = shaper(shaping="overlong", clip=0.5, overlong_buffer=40, overlong_factor=2.0)
    assert two.shape(scores, facts).tolist() == pytest.approx([0.0, -0.5, -0.5])


def test_z_scores_are_of_the_batch_of_all_ranks_and_of_no_history():
    one = shaper(others=torch.tensor([8.0, 34.0, 2.0]), shaping="z_score")  # 3 and 5 elsewhere
    one.shape(given([100.0, 300.0]), answers([True, True]))
    scores = given([1.0, 0.0, 3.0], [True, False, True])
    found = one.shape(scores, answers([True] * 3))
    std = (8 / 3) ** 0.5  # of 1, 3, 3, 5
    assert found.tolist() == pytest.approx([-2 / std, 0, 0])


def test_a_baseline_takes_the_moments_of_the_samples_and_leaves_them():
    one = shaper(shaping="z_score", clip=2.0)
    one.shape(given([1.0, 3.0]), answers([True, True]))
    before = one.moments
    baseline = one.shape(given([2.0, 5.0]), answers([True, True]), is_baseline=True)
    assert baseline.tolist() == pytest.approx([0, 2])
    assert one.moments == before


def test_a_sample_without_a_reference_changes_nobody_elses_reward():
    facts = answers([True] * 3, references=[[0.0], [float("nan")], [0.0]])
    scores = given([0.0, 0.0, 0.0], [True, False, True])
    assert shaper(shaping="par").shape(scores, facts).tolist() == [0.5, 0.0, 0.5]
    assert shaper(shaping=("par", "z_score")).shape(scores, facts).tolist() == [0, 0, 0]


def test_a_violation_earns_nothing_after_all_else():
    holds = torch.tensor([True, False, False])
    scores = given([3.0, 3.0, -3.0])._replace(holds=holds)
    facts = answers([True] * 3)
    assert shaper(clip=2.0).shape(scores, facts).tolist() == [2.0, 0.0, -2.0]
