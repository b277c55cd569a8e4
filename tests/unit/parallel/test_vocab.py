"""Chunked log-probs and entropy against the whole softmax, on a world of one rank."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from marlhf_mega.algorithm.replay_mask import write_mask
from marlhf_mega.config import limits
from marlhf_mega.parallel.vocab import VocabShard, vocab_parallel_logprobs

TOKENS, HIDDEN, VOCAB = 11, 6, 23


@pytest.fixture(scope="module")
def shard():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield VocabShard(group=dist.group.WORLD, start=0, num_real=VOCAB, num_total=VOCAB)
    dist.destroy_process_group()


def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    # Rows beyond the vocabulary are padding: enormous, so that a leak would show.
    weight = torch.randn(32, HIDDEN, generator=generator)
    weight[VOCAB:] = 100.0
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    pull = torch.randn(2, TOKENS, generator=generator)
    return hidden, weight.requires_grad_(), targets, pull


def whole(hidden, weight, targets, temperature, softcap):
    logits = hidden.double() @ weight[:VOCAB].double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    table = (logits / temperature).log_softmax(-1)
    return table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("chunk_elements", [1, 5 * VOCAB, 1 << 20])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.0)])
def test_values_and_gradients_are_those_of_the_whole_softmax(
    shard, monkeypatch, chunk_elements, temperature, softcap
):
    monkeypatch.setattr(limits, "LOGITS_CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets, pull = case()
    expected = whole(hidden, weight, targets, temperature, softcap)
    wanted = torch.autograd.grad((torch.stack(expected) * pull).sum(), (hidden, weight))
    found = vocab_parallel_logprobs(
        hidden, weight, targets, shard=shard, temperature=temperature, softcap=softcap
    )
    given = torch.autograd.grad((torch.stack(found) * pull).sum(), (hidden, weight))
    for mine, other in zip((*found, *given), (*expected, *wanted), strict=True):
        assert torch.allclose(mine.double(), other.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [4, 0])
@pytest.mark.parametrize("chunk_elements", [1, 5 * VOCAB, 1 << 20])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 2.0)])
def test_what_filters_kept_is_renormalised_with_exact_gradients(
    shard, monkeypatch, chunk_elements, temperature, softcap, top_k
):
    monkeypatch.setattr(limits, "LOGITS_CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets, _ = case()
    generator = torch.Generator().manual_seed(1)
    others = torch.rand(TOKENS, VOCAB, generator=generator).topk(3).indices
    ids = torch.cat([targets[:, None], others], 1)
    rows = write_mask(ids, torch.ones_like(ids).bool(), top_k=top_k, vocab_size=VOCAB)
    kept = torch.zeros(TOKENS, VOCAB).bool().scatter_(1, ids, True)
    logits = hidden.double() @ weight[:VOCAB].double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scaled = logits / temperature
    table = scaled.masked_fill(~kept, -1e4).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    expected = [t.gather(1, targets[:, None])[:, 0] for t in (table, scaled.log_softmax(-1))]
    expected.insert(1, entropy)
    pull = torch.randn(3, TOKENS, generator=generator)
    wanted = torch.autograd.grad((torch.stack(expected) * pull).sum(), (hidden, weight))
    found = vocab_parallel_logprobs(
        hidden, weight, targets, shard=shard, temperature=temperature, softcap=softcap, kept=rows
    )
    given = torch.autograd.grad((torch.stack(found) * pull).sum(), (hidden, weight))
    for mine, other in zip((*found, *given), (*expected, *wanted), strict=True):
        assert torch.allclose(mine.double(), other.double(), atol=2e-5, rtol=1e-5)


def test_the_ratio_of_kept_tokens_is_that_of_the_worked_example(shard):
    """Sampler 2 1 0 -1, trainer 1.9 1.1 0.1 -1, kept {0, 1}: without replay it would be 1.0006."""
    logits = torch.tensor([[1.9, 1.1, 0.1, -1.0]])
    four = replace(shard, num_real=4, num_total=4)
    kept = write_mask(torch.tensor([[0, 1]]), torch.tensor([[True, True]]), top_k=2, vocab_size=4)
    logprob, _, full = vocab_parallel_logprobs(
        logits, torch.eye(4), torch.tensor([1]), shard=four, kept=kept
    )
    assert logprob.item() == pytest.approx(-1.171101, abs=1e-6)
    assert (logprob + 1.313262).exp().item() == pytest.approx(1.152762, abs=1e-5)
    assert (full + 1.440190).exp().item() != pytest.approx(1.152762, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("softcap", "filtered", "chunks"),
    [(None, False, 2), (2.0, False, 4), (None, True, 3.5), (2.0, True, 5.5)],
)
def test_backward_holds_as_many_copies_of_one_chunks_logits_as_planned(
    shard, monkeypatch, dtype, softcap, filtered, chunks
):
    tokens, hidden_size, columns = 256, 8, 1024
    monkeypatch.setattr(limits, "LOGITS_CHUNK_ELEMENTS", tokens * columns // 4)
    wide = VocabShard(group=shard.group, start=0, num_real=columns, num_total=columns)
    hidden, weight = (torch.ones(n, hidden_size, dtype=dtype) for n in (tokens, columns))
    found = vocab_parallel_logprobs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.zeros(tokens, dtype=torch.long),
        shard=wide,
        softcap=softcap,
        kept=torch.full((tokens, 4), 255, dtype=torch.uint8).repeat(1, 32) if filtered else None,
    )
    loss = torch.stack(found).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(itertools.accumulate(change for _, change in changes))
    chunk = tokens * columns // 4 * 4
    assert chunks - 1 < peak / chunk < chunks + 0.4  # the gradients are a small part of a chunk


def test_padding_gets_no_gradient(shard):
    hidden, weight, targets, _ = case()
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, targets, shard=shard)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad[VOCAB:].abs().max() == 0
    assert weight.grad[:VOCAB].abs().max() > 0


@pytest.mark.parametrize(
    ("vocab_size", "tensor_size", "padded"), [(128256, 8, 128256), (50, 2, 64), (67, 4, 128)]
)
def test_the_vocabulary_is_padded_to_whole_shards(vocab_size, tensor_size, padded):
    assert limits.padded_vocab_size(vocab_size, tensor_size) == padded


def test_the_gradient_without_entropy_is_that_with_an_entropy_of_no_weight(shard):
    hidden, weight, targets, pull = case()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, targets, shard=shard, temperature=0.7
    )
    alone = torch.autograd.grad((logprobs * pull[0]).sum(), (hidden, weight), retain_graph=True)
    almost = (logprobs * pull[0]).sum() + 1e-30 * entropy.sum()
    both = torch.autograd.grad(almost, (hidden, weight))
    for mine, other in zip(alone, both, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "on_cpu", "tokens"),
    [(4096, False, 32768), (4096, True, 1024), (65536, True, 128), (262144, True, 128)],
)
def test_a_chunk_fits_the_cache_unless_the_vocabulary_is_too_large(columns, on_cpu, tokens):
    assert limits.logits_chunk_tokens(columns, on_cpu=on_cpu) == tokens
