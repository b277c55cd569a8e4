"""Which replica holds which sample, over all replicas in one process."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.config.schema import Config
from marlhf_mega.rollout import assignment
from marlhf_mega.rollout.assignment import balance, block_of, local_indices, own_samples, select
from marlhf_mega.rollout.types import Rollout

CPU = torch.device("cpu")


def rank(number, count):
    groups = SimpleNamespace(dp=None)
    return SimpleNamespace(dp_rank=number, dp_size=count, device=CPU, groups=groups)


def made(samples):
    """What every sample's number says of it: prompt, length, log-probs."""
    responses = [[s] * (1 + s * 7 % 5) for s in samples]
    logprobs = torch.full((len(samples), max(map(len, responses))), 0.0)
    for row, response in enumerate(responses):
        logprobs[row, : len(response)] = -1.0 - response[0]
    return Rollout(
        prompts=[[s, s] for s in samples],
        responses=responses,
        finished=[s % 2 == 0 for s in samples],
        sample_indices=list(samples),
        logprobs=logprobs,
    )


def same(found, wanted):
    assert found.sample_indices == wanted.sample_indices
    assert (found.prompts, found.responses) == (wanted.prompts, wanted.responses)
    assert found.finished == wanted.finished
    assert torch.equal(found.logprobs, wanted.logprobs)


@pytest.mark.parametrize(("batch", "minibatch", "replicas"), [(12, 4, 2), (12, 12, 3), (8, 2, 1)])
def test_the_replicas_share_every_minibatch(batch, minibatch, replicas):
    shares = [local_indices(batch, minibatch, rank(r, replicas)) for r in range(replicas)]
    own = minibatch // replicas
    for first in range(0, batch, minibatch):
        number = first // minibatch
        dealt = [s for share in shares for s in share[number * own : (number + 1) * own]]
        assert dealt == list(range(first, first + minibatch))


def test_samples_are_found_in_any_part_and_come_in_the_wanted_order():
    parts = [made([4, 0, 9]), made([2]), made([7, 3])]
    same(select(parts, [3, 4, 2], CPU), made([3, 4, 2]))
    same(select(parts[:1], [4, 0, 9], CPU), made([4, 0, 9]))
    assert select(parts, [], CPU).logprobs.shape == (0, 1)


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_balanced_replicas_hold_the_same_minibatches_with_no_more_tokens_at_most(
    minibatches, replicas, share
):
    minibatch = replicas * share
    batch = minibatches * minibatch
    parts = [made(local_indices(batch, minibatch, rank(r, replicas))) for r in range(replicas)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "gather_objects", lambda value, group: parts)
        balanced = [
            balance(part, minibatch_size=minibatch, mesh=rank(r, replicas))
            for r, part in enumerate(parts)
        ]
    for number in range(minibatches):
        own = slice(number * share, (number + 1) * share)
        held = [rollout.sample_indices[own] for rollout in balanced]
        first = number * minibatch
        assert sorted(sample for samples in held for sample in samples) == list(
            range(first, first + minibatch)
        )
        tokens = [
            [sum(len(r) + 2 for r in rollout.responses[own]) for rollout in rollouts]
            for rollouts in (parts, balanced)
        ]
        assert max(tokens[1]) <= max(tokens[0])
    for rollout in balanced:
        same(rollout, made(rollout.sample_indices))


@given(st.integers(0, 13), st.sampled_from([1, 2, 4]), st.sampled_from([0, 5]))
def test_blocks_cover_all_samples_once_and_are_as_even_as_they_can_be(count, replicas, first):
    blocks = [block_of(rank(r, replicas), count, first=first) for r in range(replicas)]
    assert [sample for block in blocks for sample in block] == [*range(first, first + count)]
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_with_a_filter_replicas_get_blocks_of_what_is_generated():
    mesh = rank(1, 2)
    plain = Config.model_validate({"ppo": {"minibatch_size": 4}})
    assert own_samples(plain, mesh, 8) == [2, 3, 6, 7]
    filtered = Config.model_validate(
        {"ppo": {"minibatch_size": 4}, "rollout": {"filter": "pf_ppo"}}
    )
    assert own_samples(filtered, mesh, 8) == [4, 5, 6, 7]
    assert own_samples(filtered, mesh, 3, first=8) == [9, 10]
