"""Tokens drawn from shards of a vocabulary, against one token after the other of all of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from tests.unit.rollout.shards import sampled


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
