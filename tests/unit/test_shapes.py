"""How many shapes of attention a GPU sees: kernels are planned for each, which takes seconds."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.limits import gpu_rows, gpu_width
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import make_batches
from marlhf_mega.models.packing import Packing

PROMPT, RESPONSE = 512, 1024
STEPS, SAMPLES, MINIBATCH = 16, 32, 16


def rank(device, stages=1):
    return SimpleNamespace(
        pp_size=stages,
        num_chunks=1,
        ep_size=1,
        sequence_multiple=8,
        context_multiple=1,
        device=torch.device(device),
    )


def draws():
    """Lengths of prompts and responses of every step; responses get longer, as in training."""
    source = random.Random(4)
    for step in range(STEPS):
        yield [
            (
                min(PROMPT, int(source.lognormvariate(5, 0.6)) + 8),
                min(RESPONSE, int(source.lognormvariate(4 + 2 * step / STEPS, 0.8)) + 1),
            )
            for _ in range(SAMPLES)
        ]


def attention_shapes(limit, mesh, *, factor=1):
    """What the attention kernel is called with in scoring passes and updates of a run."""
    found, tokens, real = set(), 0, 0
    larger = MicrobatchLimit(
        sequences=limit.sequences * factor,
        tokens=limit.tokens and limit.tokens * factor,
        packed=limit.packed,
    )
    for lengths in draws():
        groups = [lengths[i : i + MINIBATCH] for i in range(0, SAMPLES, MINIBATCH)]
        for drawn, most in ((lengths, larger), *((group, limit) for group in groups)):
            prompts, responses = [[1] * p for p, _ in drawn], [[2] * r for _, r in drawn]
            batches = make_batches(prompts, responses, limit=most, mesh=mesh)
            rows = [m.batch.tokens.shape for m in batches.microbatches]
            if mesh.pp_size > 1:
                assert len(set(rows)) == 1
            for microbatch, (count, width) in zip(batches.microbatches, rows, strict=True):
                tokens, real = tokens + count * width, real + 1
                if most.tokens is not None:
                    assert count * width <= most.tokens
                lengths_here = microbatch.batch.lengths
                if lengths_here is None or (len(lengths_here) == 1 and sum(lengths_here) == width):
                    found.add(("rows", count, width))
                    continue
                packing = Packing.of(lengths_here, width=width, device=torch.device("cpu"))
                given = packing.for_engine()
                assert int(given.cu_seqlens_q[-1]) == width
                found.add(("packed", width, len(given.cu_seqlens_q), given.max_seqlen_q))
    return found, tokens


@pytest.mark.parametrize(
    ("limit", "factor"),
    [
        (MicrobatchLimit(sequences=4, packed=True), 1),
        (MicrobatchLimit(sequences=1, tokens=8192, packed=True), 2),
    ],
    ids=["sequences", "tokens"],
)
@pytest.mark.parametrize("stages", [1, 4])
def test_a_run_has_few_shapes(limit, factor, stages):
    found, tokens = attention_shapes(limit, rank("meta", stages), factor=factor)
    assert len(found) < 24, sorted(found)
    exact, needed = attention_shapes(limit, rank("cpu"), factor=factor)
    assert len(exact) > 3 * len(found)
    if stages == 1:
        assert tokens < 1.2 * needed


@pytest.mark.parametrize(
    ("limit", "factor", "most", "more"),
    [
        (MicrobatchLimit(sequences=4), 1, 13, 1.09),
        (MicrobatchLimit(sequences=16), 2, 15, 1.08),
        # Without rounding the rows 54: a budget holds another number of every width.
        (MicrobatchLimit(sequences=1, tokens=8192), 2, 35, 1.2),
    ],
    ids=["4 sequences", "16 sequences", "tokens"],
)
def test_padded_rows_have_few_shapes(limit, factor, most, more):
    found, tokens = attention_shapes(limit, rank("meta"), factor=factor)
    assert len(found) <= most, sorted(found)
    exact, needed = attention_shapes(limit, rank("cpu"), factor=factor)
    assert len(exact) > 2 * len(found)
    assert tokens < more * needed


@pytest.mark.parametrize("group", [1, 2])
def test_rows_are_made_up_by_fillers_and_each_sequence_comes_once(group):
    lengths = [9, 2, 4, 7, 5, 6, 3, 8, 1, 2]
    limit = MicrobatchLimit(sequences=12)
    prompts, responses = [[1]] * 10, [[2] * n for n in lengths]
    (part,) = make_batches(
        prompts, responses, limit=limit, mesh=rank("meta"), group=group
    ).microbatches
    assert sorted(part.indices[:10].tolist()) == [*range(10)]
    # Ten rows become 12, five pairs 6 pairs.
    assert part.indices[10:].tolist() == [10, 10]
    assert part.batch.tokens.shape == (12, 64)
    many = make_batches([[1]] * 11, [[2]] * 11, limit=limit, mesh=rank("meta"))
    assert [len(part.indices) for part in many.microbatches] == [12]


def test_numbers_of_rows_by_hand():
    rows = [gpu_rows(count, most=100) for count in range(1, 101)]
    assert sorted(set(rows)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(count <= few <= 1.5 * count for count, few in enumerate(rows, start=1))
    assert gpu_rows(5, most=5) == 5


@pytest.mark.parametrize("packed", [True, False])
def test_widths_by_hand(packed):
    widths = {gpu_width(tokens, packed=packed) for tokens in range(1, 8193)}
    if packed:
        assert sorted(widths) == [*range(512, 8193, 512)]
    else:
        assert sorted(widths)[:9] == [64, 128, 192, 256, 320, 384, 448, 512, 640]
        assert len(widths) == 8 + 4 * math.log2(8192 / 512)
    for tokens in (1, 513, 5000, 8192):
        assert tokens <= gpu_width(tokens, packed=packed) < 1.25 * tokens + 512
    assert gpu_width(5001, packed=packed, most=5010) == 5010
    assert gpu_width(16385, packed=True) == 18432
