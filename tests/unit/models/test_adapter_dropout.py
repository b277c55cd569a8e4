"""What adapters drop, against the draws written out one by one. Layouts: test_layouts.py."""

import numpy
import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_adapters, fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.adapter_dropout import dropping, kept_inputs, token_keys
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.lora import adapters_of, merge_for_good
from marlhf_mega.models.packing import Packing
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.unit.algorithm.test_counter_rng import WORD, splitmix64

PROMPTS, RESPONSES = [[5, 6, 7], [8], [5, 6]], [[1, 2], [3, 4, 5, 0], [7, 1, 2]]
SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 4,
    "ffn_hidden_size": 20,
    "vocab_size": 30,
    "init_std": 0.3,
}
DROPOUT = 0.3


def folded(*keys):
    state = 0
    for key in keys:
        state = splitmix64((key + state) % WORD)
    return state


def keys_by_hand(seed):
    """A key of each token of each sequence."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = [*prompt, *response]
        content = sum(folded(token, place) for place, token in enumerate(tokens)) % WORD
        found.append([folded(seed, content, place) for place in range(len(tokens))])
    return found


def kept_by_hand(key, projection, feature):
    """Sixteen of the 64 bits of a draw are a whole number that says whether."""
    bits = folded(key, projection, feature // 4) >> (16 * (feature % 4)) & 0xFFFF
    # Signed: the draws of 0x8000 and above are the low ones.
    return (bits ^ 0x8000) >= round(DROPOUT * 65536)


def batch_of(prompts=PROMPTS, responses=RESPONSES, *, packed, multiple=1):
    return SequenceBatch.create(
        prompts,
        responses,
        multiple=multiple,
        device=torch.device("cpu"),
        packed=packed,
        context_multiple=4 if packed else 1,
    )


def packing_of(batch):
    width = batch.tokens.shape[1]
    lengths = (width,) if batch.lengths is None else batch.lengths
    return Packing.of(lengths, width=width, device=torch.device("cpu"))


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_token_has_the_same_key_wherever_it_lies(multiple):
    expected, seed = keys_by_hand(11), torch.tensor(11)
    padded = batch_of(packed=False, multiple=multiple)
    rows = token_keys(padded, packing_of(padded), seed).view(-1, 3).T.tolist()
    packed = batch_of(packed=True, multiple=multiple)
    row = token_keys(packed, packing_of(packed), seed).tolist()
    starts = [0, 8, 16]  # with padding of their own to a multiple of 4
    for number, keys in enumerate(expected):
        assert [key % WORD for key in rows[number][: len(keys)]] == keys
        start = starts[number]
        assert [key % WORD for key in row[start : start + len(keys)]] == keys


def test_draws_are_those_of_a_loop_for_any_part_of_the_features():
    keys = torch.tensor([3, -(2**63), 2**40 + 1])
    whole = [[kept_by_hand(key, 9, f) for f in range(23)] for key in keys.tolist()]
    assert kept_inputs(keys, 9, range(23), DROPOUT).tolist() == whole
    for first, end in ((0, 4), (5, 17), (10, 20), (22, 23)):
        part = kept_inputs(keys, 9, range(first, end), DROPOUT)
        assert part.tolist() == [row[first:end] for row in whole]


@pytest.mark.parametrize("dropout", [1e-9, 0.05, 0.3, 0.9, 1 - 1e-9])
def test_the_share_that_is_kept_is_the_one_asked_for(dropout):
    kept = kept_inputs(torch.arange(2000), 5, range(1000), dropout).double()
    deviation = (dropout * (1 - dropout) / 2e6) ** 0.5
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=5 * deviation + 2e-5)
    if dropout == 0.3:  # neighbours are independent, across tokens and features
        centred = kept - kept.mean()
        for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(4, 1)):
            correlation = (centred * other).mean() / centred.square().mean()
            assert abs(correlation) < 5 / 2e6**0.5


@pytest.fixture(scope="module")
def mesh():
    mesh = create_mesh(Config().parallel)
    yield mesh
    destroy_mesh()


def build(mesh, dropout=DROPOUT, recompute="none"):
    config = Config.model_validate(
        {
            "model": SIZES | {"lora": {"rank": 2, "dropout": dropout}},
            "memory": {"recompute": recompute},
        }
    )
    (chunk,) = build_chunks(
        config.model, config.precision, mesh, head="language", memory=config.memory
    )
    fill_random([chunk], mesh, seed=1)
    fill_adapters([chunk], mesh, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of([chunk]):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator))
    return chunk.train()


class Watched:
    """The inputs and outputs of every adapter during a pass."""

    def __init__(self, chunk):
        self.calls = []
        self.hooks = [
            adapter.register_forward_hook(
                lambda module, inputs, output: self.calls.append((module, inputs[0], output))
            )
            for adapter in adapters_of([chunk])
        ]

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_gives_b_a_of_its_inputs_times_the_mask(mesh, packed):
    chunk, batch = build(mesh), batch_of(packed=packed)
    numbers = {"linear_qkv": 0, "linear_proj": 1, "linear_fc1": 2, "linear_fc2": 3}
    named = {m: n.split(".")[2:] for n, m in chunk.named_modules() if n.endswith(".lora")}
    with Watched(chunk) as calls, dropping([chunk], 4, 2):
        chunk(batch)
    seed = folded(4, 2, 5)
    rows, seen = keys_by_hand(seed), set()
    for adapter, hidden, output in calls:
        layer, _, projection, _ = named[adapter]
        number = 4 * (int(layer) + 1) + numbers[projection]
        inputs = hidden.detach().double().flatten(0, 1)
        places = list(places_of(batch, pruned=layer == "1" and number % 4 >= 2))
        mask = torch.zeros_like(inputs)
        for place, (sequence, position) in enumerate(places):
            if sequence is not None:
                key = rows[sequence][position]
                kept = [kept_by_hand(key, number, f) for f in range(inputs.shape[1])]
                mask[place] = torch.tensor(kept)
        dropped = numpy.divide(inputs * mask, 1 - round(DROPOUT * 65536) / 65536)
        a = adapter.a.detach().double()
        b = (adapter.b[:, None] * adapter.chosen).flatten(1).detach().double()
        expected = 2 * dropped @ a.T @ b.T
        real = [i for i, (sequence, _) in enumerate(places) if sequence is not None]
        found = output.detach().double().flatten(0, 1)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
        seen.add(number)
    assert seen == set(range(4, 12))


def places_of(batch, *, pruned):
    """Sequence and position of each token of a pass, None for padding."""
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    starts = [0, 8, 16]
    if pruned:  # the states before the response tokens only
        for sequence, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            for place in range(len(response)):
                yield sequence, len(prompt) - 1 + place
        return
    for column in range(batch.tokens.shape[1]):
        for row in range(batch.tokens.shape[0]):
            if batch.lengths is None:
                yield (row, column) if column < lengths[row] else (None, 0)
                continue
            sequence = min(column // 8, 2)
            position = column - starts[sequence]
            yield (sequence, position) if position < lengths[sequence] else (None, 0)


def gradients(chunk, batch, *keys):
    chunk.zero_grad()
    with dropping([chunk], *keys):
        output = chunk(batch)[0]
        (output * torch.arange(1.0, output.numel() + 1).view(output.shape)).sum().backward()
    return output.detach(), [p.grad for p in chunk.parameters() if p.grad is not None]


def test_recomputed_layers_drop_the_same_and_passes_do_not(mesh):
    batch = batch_of(packed=True)
    once, again = (build(mesh, recompute=how) for how in ("none", "full"))
    (first, wanted), (output, found) = (gradients(chunk, batch, 1, 2) for chunk in (once, again))
    assert output.equal(first)
    assert len(found) == 16
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    other, _ = gradients(once, batch, 1, 3)
    assert not other.equal(first)


def test_only_passes_that_train_drop_anything(mesh):
    chunk, plain = build(mesh), build(mesh, dropout=0.0)
    batch = batch_of(packed=False)
    expected = plain(batch)[0].detach()
    assert chunk(batch)[0].detach().equal(expected)
    with dropping([chunk], 1):
        assert not chunk(batch)[0].detach().equal(expected)
    assert chunk(batch)[0].detach().equal(expected)
    with dropping([plain], 1):
        assert plain(batch)[0].detach().equal(expected)
    merge_for_good([chunk, plain])
    with dropping([chunk], 1):
        assert chunk(batch)[0].detach().equal(plain(batch)[0].detach())
