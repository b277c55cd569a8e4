"""What a sample that cannot be learned from takes with it, and what it leaves."""

import math

import torch

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.experience.usable import without_non_finite, without_unknown
from marlhf_mega.rewards.scores import Scores


def scores_of(*valid):
    return Scores(torch.ones(len(valid)), torch.tensor(valid), [])


def test_a_sample_with_a_number_that_is_not_finite_is_left_out_and_zeroed():
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, math.inf], [math.nan, 0.0]])
    values = torch.full((3, 2), 0.5)
    found = without_non_finite(scores_of(True, True, False), [logprobs, values])
    assert found.valid.tolist() == [True, False, False]
    # The third had no score, which has its own reason.
    assert found.errors == ["a log-prob or a value is not finite"]
    assert logprobs.tolist() == [[-1.0, -2.0], [0.0, 0.0], [0.0, 0.0]]
    assert values.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_a_sample_that_is_tried_in_vain_from_one_place_has_no_action_left():
    actions = MacroActions.from_ids(torch.tensor([[0, 0, 1], [0, 1, 2], [-1, -1, -1]]))
    values = torch.tensor([[0.5, 1.0, 0.0], [0.5, math.nan, 1.0], [0.0, 0.0, 0.0]])
    scores, kept, known = without_unknown(scores_of(True, True, False), actions, values)
    assert scores.valid.tolist() == [True, False, False]
    assert scores.errors == ["no continuation has a score"]
    assert kept.ids.tolist() == [[0, 0, 1], [-1, -1, -1], [-1, -1, -1]]
    assert known.tolist() == [[0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]
