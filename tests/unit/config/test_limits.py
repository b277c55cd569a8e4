"""Sizes that the run and the planner share, by hand and by search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.config.limits import (
    context_multiple,
    logits_chunk_tokens,
    padded_vocab_size,
    paged_cache_bytes,
    round_up,
)


@given(st.integers(0, 500), st.integers(1, 60))
def test_rounding_up_finds_the_next_multiple(value, multiple):
    assert round_up(value, multiple) == next(
        n for n in range(value, value + multiple) if n % multiple == 0
    )


def test_a_cache_in_pages_holds_the_longest_sequences_and_a_page_more():
    """2 layers, keys and values, 3 sequences of 2 pages of 128 tokens, 64 wide, 4 bytes."""
    sizes = {"layers": 2, "width": 64, "slots": 3, "element": 4}
    assert paged_cache_bytes(tokens=129, **sizes) == 2 * 2 * 64 * (3 * 2 + 1) * 128 * 4
    assert paged_cache_bytes(tokens=128, **sizes) == 2 * 2 * 64 * (3 * 1 + 1) * 128 * 4


def test_every_shard_of_a_vocabulary_is_a_multiple_of_16():
    # Llama-3's vocabulary is a multiple of 16 x 8 already, GPT-2's of nothing.
    assert padded_vocab_size(128_256, 8) == 128_256
    assert padded_vocab_size(50_257, 1) == 50_272
    assert padded_vocab_size(50_257, 4) == 50_304


@pytest.mark.parametrize(
    ("columns", "on_gpu", "on_cpu"),
    [
        (128_256, 1046, 128),  # 2**27 / 128256 = 1046.5; 2**22 / 128256 is below 128
        (16_032, 8371, 261),
        (2**24, 16, 16),  # never fewer than 16
    ],
)
def test_logits_are_computed_in_chunks_of_512_mib_or_a_cpus_cache(columns, on_gpu, on_cpu):
    assert logits_chunk_tokens(columns, on_cpu=False) == on_gpu
    assert logits_chunk_tokens(columns, on_cpu=True) == on_cpu


def test_ranks_that_share_a_sequence_hold_two_pieces_each():
    assert [context_multiple(size) for size in (1, 2, 4)] == [1, 4, 8]
