"""Layers run without their modules' calls, against the modules; decode steps without a host."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.rope import rotation_angles
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.layers import ModuleLayer, decoder_layer
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from marlhf_mega.rollout.work import Decode, Prefill

FAMILIES = {
    "llama": {},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True},
    "qwen3": {"architecture": "qwen3", "qk_norm": True},
    "gemma2": {
        "architecture": "gemma2",
        "tied_embeddings": True,
        "activation": "gelu_tanh",
        "zero_centered_norm": True,
        "embedding_scale": True,
        "post_norms": True,
        "attention_softcap": 2.0,
        "query_scale": 8.0,
        "sliding_window": 4,
        "sliding_window_every": 2,
    },
    "qwen2_moe": {
        "architecture": "qwen2_moe",
        "qkv_bias": True,
        "num_experts": 4,
        "expert_ffn_hidden_size": 32,
        "shared_expert_ffn_hidden_size": 32,
        "router_softmax_first": True,
    },
}


def config_of(family):
    return Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "vocab_size": 50,
            }
            | FAMILIES[family],
            "precision": {"dtype": "float32"},
            "reward": {"source": "random"},
        }
    )


@pytest.fixture(params=FAMILIES)
def chunk(request):
    config = config_of(request.param)
    mesh = create_mesh(config.parallel)
    (chunk,) = build_chunks(config.model, config.precision, mesh, head="language")
    fill_random([chunk], mesh, seed=1)
    yield chunk
    destroy_mesh()


def turned(heads):
    return heads.roll(1, -1)


def test_a_direct_layer_is_the_modules_one(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 32, generator=generator)
    context = torch.randn(3, 5, 32, generator=generator)
    with generating([chunk]):
        for layer in chunk.decoder.layers:
            direct = decoder_layer(layer, chunk.config)
            modules = ModuleLayer(layer, chunk.config)
            assert type(direct) is not type(modules)
            found = direct.query_key_value(hidden, turned)
            for one, other in zip(found, modules.query_key_value(hidden, turned), strict=True):
                torch.testing.assert_close(one, other)
            for name, arguments in {"add_attention": [context], "add_mlp": []}.items():
                one, other = (getattr(x, name)(hidden, *arguments) for x in (direct, modules))
                torch.testing.assert_close(one, other)


def test_prompts_and_single_tokens_give_the_states_of_whole_sequences(chunk):
    lengths, new, longest = [4, 9, 1], 11, 20
    tokens = torch.randint(3, 50, (3, longest), generator=torch.Generator().manual_seed(0))
    with generating([chunk]):
        decoder = ChunkDecoder(chunk, num_slots=4, max_tokens=longest)
        prompts = Prefill(
            tokens=tokens[:, :9], rows=torch.arange(3), lengths=torch.tensor(lengths), first_slot=0
        )
        states = [decoder.run(prompts, None)]
        for step in range(new):
            positions = torch.tensor(lengths) + step
            states.append(
                decoder.run(
                    Decode(
                        tokens=tokens.gather(1, positions[:, None]),
                        positions=positions,
                        longest=int(positions.max()) + 1,
                    ),
                    None,
                )
            )
        angles = rotation_angles(chunk.rotary_speeds, torch.arange(longest))
        whole = chunk.decoder(
            hidden_states=chunk.embed(tokens),
            attention_mask=None,
            rotary_pos_emb=angles[:, None, None, :],
        )
    for row, length in enumerate(lengths):
        found = torch.stack([state[row] for state in states])
        torch.testing.assert_close(found, whole[length - 1 : length + new, row], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_moe"])
def test_a_step_and_its_draw_read_nothing_back_from_the_device(family):
    """On the meta device, which refuses to, and which runs the operations of a GPU.

    Experts are left out: how many tokens each gets is read back to split them.
    """
    config = config_of(family)
    with fake_mesh(config.parallel, rank=0, world_size=1) as mesh:
        (chunk,) = build_chunks(config.model, config.precision, mesh, head="language")
        with generating([chunk]):
            decoder = ChunkDecoder(chunk, num_slots=4, max_tokens=20)
            tokens = torch.zeros(4, 1, dtype=torch.int64)
            work = Decode(tokens=tokens, positions=tokens[:, 0], longest=7)
            logits = decoder.logits(decoder.run(work, None))
            numbers = torch.zeros(4, dtype=torch.float64)
            for rule in (
                SamplingRule(temperature=1.0),
                SamplingRule(temperature=0.7, top_k=5, record_kept=True),
            ):
                drawn = sample_tokens(logits, numbers, rule=rule, shard=chunk.vocab_shard)
                assert {x.device.type for x in drawn if x is not None} == {"meta"}
