"""The distribution that tokens are drawn from, against brute force, whole and on shards."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from tests.unit.rollout.shards import sampled

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


def drawn(logits, uniform):
    """The first token, in id order, at which the cumulative probability passes the number."""
    highest = max(logits)
    weights = [math.exp(x - highest) for x in logits]
    below, target = 0.0, uniform * math.fsum(weights)
    for token, weight in enumerate(weights):
        below += weight
        if below > target:
            return token, logits[token] - highest - math.log(math.fsum(weights))
    raise AssertionError


@st.composite
def cases(draw):
    vocab, ranks = draw(st.integers(1, 40)), draw(st.sampled_from([2, 3, 4]))
    least = -(-vocab // ranks)
    # Wide shards leave the last ranks without a column; a great scale leaves some without weight.
    width, scale = draw(st.integers(least, least + 8)), draw(st.sampled_from([0.5, 30.0, 400.0]))
    row = st.lists(st.integers(-4, 4), min_size=vocab, max_size=vocab)
    logits = [[scale * x for x in draw(row)] for _ in range(2)]
    # Not at a border between tokens, where rounding would decide.
    uniform = [draw(st.integers(0, 999)) / 1000 + 0.000314159 for _ in range(2)]
    return logits, uniform, ranks, width


@given(cases())
def test_shards_draw_what_the_whole_vocabulary_draws(case):
    logits, uniform, ranks, width = case
    numbers = torch.tensor(uniform, dtype=torch.float64)
    rule = SamplingRule(temperature=1.0)
    for rank in sampled(torch.tensor(logits), numbers, ranks=ranks, width=width, rule=rule):
        for number, row in enumerate(logits):
            token, logprob = drawn(row, uniform[number])
            assert rank.tokens[number] == token
            assert float(rank.logprobs[number]) == pytest.approx(logprob, abs=2e-6)
        assert torch.equal(rank.logprobs, rank.full_logprobs)


@given(cases())
def test_shards_take_the_most_likely_token_of_equal_ones_the_first(case):
    logits, uniform, ranks, width = case
    numbers = torch.tensor(uniform, dtype=torch.float64)
    rule = SamplingRule(temperature=0.0)
    for rank in sampled(torch.tensor(logits), numbers, ranks=ranks, width=width, rule=rule):
        for number, row in enumerate(logits):
            assert rank.tokens[number] == row.index(max(row))
            wanted = -math.log(math.fsum(math.exp(x - max(row)) for x in row))
            assert float(rank.logprobs[number]) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize(("ranks", "width"), [(2, 20), (4, 16)])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_smallest_and_the_largest_number_give_a_token(ranks, width, number):
    """Rounding up to the whole weight must not give a token behind the last one."""
    logits = torch.randn(500, 37, generator=torch.Generator().manual_seed(2))
    logits[:, :3] = -2000.0  # no weight: not even the smallest number gives these
    uniform = torch.full((500,), number, dtype=torch.float64)
    rule = SamplingRule(temperature=1.0)
    for rank in sampled(logits, uniform, ranks=ranks, width=width, rule=rule):
        assert set(rank.tokens.tolist()) == ({3} if number == 0 else {36})
        assert rank.logprobs.isfinite().all()


def test_layouts_draw_the_same_from_a_large_vocabulary():
    vocab, rows = 5003, 2000
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(rows, vocab, generator=generator) * 3).bfloat16().float()
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    whole = VocabShard(group=group, start=0, num_real=vocab, num_total=vocab)
    for temperature in (1.0, 0.7, 0.0):
        rule = SamplingRule(temperature=temperature)
        alone = sample_tokens(logits, uniform, rule=rule, shard=whole)
        for ranks, width in [(2, 2560), (4, 1264), (8, 640)]:
            for rank in sampled(logits, uniform, ranks=ranks, width=width, rule=rule):
                assert torch.equal(rank.tokens, alone.tokens)
                torch.testing.assert_close(rank.logprobs, alone.logprobs, rtol=2e-7, atol=1e-6)


def test_a_model_that_diverged_gives_log_probs_that_are_no_numbers():
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    logits[1, 7] = torch.nan
    uniform = torch.full((2,), 0.5, dtype=torch.float64)
    for rank in sampled(logits, uniform, ranks=3, width=4, rule=SamplingRule(temperature=1.0)):
        assert rank.logprobs.isnan().tolist() == [False, True]
        assert 0 <= rank.tokens[1] < 12
