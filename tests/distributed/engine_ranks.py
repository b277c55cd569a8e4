"""Layers of Transformer Engine's stand-in against our own: engine_ranks.py OUT.

Each rank writes, by case and answer, the largest difference.
"""
# ruff: noqa: E402 - an engine without a CUDA device is refused, unless it comes after the check

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from marlhf_mega import platform

platform.prepare()
sys.path[:0] = [str(Path(__file__).parents[1] / "engine"), str(Path(__file__).parents[2])]

import transformer_engine
from megatron.core.extensions.transformer_engine import HAVE_TE

from marlhf_mega.algorithm.losses import sft_loss
from marlhf_mega.checkpoint.weights import fill_adapters, fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import ParallelConfig, PrecisionConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models import spec
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.forward import logprob_forward, make_batches, run_forward, value_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.lora import adapters_of
from marlhf_mega.models.shared_base import build_on_base
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.rollout import decoder
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.layers import ModuleLayer
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.work import Decode
from tests.operators import Operators

BASE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 100,
    "init_std": 0.2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"qkv_bias": True, "qk_norm": True},
    "adapters": {"qkv_bias": True, "qk_norm": True, "lora": {"rank": 4, "dropout": 0.3}},
    "gemma": {
        "zero_centered_norm": True,
        "embedding_scale": True,
        "tied_embeddings": True,
        "activation": "gelu_tanh",
    },
    "mixtral": {
        "architecture": "mixtral",
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_ffn_hidden_size": 48,
    },
}
LAYOUTS = {
    "TP1": {},
    "TP2 SP": {"tensor_size": 2, "sequence_parallel": True},
    "TP4": {"tensor_size": 4},
}
PROMPTS = [[5, 9, 14], [77, 3, 8, 21, 40, 6], [31] * 4]
RESPONSES = [[8, 90, 4, 7], [12], [60, 61, 62, 63, 64, 65, 66]]
LIMITS = {
    "padded": MicrobatchLimit(sequences=2),
    "packed": MicrobatchLimit(sequences=1, tokens=80, packed=True),
}


def answers(model, dtype, mesh):
    precision = PrecisionConfig(dtype=dtype)
    policy = build_chunks(model, precision, mesh, head="language")
    fill_random(policy, mesh, seed=3)
    if model.lora.is_on:
        critic = build_on_base(policy, model, precision, mesh)
        torch.nn.init.normal_(
            critic[0].output_layer.weight, generator=torch.Generator().manual_seed(4)
        )
    else:
        critic = build_chunks(model, precision, mesh, head="scalar")
        fill_random(critic, mesh, seed=3)
    for chunks in (policy, critic):
        fill_adapters(chunks, mesh, seed=3)
        for adapter in adapters_of(chunks):
            torch.nn.init.constant_(adapter.b, 0.1)  # of new ones it is zero
    found = {}
    batches = {
        name: make_batches(PROMPTS, RESPONSES, limit=limit, mesh=mesh)
        for name, limit in LIMITS.items()
    }
    for name, batch in batches.items():
        found[f"{name} log-probs"] = run_forward(policy, batch, logprob_forward, leading=(2,))[0]
        found[f"{name} values"] = run_forward(critic, batch, value_forward)
    rule = SamplingRule(temperature=0.0)
    rollout = Generator(policy, mesh, stop=StopRule(frozenset({2}))).generate(
        PROMPTS,
        range(3),
        RolloutOptions(rule=rule, max_response_tokens=8, seed=0, step=0, slots=2),
    )
    found["greedy"] = rollout.logprobs
    metadata = {
        "dp_cp_group": mesh.groups.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    saved = policy[0].sharded_state_dict(metadata=metadata)
    norms = [
        gradient_norm(policy, batches["padded"], logprob_forward, lambda output: output[0]),
        gradient_norm(critic, batches["packed"], value_forward, lambda output: output),
    ]
    found["gradient norms"] = torch.tensor(norms)
    names = {getattr(value, "key", key) for key, value in saved.items()}
    return found, {name for name in names if not name.endswith("_extra_state")}, rollout.responses


def gradient_norm(chunks, batches, forward, grid_of):
    state = TrainState(chunks, OptimizerConfig(), total_steps=2)
    state.zero_grad()
    with dropping(state.chunks, 1):
        pipeline_forward_backward(
            state.chunks,
            batches.microbatches,
            forward,
            lambda output, part: sft_loss(grid_of(output), part.batch.response_mask),
        )
    return state.step().grad_norm


def compare(model, dtype, mesh):
    spec.uses_transformer_engine = lambda *_: False
    ours = answers(model, dtype, mesh)
    spec.uses_transformer_engine = lambda *_: True
    transformer_engine.attention_calls.clear()
    transformer_engine.grouped_calls.clear()
    theirs = answers(model, dtype, mesh)
    return {
        name: float((value.float() - theirs[0][name].float()).abs().max())
        for name, value in ours[0].items()
    } | {
        "same checkpoint": ours[1] == theirs[1],
        "same tokens": ours[2] == theirs[2],
        "grouped products": len(transformer_engine.grouped_calls),
        "layouts of attention": sorted({call[0] for call in transformer_engine.attention_calls}),
    }


def launches_of_a_layer(family, ranks):
    """Kernels of a decode step on the first of so many GPUs."""
    model = ModelConfig.model_validate(BASE | FAMILIES[family])
    found = []
    with fake_mesh(ParallelConfig(tensor_size=ranks), rank=0, world_size=ranks) as mesh:
        mesh = replace(mesh, platform=replace(mesh.platform, name="cuda"))
        (chunk,) = build_chunks(model, PrecisionConfig(), mesh, head="language")
        with decoder.generating([chunk]):
            steps = decoder.ChunkDecoder(chunk, num_slots=8, max_tokens=24)
            zeros = torch.zeros(8, dtype=torch.int64)
            work = Decode(tokens=zeros[:, None], positions=zeros, longest=20)
            layers = steps.layers
            for steps.layers in (layers, layers[:-1]):
                with Operators() as operators:
                    steps.run(work, None)
                found.append(operators.total)
    return found[0] - found[1]


def main():
    # On a GPU decoding takes the modules that train, as it must with the engine's.
    decoder.decoder_layer = ModuleLayer
    found = {"version": transformer_engine.__version__, "have_te": HAVE_TE}
    for layout, sizes in LAYOUTS.items():
        mesh = create_mesh(ParallelConfig.model_validate(sizes))
        for family, more in FAMILIES.items():
            if family == "mixtral" and layout == "TP4":
                continue  # experts with tensor parallelism need sequence parallelism
            model = ModelConfig.model_validate(BASE | more)
            found[f"{family} {layout}"] = compare(model, "float32", mesh)
        if layout == "TP2 SP":
            found["bfloat16"] = compare(ModelConfig.model_validate(BASE), "bfloat16", mesh)
        destroy_mesh(leave_world=layout == list(LAYOUTS)[-1])
    found["launches"] = {
        f"{family} {ranks}": launches_of_a_layer(family, ranks)
        for family in ("llama", "qwen3", "gemma")
        for ranks in (1, 2)
    }
    Path(f"{sys.argv[1]}.{mesh.rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
