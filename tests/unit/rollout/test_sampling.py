"""The distribution that tokens are drawn from, against brute force, on a world of one rank."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens

VOCAB, DRAWS = 12, 20000


@pytest.fixture(scope="module")
def shard():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield VocabShard(group=dist.group.WORLD, start=0, num_real=VOCAB, num_total=VOCAB)
    dist.destroy_process_group()


def allowed(logits, rule):
    """Probabilities after temperature, top-k and top-p, one token at a time."""
    probabilities = (logits / rule.temperature).softmax(-1).tolist()
    ranked = sorted(range(VOCAB), key=lambda i: -probabilities[i])
    ranked = ranked[: rule.top_k] if rule.top_k else ranked
    kept, mass, total = [], 0.0, sum(probabilities[i] for i in ranked)
    for index in ranked:
        if mass >= rule.top_p:
            break
        kept.append(index)
        mass += probabilities[index] / total
    share = sum(probabilities[i] for i in kept)
    return torch.tensor([probabilities[i] / share if i in kept else 0.0 for i in range(VOCAB)])


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(temperature=1.0),
        SamplingRule(temperature=0.5),
        SamplingRule(temperature=1.0, top_k=4),
        SamplingRule(temperature=1.5, top_p=0.7),
        SamplingRule(temperature=1.0, top_k=6, top_p=0.6),
        SamplingRule(temperature=1.0, top_k=100),
    ],
)
def test_evenly_spread_numbers_give_the_wanted_frequencies(shard, rule):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    numbers = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = sample_tokens(logits.expand(DRAWS, -1), numbers, rule=rule, shard=shard)
    frequencies, wanted = found.tokens.bincount(minlength=VOCAB) / DRAWS, allowed(logits, rule)
    assert torch.allclose(frequencies, wanted, atol=2.0 / DRAWS * VOCAB)
    assert torch.allclose(found.logprobs, wanted.log()[found.tokens], atol=1e-5)
    unfiltered = (logits / rule.temperature).log_softmax(-1)
    assert torch.allclose(found.full_logprobs, unfiltered[found.tokens], atol=1e-5)
    assert found.kept is None
    recorded = sample_tokens(
        logits.expand(2, -1), numbers[:2], rule=replace(rule, record_kept=True), shard=shard
    ).kept
    if not rule.is_filtered:
        assert recorded is None
    else:
        kept = read_mask(recorded, start=0, count=VOCAB)
        assert torch.equal(kept, (wanted > 0).expand(2, -1))


def test_the_policy_draws_from_what_a_mask_policy_keeps(shard):
    """Its top-p, at least three tokens and the end token, each by its own probability."""
    logits, older = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(6)) * 2
    end = int(older.argmin())
    rule = SamplingRule(
        temperature=0.8, top_p=0.3, min_kept=3, always_kept=(end,), record_kept=True
    )
    kept = {*older.argsort(descending=True)[:3].tolist(), end}
    assert (allowed(older, replace(rule, top_p=0.3)) > 0).sum() < 3
    wanted = torch.tensor([i in kept for i in range(VOCAB)])
    wanted = torch.where(wanted, (logits / 0.8).exp(), 0.0)
    wanted = wanted / wanted.sum()
    numbers = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = sample_tokens(
        logits.expand(DRAWS, -1), numbers, rule=rule, shard=shard, second=older.expand(DRAWS, -1)
    )
    frequencies = found.tokens.bincount(minlength=VOCAB) / DRAWS
    assert torch.allclose(frequencies, wanted, atol=2.0 / DRAWS * VOCAB)
    assert torch.allclose(found.logprobs, wanted.log()[found.tokens], atol=1e-5)
    full = (logits / 0.8).log_softmax(-1)[found.tokens]
    assert torch.allclose(found.full_logprobs, full, atol=1e-5)
    assert {int(i) for i in read_mask(found.kept[:1], start=0, count=VOCAB)[0].nonzero()} == kept


@pytest.mark.parametrize("mixture", [0.125, 0.5])
def test_a_mixture_is_the_geometric_mean_of_two_models(shard, mixture):
    logits, other = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(7)) * 2
    rule = SamplingRule(temperature=1.0, mixture=mixture)
    wanted = logits.softmax(-1) ** (1 - mixture) * other.softmax(-1) ** mixture
    wanted = wanted / wanted.sum()
    numbers = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = sample_tokens(
        logits.expand(DRAWS, -1), numbers, rule=rule, shard=shard, second=other.expand(DRAWS, -1)
    )
    frequencies = found.tokens.bincount(minlength=VOCAB) / DRAWS
    assert torch.allclose(frequencies, wanted, atol=2.0 / DRAWS * VOCAB)
    assert torch.allclose(found.logprobs, wanted.log()[found.tokens], atol=1e-5)


def test_filtered_log_probs_are_those_of_the_worked_example(shard):
    """Logits 2 1 0 -1, of which top-k 2 keeps the first two."""
    four = replace(shard, num_real=4, num_total=4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(2, -1)
    rule = SamplingRule(temperature=1.0, top_k=2)
    found = sample_tokens(logits, torch.tensor([0.1, 0.9]).double(), rule=rule, shard=four)
    assert found.tokens.tolist() == [0, 1]
    assert found.logprobs.tolist() == pytest.approx([-0.313262, -1.313262], abs=1e-6)
    assert found.full_logprobs.tolist() == pytest.approx([-0.440190, -1.440190], abs=1e-6)


def test_temperature_zero_takes_the_best_and_scores_it_at_temperature_one(shard):
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4))
    rule = SamplingRule(temperature=0.0)
    found = sample_tokens(logits, torch.rand(5).double(), rule=rule, shard=shard)
    assert torch.equal(found.tokens, logits.argmax(-1))
    assert torch.allclose(found.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-6)


def test_of_equal_logits_at_the_edge_those_with_the_smaller_ids_stay(shard):
    """Logits of a low-precision model are often equal; shards of another layout keep the same."""
    size, kept = 1000, 20
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(size, generator=generator).bfloat16().float()
    ranked = sorted(range(size), key=lambda i: (-logits[i].item(), i))
    assert logits[ranked[kept - 1]] == logits[ranked[kept]]
    numbers = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = sample_tokens(
        logits.expand(DRAWS, -1),
        numbers,
        rule=SamplingRule(temperature=1.0, top_k=kept),
        shard=replace(shard, num_real=size, num_total=size),
    )
    assert set(found.tokens.tolist()) == set(ranked[:kept])
