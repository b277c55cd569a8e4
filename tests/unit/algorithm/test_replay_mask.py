"""Which tokens were kept, written down and read back, against plain sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.replay_mask import mask_width, nucleus_mask, read_mask, write_mask
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


def test_the_policy_is_renormalised_over_what_the_mask_policy_leaves():
    """Mask policy with logits 2 1 0 -1, top-p 0.8: tokens 0 and 1; the policy's are 1.9 1.1 ..."""
    older = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64).softmax(-1)
    tokens = torch.arange(4)[None]
    mask = nucleus_mask(tokens, older, top_p=0.8, min_kept=1)
    assert mask.tolist() == [[True, True, False, False]]
    logits = torch.tensor([[1.9, 1.1, 0.1, -1.0]], dtype=torch.float64)
    kept = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    assert kept[0, :2].tolist() == pytest.approx([-0.371100666, -1.171100666], abs=1e-9)


@given(data=st.data(), size=st.integers(1, 12))
def test_a_nucleus_is_found_token_by_token(data, size):
    weights = data.draw(st.lists(st.integers(1, 50), min_size=size, max_size=size))
    top_p = data.draw(st.floats(0.05, 0.99))
    least = data.draw(st.integers(1, 5))
    always = data.draw(st.sets(st.integers(0, size - 1)))
    tokens = sorted(range(size), key=lambda i: -weights[i])
    shares = [weights[i] / sum(weights) for i in tokens]
    wanted, mass = set(always), 0.0
    for rank, (token, share) in enumerate(zip(tokens, shares, strict=True)):
        if mass < top_p - 1e-9 or rank < least:
            wanted.add(token)
        elif mass < top_p + 1e-9:
            return  # rounding decides
        mass += share
    found = nucleus_mask(
        torch.tensor([tokens]),
        torch.tensor([shares], dtype=torch.float64),
        top_p=top_p,
        min_kept=least,
        always_kept=sorted(always),
    )
    assert {int(i) for i in found[0].nonzero()} == wanted
