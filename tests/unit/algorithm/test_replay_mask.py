"""Which tokens were kept, written down and read back, against plain sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.replay_mask import mask_width, read_mask, write_mask
from marlhf_mega.config.limits import replay_mask_row_bytes


@given(data=st.data(), vocab_size=st.integers(1, 40), top_k=st.integers(0, 12))
def test_any_shard_reads_what_was_kept(data, vocab_size, top_k):
    count = min(top_k, vocab_size) if top_k else vocab_size
    rows = data.draw(st.integers(1, 3))
    ids = torch.stack(
        [torch.tensor(data.draw(st.permutations(range(vocab_size))))[:count] for _ in range(rows)]
    )
    flags = [data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in ids]
    kept = torch.tensor(flags).view(rows, count)
    written = write_mask(ids, kept, top_k=top_k, vocab_size=vocab_size)
    width, dtype = mask_width(top_k=top_k, vocab_size=vocab_size)
    assert (written.shape, written.dtype) == ((rows, width), dtype)
    assert written[0].nbytes == replay_mask_row_bytes(top_k=top_k, vocab_size=vocab_size)
    start = data.draw(st.integers(0, vocab_size))
    size = data.draw(st.integers(0, vocab_size - start))
    found = read_mask(written, start=start, count=size)
    for row in range(rows):
        wanted = {int(i) for i, k in zip(ids[row], kept[row], strict=True) if k}
        assert [start + int(i) for i in found[row].nonzero()] == sorted(
            wanted & set(range(start, start + size))
        )


@pytest.mark.parametrize(("top_k", "size"), [(50, 200), (0, 4000)])
def test_a_position_takes_four_bytes_an_id_or_a_bit_a_token(top_k, size):
    assert replay_mask_row_bytes(top_k=top_k, vocab_size=32000) == size
