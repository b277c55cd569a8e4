"""Samples as people read them, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.experience.samples import experience_actions, experience_samples, make_sample
from marlhf_mega.experience.types import Details
from marlhf_mega.metrics.writers import Action

WORDS = {5: "a", 6: " b", 7: ".", 8: ""}
TOKENIZER = SimpleNamespace(
    decode=lambda ids: "".join(WORDS[i] for i in ids),
    offsets=lambda ids: [
        (sum(len(WORDS[j]) for j in ids[:n]), sum(len(WORDS[j]) for j in ids[: n + 1]))
        for n in range(len(ids))
    ],
    end_text=lambda ids: "</s>" if ids[-1] == 8 else None,
)


def test_actions_carry_what_their_tokens_were_worth_by_hand():
    experience = SimpleNamespace(
        responses=[[5, 6, 7], [6, 8], [5, 5, 5, 5]],
        actions=MacroActions.from_ids(
            torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1], [0, 0, 0, 0]])
        ),
        advantages=torch.tensor([[2.0, 2.0, -1.0, 0], [0.0] * 4, [3.0] * 4]),
    )
    details = Details(
        scores=torch.tensor([1.5, math.nan, 2.0]),
        shaped=torch.tensor([0.5, 0.0, 1.0]),
        kl=torch.tensor([[0.25, 0.5, -0.25, 0.0], [0.0] * 4, [1.0] * 4]),
        values=torch.tensor([[0.75, 0.5], [0.0, 0.0], [4.0, 0.0]]),
    )
    rollout = SimpleNamespace(sample_indices=[6, 2, 4])
    first, second = experience_samples(["p", "q"], rollout, experience, details, TOKENIZER)
    assert (first.id, first.prompt, first.tokens) == (6, "p", ["a", " b", "."])
    assert (first.score, first.shaped, first.kl, first.gold) == (1.5, 0.5, 0.5, None)
    assert first.actions == [
        Action(start=0, length=2, advantage=2.0, value=0.75, kl=0.75),
        Action(start=2, length=1, advantage=-1.0, value=0.5, kl=-0.25),
    ]
    # A sample without a score takes no part and has no actions.
    assert (second.id, second.tokens, second.end) == (2, [" b", ""], "</s>")
    assert (second.actions, second.score, second.shaped, second.kl) == ([], None, None, None)


def test_without_a_critic_actions_have_no_value():
    mask = torch.tensor([[True, True, False]])
    experience = SimpleNamespace(
        actions=MacroActions.from_starts(mask, mask), advantages=torch.tensor([[1.0, 2.0, 0.0]])
    )
    details = Details(scores=torch.ones(1), shaped=torch.ones(1), kl=torch.zeros(1, 3), values=None)
    ((first, second),) = experience_actions(experience, details)
    assert (first.value, first.advantage, second.value, second.advantage) == (None, 1, None, 2)


def test_an_empty_action_is_not_shown():
    """The released code's last token is an action of its own, after an empty one."""
    starts = torch.tensor([[True, False, True]])
    actions = MacroActions.from_starts(starts, torch.ones_like(starts), compat="ma_rlhf")
    assert actions.lengths.tolist() == [[2, 0, 1]]
    experience = SimpleNamespace(
        responses=[[5, 6, 7]], actions=actions, advantages=torch.tensor([[1.0, 1.0, 4.0]])
    )
    details = Details(
        scores=torch.ones(1),
        shaped=torch.ones(1),
        kl=torch.zeros(1, 3),
        values=torch.tensor([[1.0, 2.0, 3.0]]),
    )
    rollout = SimpleNamespace(sample_indices=[0])
    (sample,) = experience_samples(["p"], rollout, experience, details, TOKENIZER)
    assert [(a.start, a.length, a.advantage, a.value) for a in sample.actions] == [
        (0, 2, 1.0, 1.0),
        (2, 1, pytest.approx(4.0), 3.0),
    ]


def test_scores_that_are_missing_are_none():
    sample = make_sample(0, "p", [5], TOKENIZER, score=math.nan, gold=0.0)
    assert (sample.actions, sample.score, sample.gold, sample.end) == ([], None, 0.0, None)


def test_a_character_of_several_tokens_is_shown_once():
    spans = [(0, 1), (1, 2), (1, 2), (1, 2), (1, 4), (4, 4)]
    tokenizer = SimpleNamespace(
        decode=lambda ids: "H\U0001f600 i", offsets=lambda ids: spans, end_text=lambda ids: None
    )
    sample = make_sample(0, "p", range(6), tokenizer)
    assert sample.tokens == ["H", "\U0001f600", "", "", " i", ""]
    assert sample.response == "H\U0001f600 i"
