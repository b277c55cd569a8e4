"""Packed sequences: attention and whole models compute each as if it were alone."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.layers import SdpaAttention
from marlhf_mega.models.packing import Packing, packing_engine
from marlhf_mega.models.spec import AttnMaskType, TransformerConfig, engine_attends
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

CPU = torch.device("cpu")
HEADS, WIDTH = 4, 8
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def test_a_packing_worked_by_hand():
    packing = Packing.of([2, 3], width=8, device=CPU)
    assert packing.lengths == (2, 3, 3)
    assert packing.ends.tolist() == [0, 2, 5, 8]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert Packing.of([2, 3], width=5, device=CPU).lengths == (2, 3)
    theirs = packing.for_engine()
    assert (theirs.qkv_format, theirs.max_seqlen_q, theirs.max_seqlen_kv) == ("thd", 2048, 2048)
    assert theirs.cu_seqlens_q.tolist() == [0, 2, 5, *[8] * 30]
    assert theirs.cu_seqlens_q.dtype == theirs.cu_seqlens_kv.dtype == torch.int32


def draw(total, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(total, 1, heads, WIDTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def visible(lengths, window):
    """One mask over the whole row: the same sequence, not later, not too far back."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(owner))[:, None] - torch.arange(len(owner))
    seen = (owner[:, None] == owner) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def by_mask(query, key, value, mask, softcap):
    """Attention in float64 over all pairs of the row."""
    q, k, v = (x[:, 0].double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // len(x), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * WIDTH**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)[:, None]


def attention(groups, **options):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": HEADS}
    config = TransformerConfig(**sizes, num_query_groups=groups, use_cpu_initialization=True)
    return SdpaAttention(config, 1, AttnMaskType.causal, **options)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    rest=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 2]),
    softcap=st.sampled_from([None, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_sequence_attends_to_another(lengths, rest, groups, window, softcap, dtype):
    width = sum(lengths) + rest
    packing = Packing.of(lengths, width=width, device=CPU)
    tensors = draw(width, groups, dtype)
    found = attention(groups, window=window, softcap=softcap)(*tensors, packed_seq_params=packing)
    expected = by_mask(*tensors, visible(packing.lengths, window), softcap)
    exact = dtype == torch.float32
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-5 if exact else 0.05)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    mine, theirs = (torch.autograd.grad((x * pull).sum(), tensors) for x in (found, expected))
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-5 if exact else 0.1)


class EngineLike(torch.nn.Module):
    """Attention with the interface of Megatron-Core's wrapper of Transformer Engine."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params=None):
        assert (attention_mask, attn_mask_type) == (None, AttnMaskType.causal)
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return output.permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.qkv_format == "thd"
        ends = packed_seq_params.cu_seqlens_q
        assert packed_seq_params.max_seqlen_q >= ends.diff().max()
        mask = visible(ends.diff().tolist(), None)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return output.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer_engine_attention_accepts_packed_and_padded_rows(dtype):
    module = packing_engine(EngineLike)()
    packing, tensors = Packing.of([4, 1, 6], width=12, device=CPU), draw(12, 2, dtype)
    how = {"attention_mask": None, "attn_mask_type": AttnMaskType.causal}
    whole = Packing.of([12], width=12, device=CPU)
    for packed, lengths in ((packing, [4, 1, 6, 1]), (None, [12]), (whole, [12])):
        found = module(*tensors, **how, packed_seq_params=packed)
        expected = by_mask(*tensors, visible(lengths, None), None)
        assert found.shape == expected.shape
        assert torch.allclose(
            found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.05
        )


@pytest.mark.parametrize(
    ("cp_size", "dtype", "window", "expected"),
    [
        (1, torch.float32, 8, True),
        (2, torch.bfloat16, None, True),
        (2, torch.float32, None, False),
        (2, torch.bfloat16, 8, False),
    ],
)
def test_our_attention_is_used_where_the_ring_of_transformer_engine_does_not_fit(
    cp_size, dtype, window, expected
):
    model, mesh = ModelConfig(sliding_window=window), SimpleNamespace(cp_size=cp_size)
    assert engine_attends(model, mesh, dtype) is expected


MODELS = {
    "grouped": {"num_query_groups": 2, "qk_norm": True},
    "gemma2": {
        "architecture": "gemma2",
        "post_norms": True,
        "tied_embeddings": True,
        "attention_softcap": 5.0,
        "logits_softcap": 10.0,
        "sliding_window": 3,
        "sliding_window_every": 2,
    },
    "experts": {"num_experts": 4, "expert_ffn_hidden_size": 16},
}


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def gradients(chunk, run, batch):
    chunk.zero_grad()
    output = run(batch)
    pull = torch.arange(1.0, output.numel() + 1).view(output.shape) / output.numel()
    (output * pull).sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in chunk.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("head", ["language", "scalar"])
def test_packed_and_padded_sequences_give_equal_results(mesh, name, recompute, head):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
    case = {"model": shape | {"vocab_size": 40, "init_std": 0.3} | MODELS[name]}
    config = Config.model_validate(case | {"memory": {"recompute": recompute}})
    (chunk,) = build_chunks(config.model, config.precision, mesh, head=head, memory=config.memory)
    fill_random([chunk], mesh, seed=3)
    generator = torch.Generator().manual_seed(4)

    @settings(deadline=None, max_examples=5)
    @given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5))
    def check(sizes):
        prompts, responses = (
            [torch.randint(40, (n,), generator=generator).tolist() for n in part]
            for part in zip(*sizes, strict=True)
        )
        (padded, wanted), (packed, found) = (
            gradients(
                chunk,
                chunk,
                SequenceBatch.create(prompts, responses, multiple=4, device=CPU, packed=packed),
            )
            for packed in (False, True)
        )
        assert torch.allclose(packed, padded, rtol=1e-5, atol=1e-5)
        for parameter, gradient in wanted.items():
            scale = gradient.abs().max().item()
            assert torch.allclose(found[parameter], gradient, atol=1e-5 * max(scale, 1.0))

    check()
