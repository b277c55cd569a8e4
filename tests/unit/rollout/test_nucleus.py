"""Top-p on shards of a vocabulary, each in a thread of its own, against sorting all of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from tests.unit.rollout.shards import sampled


def drawn(logits, uniform, top_p):
    """Token, its log-prob among the kept ones and among all, and the kept ones, one by one."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    total = math.fsum(math.exp(x) for x in logits)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += math.exp(logits[token]) / total
    below, target = 0.0, uniform * mass
    for token in kept:
        below += math.exp(logits[token]) / total
        if below > target:
            break
    full = logits[token] - math.log(total)
    return token, full - math.log(mass), full, set(kept)


@st.composite
def cases(draw):
    vocab = draw(st.integers(1, 60))
    ranks = draw(st.sampled_from([2, 3, 4]))
    least = -(-vocab // ranks)
    width = draw(st.integers(least, least + 8))
    # Few values: many tokens are equally likely, in one shard and across shards.
    scale = draw(st.sampled_from([0.01, 0.5, 3.0]))
    row = st.lists(st.integers(-4, 4), min_size=vocab, max_size=vocab)
    logits = [[scale * x for x in draw(row)] for _ in range(2)]
    # Not at a border between tokens, where rounding would decide.
    top_p = draw(st.integers(0, 999)) / 1000 + 0.000271828
    uniform = [draw(st.integers(0, 999)) / 1000 + 0.000314159 for _ in range(2)]
    return logits, uniform, min(top_p, 0.9999), ranks, width


@given(cases())
def test_it_draws_what_sorting_the_whole_vocabulary_draws(case):
    logits, uniform, top_p, ranks, width = case
    found = sampled(
        torch.tensor(logits),
        torch.tensor(uniform, dtype=torch.float64),
        ranks=ranks,
        width=width,
        rule=SamplingRule(temperature=1.0, top_p=top_p, record_kept=True),
    )
    exact = torch.tensor(logits).tolist()  # rounded to float32, as the ranks see them
    for number, row in enumerate(exact):
        token, logprob, full, kept = drawn(row, uniform[number], top_p)
        for rank in found:
            assert rank.tokens[number] == token
            assert float(rank.logprobs[number]) == pytest.approx(logprob, abs=2e-6)
            assert float(rank.full_logprobs[number]) == pytest.approx(full, abs=2e-6)
            flags = read_mask(rank.kept, start=0, count=len(row))[number]
            assert set(flags.nonzero()[:, 0].tolist()) == kept


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_layouts_draw_the_same_from_a_large_vocabulary(scale):
    vocab, rows = 5003, 64
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).bfloat16().float()
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    rule = SamplingRule(temperature=0.7, top_p=0.93, record_kept=True)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    whole = VocabShard(group=group, start=0, num_real=vocab, num_total=vocab)
    alone = sample_tokens(logits, uniform, rule=rule, shard=whole)
    for ranks, width in [(2, 2560), (8, 640)]:
        for rank in sampled(logits, uniform, ranks=ranks, width=width, rule=rule):
            assert torch.equal(rank.tokens, alone.tokens)
            assert torch.equal(rank.kept, alone.kept)
            torch.testing.assert_close(rank.logprobs, alone.logprobs, rtol=0, atol=1e-5)
