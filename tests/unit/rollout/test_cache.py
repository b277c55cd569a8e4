"""Keys and values in slots, against attention over each whole sequence in float64."""

import pytest
import torch

from marlhf_mega.models.layers import SdpaAttention
from marlhf_mega.models.spec import AttnMaskType, TransformerConfig
from marlhf_mega.rollout.cache import KeyValueCache
from marlhf_mega.rollout.work import Decode, Prefill

GROUPS, PER_GROUP, WIDTH, SLOTS, MOST_TOKENS = 2, 3, 4, 4, 24
CPU = torch.device("cpu")
DRAWS = torch.Generator().manual_seed(0)


def attention(**options):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=GROUPS * PER_GROUP * WIDTH,
        num_attention_heads=GROUPS * PER_GROUP,
        num_query_groups=GROUPS,
    )
    return SdpaAttention(config, 1, AttnMaskType.causal, **options)


def drawn(seq, batch):
    """Query, key and value of new tokens."""
    return (
        torch.randn(seq, batch, GROUPS, PER_GROUP, WIDTH, generator=DRAWS),
        *torch.randn(2, seq, batch, GROUPS, WIDTH, generator=DRAWS).unbind(),
    )


def attended(query, keys, values, *, window, softcap):
    """What the last token of one sequence gets: [heads * head_dim]."""
    first = 0 if window is None else max(0, len(keys) - window)
    keys, values = torch.stack(keys).double()[first:], torch.stack(values).double()[first:]
    scores = torch.einsum("gpd,tgd->gpt", query.double(), keys) * WIDTH**-0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return torch.einsum("gpt,tgd->gpd", scores.softmax(-1), values).flatten()


class Histories:
    """Keys and values of every slot's sequence, from its first token on."""

    def __init__(self, options):
        self.options = options
        self.keys, self.values = [[[] for _ in range(SLOTS)] for _ in range(2)]

    def add(self, slot, query, key, value):
        self.keys[slot].append(key)
        self.values[slot].append(value)
        return attended(query, self.keys[slot], self.values[slot], **self.options)

    def start(self, slot, tensors, row, length):
        self.keys[slot], self.values[slot] = [], []
        return torch.stack([self.add(slot, *(x[t, row] for x in tensors)) for t in range(length)])


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 1.5)])
def test_prompts_and_tokens_see_their_own_sequences(window, softcap):
    cache = KeyValueCache(
        [attention(window=window, softcap=softcap)],
        shape=(SLOTS, GROUPS, MOST_TOKENS, WIDTH),
        dtype=torch.float32,
        device=CPU,
    )
    histories = Histories({"window": window, "softcap": softcap})

    def prefill(first_slot, rows, lengths):
        width = max(lengths)
        work = Prefill(
            tokens=torch.zeros(max(rows) + 1, width, dtype=torch.int64),
            rows=torch.tensor(rows),
            lengths=torch.tensor(lengths),
            first_slot=first_slot,
        )
        tensors = drawn(width, max(rows) + 1)
        (mask,) = cache.masks(work)
        found = cache.attend(0, tensors, work, mask)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            wanted = histories.start(first_slot + number, tensors, row, length)
            torch.testing.assert_close(found[:length, row].double(), wanted, rtol=0, atol=1e-5)

    def decode(num_slots):
        positions = [len(keys) for keys in histories.keys[:num_slots]]
        work = Decode(
            tokens=torch.zeros(num_slots, 1, dtype=torch.int64),
            positions=torch.tensor(positions),
            longest=max(positions) + 1,
        )
        tensors = drawn(1, num_slots)
        (mask,) = cache.masks(work)
        found = cache.attend(0, tensors, work, mask)
        for slot in range(num_slots):
            wanted = histories.add(slot, *(x[0, slot] for x in tensors))
            torch.testing.assert_close(found[0, slot].double(), wanted, rtol=0, atol=1e-5)

    prefill(0, [0], [9])
    prefill(1, [0, 0, 1], [6, 6, 2])
    for _ in range(9):
        decode(4)
    cache.move_slot(3, 1)
    histories.keys[1], histories.values[1] = histories.keys[3][:], histories.values[3][:]
    decode(3)
    prefill(3, [0], [4])
    decode(4)
    assert cache.nbytes == 2 * SLOTS * GROUPS * MOST_TOKENS * WIDTH * 4
