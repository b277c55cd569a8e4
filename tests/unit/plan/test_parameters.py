"""Closed form against published sizes and, name by name, against the factory on the meta device."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlhf_mega import platform
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import ParallelConfig, PrecisionConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.spec import uses_transformer_engine
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.plan.buffers import buffers
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.parameters import count, learning, stage_parameters, whole_model_size
from marlhf_mega.platform import Platform, Support, device
from tests.unit.plan.shapes import (
    GEMMA2_27B,
    GEMMA_2B,
    GEMMA_7B,
    LLAMA_8B,
    LLAMA_70B,
    QWEN2_7B,
    QWEN3_30B,
)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (GEMMA_2B, 2_506_172_416),
        (GEMMA_7B, 8_537_680_896),
        (GEMMA2_27B, 27_227_128_320),
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        (QWEN3_30B, 30_532_122_624),
        (QWEN2_7B, 7_615_616_512),
    ],
)
def test_published_models_have_their_published_sizes(shape, size):
    assert whole_model_size(ModelConfig(**shape), "language") == size


def test_the_first_rank_of_llama_3_70b():
    layout = WorldLayout.of(ParallelConfig(tensor_size=8, pipeline_size=4), 128)
    model = ModelConfig(**LLAMA_70B)
    sizes = [
        count(stage_parameters(model, layout, head="language", stage=stage)) for stage in range(4)
    ]
    assert sizes == [2_270_756_864, 2_139_422_720, 2_139_422_720, 2_270_765_056]


def test_the_adapters_of_llama_3_8b_have_the_size_that_peft_prints():
    # Each of 32 layers: inputs and outputs of q and o, of k and v, and of the three of width 14336.
    model = ModelConfig(**LLAMA_8B, lora={"rank": 16})
    assert whole_model_size(model, "language", only_learning=True) == 41_943_040
    assert whole_model_size(model, "scalar", only_learning=True) == 41_943_040 + 4096


def test_padding_of_the_vocabulary_does_not_count_as_model():
    model = ModelConfig(vocab_size=50, num_layers=1, hidden_size=8, num_attention_heads=2)
    other = model.model_copy(update={"vocab_size": 64})
    rows = 2 * (64 - 50)
    assert whole_model_size(other, "language") - whole_model_size(model, "language") == rows * 8


def test_a_fake_rank_takes_no_memory_of_a_gpu_that_is_there(monkeypatch):
    here = Platform("cuda", torch.device("cuda", 0), "nccl", torch.bfloat16)
    monkeypatch.setattr(platform, "current", lambda: here)
    monkeypatch.setattr(device, "_engine", lambda: Support(True, ""))
    assert here.transformer_engine
    model = ModelConfig(vocab_size=50, num_layers=1, hidden_size=8, num_attention_heads=2)
    with fake_mesh(ParallelConfig(), rank=0, world_size=1) as mesh:
        (chunk,) = build_chunks(model, PrecisionConfig(), mesh, head="language")
        assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
        assert not uses_transformer_engine(model, mesh)


def built(model, parallel, world, rank, head, bucket_size):
    """Build one rank on the meta device: parameters, and what its train state allocates."""
    with fake_mesh(parallel, rank=rank, world_size=world) as mesh:
        chunks = build_chunks(model, PrecisionConfig(dtype="bfloat16"), mesh, head=head)
        names = [
            [
                (
                    name,
                    tuple(p.shape),
                    not getattr(p, "allreduce", True),
                    getattr(p, "shared_embedding", False),
                    not p.requires_grad,
                )
                for name, p in chunk.named_parameters()
            ]
            for chunk in chunks
        ]
        state = TrainState(
            chunks,
            OptimizerConfig(),
            total_steps=1,
            overlap=parallel.overlap,
            bucket_size=bucket_size,
        )
        parts = [b for c in state.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        assert {str(b.grad_data.device) for b in parts} <= {"meta"}
        groups = state.optimizer.param_groups
        owned = [p for group in groups for p in group["params"]]
        return (
            mesh.pp_rank,
            names,
            {
                "buckets": sorted(b.grad_data.numel() for part in parts for b in part.buckets),
                "elements": sum(b.grad_data.numel() for b in parts),
                "owned": sum(p.numel() for p in owned),
                "tensors": len(owned),
            },
        )


def assert_level_1_is_level_2(model, parallel, world, ranks, bucket_size=None):
    layout = WorldLayout.of(parallel, world)
    for rank in ranks:
        for head in ("language", "scalar"):
            stage, names, real = built(model, parallel, world, rank, head, bucket_size)
            planned = stage_parameters(model, layout, head=head, stage=stage)
            assert names == [
                [(p.name, p.shape, p.is_expert, p.is_shared_embedding, p.is_frozen) for p in chunk]
                for chunk in planned
            ]
            laid_out = buffers(learning(planned), layout, stage=stage, bucket_size=bucket_size)
            place = rank % (world // parallel.pipeline_size)
            assert real == {
                "buckets": sorted(laid_out.buckets),
                "elements": laid_out.num_elements,
                "owned": laid_out.owned[place],
                "tensors": laid_out.owned_tensors[place],
            }


@pytest.mark.parametrize(
    ("shape", "degrees", "world"),
    [
        (LLAMA_70B, {"tensor_size": 8, "pipeline_size": 4, "overlap": True}, 128),
        (LLAMA_70B, {"tensor_size": 8, "pipeline_size": 4, "virtual_pipeline_size": 5}, 128),
        (LLAMA_8B, {"tensor_size": 2, "overlap": True}, 96),
        (
            LLAMA_70B | {"lora": {"rank": 64}},
            {"tensor_size": 8, "pipeline_size": 2, "sequence_parallel": True},
            16,
        ),
        (GEMMA_2B, {"tensor_size": 4, "pipeline_size": 2}, 24),
        (GEMMA2_27B, {"tensor_size": 8, "pipeline_size": 2}, 16),
        (
            QWEN3_30B,
            {
                "tensor_size": 2,
                "pipeline_size": 2,
                "virtual_pipeline_size": 2,
                "expert_size": 8,
                "sequence_parallel": True,
                "overlap": True,
            },
            32,
        ),
    ],
)
def test_large_models_on_every_stage(shape, degrees, world):
    parallel = ParallelConfig(**degrees)
    step = world // parallel.pipeline_size
    ranks = sorted({r for first in range(0, world, step) for r in (first, first + step - 1)})
    assert_level_1_is_level_2(ModelConfig(**shape), parallel, world, ranks)


@st.composite
def cases(draw):
    """Small models with every feature, at layouts that suit them."""

    def choose(*values):
        return draw(st.sampled_from(values))

    tensor, pipeline = choose(1, 2, 4), choose(1, 2, 3)
    virtual = choose(1, 2) if pipeline > 1 else 1
    groups = choose(1, 2, 4)
    heads = math.lcm(groups, tensor) * choose(1, 2)
    if groups % tensor and tensor % groups:
        groups = 1
    experts = choose(None, 2, 4)
    expert = choose(1, 2) if experts else 1
    data = choose(1, 2, 3) * expert
    shared = choose(None, 8) if experts else None
    model = ModelConfig(
        num_layers=pipeline * virtual * choose(1, 2),
        hidden_size=choose(16, 24, 40),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=choose(4, 8) * tensor,
        ffn_hidden_size=4 * choose(3, 5) * tensor,
        vocab_size=draw(st.integers(2, 200)),
        tied_embeddings=choose(False, True),
        qkv_bias=choose(False, True),
        qk_norm=choose(False, True),
        post_norms=choose(False, True) if experts is None else False,
        num_experts=experts,
        expert_ffn_hidden_size=choose(None, 12) if experts else None,
        shared_expert_ffn_hidden_size=None if shared is None else shared * tensor,
        lora=choose({}, {"rank": 3, "targets": ["q_proj", "v_proj", "o_proj"]}),
    )
    if experts is None and model.lora.is_on:
        model = model.adapted(LoraConfig(rank=choose(1, 70)))
    parallel = ParallelConfig(
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_pipeline_size=virtual,
        expert_size=expert,
        sequence_parallel=tensor > 1 and (experts is not None or choose(False, True)),
        overlap=choose(False, True),
    )
    world = tensor * pipeline * data
    return model, parallel, world, draw(st.integers(0, world - 1)), choose(1, 500, 3000)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_small_models_of_every_kind(case):
    model, parallel, world, rank, bucket_size = case
    assert_level_1_is_level_2(model, parallel, world, [rank], bucket_size)
