"""Top-p on shards of a vocabulary, each in a thread of its own, against sorting all of it."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout import nucleus, sampling
from marlhf_mega.rollout.decoder import NOTHING
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens


class World:
    """Ranks in threads, whose collectives wait for each other."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=300)
        self.parts = [None] * size

    def exchange(self, value, rank):
        self.parts[rank] = value.clone()
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def gather_columns(self, value, group):
        return torch.cat(self.exchange(value, group.rank()), dim=-1)

    def reduce_over_tensor(self, value, group):
        return value.copy_(sum(self.exchange(value, group.rank())))

    def run(self, act):
        """Return what `act` gives each rank."""
        names = ("gather_columns", "reduce_over_tensor")
        for module in (nucleus, sampling):
            for name in names:
                patch.object(module, name, getattr(self, name)).start()
        try:
            with ThreadPoolExecutor(self.size) as threads:
                return list(threads.map(act, range(self.size)))
        finally:
            patch.stopall()


def sampled(logits, uniform, *, ranks, width, rule):
    """What every rank says of logits [batch, vocab] on shards of `width` columns."""
    vocab = logits.shape[1]

    def one(rank):
        start = min(rank * width, vocab)
        group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
        own = logits[:, start : start + width]
        shard = VocabShard(group=group, start=rank * width, num_real=own.shape[1], num_total=vocab)
        own = own if own.shape[1] else torch.full((len(logits), 1), NOTHING)
        return sample_tokens(own, uniform, rule=rule, shard=shard)

    return World(ranks).run(one)


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
