"""Tensor-parallel ranks that sample, each in a thread of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import torch

from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout import nucleus, sampling
from marlhf_mega.rollout.decoder import NOTHING

COLLECTIVES = {
    *("gather_columns", "gather_stacked"),
    *("reduce_over_tensor", "max_over_tensor", "min_over_tensor"),
}


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

    def gather_stacked(self, value, group):
        return torch.stack(self.exchange(value, group.rank()))

    def reduce_over_tensor(self, value, group):
        return value.copy_(sum(self.exchange(value, group.rank())))

    def max_over_tensor(self, value, group):
        return value.copy_(self.gather_stacked(value, group).amax(0))

    def min_over_tensor(self, value, group):
        return value.copy_(self.gather_stacked(value, group).amin(0))

    def run(self, act):
        """Return what `act` gives each rank."""
        for module in (nucleus, sampling):
            for name in COLLECTIVES & vars(module).keys():
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
        return sampling.sample_tokens(own, uniform, rule=rule, shard=shard)

    return World(ranks).run(one)
