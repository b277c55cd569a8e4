"""Every file in configs/ loads, has only what differs from the defaults, and fits its plan."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from marlhf_mega.config.hf import model_config_from_hf
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import load_config
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.gpus import find_gpu
from marlhf_mega.plan.parameters import whole_model_size
from marlhf_mega.plan.plan import Cluster, Plan, make_plan
from marlhf_mega.rewards.rule import check_importable

FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
PLAN = re.compile(r"^# Plan: ((\d+) x (\d+) (\w+): .*)\.$", re.MULTILINE)
PLANNED = [path for path in FILES if not path.stem.startswith(("e2e_", "hf_small_"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_loads(path):
    # Runs start from each other's checkpoints, none of which exists here.
    config = load_config(path, ["model.init=random"])
    assert config.run.name != Config().run.name
    for term in config.reward.source:
        if term.is_rule:
            check_importable(term.source, sandbox=term.sandbox)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_repeats_no_default(path):
    defaults = Config().model_dump(mode="json")
    for section, values in OmegaConf.to_container(OmegaConf.load(path)).items():
        repeated = [key for key, value in values.items() if defaults[section][key] == value]
        assert repeated == [], f"{path.name}: {section}"


def summary(plan: Plan) -> str:
    """Return the main numbers in one line, as comments of shipped configurations give them."""
    worst, cluster = plan.worst, plan.cluster
    return (
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: {worst.peak / GIB:.1f} GiB "
        f"on the worst rank ({worst.where}), "
        f"{plan.spare / GIB:.1f} to spare; step {plan.step_seconds:.0f} s; checkpoint "
        f"{plan.checkpoints.num_bytes / GIB:.0f} GiB"
    )


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_shipped_config_states_its_plan(path):
    stated, nodes, gpus, gpu = PLAN.search(path.read_text()).groups()
    cluster = Cluster(nodes=int(nodes), gpus_per_node=int(gpus), gpu=find_gpu(gpu))
    job = path.stem.rsplit("_", 1)[1]
    plan = make_plan(load_config(path, need_weights=False), job, cluster)
    assert plan.fits
    assert stated == summary(plan)


GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# config.json of the published models, and their parameters.
PUBLISHED = {
    "gemma_2b": (GEMMA, 2_506_172_416),
    "gemma_7b": (
        GEMMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        8_537_680_896,
    ),
    "gemma2_27b": (
        GEMMA
        | {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        27_227_128_320,
    ),
    "llama3_8b": (LLAMA, 8_030_261_248),
    "llama3_70b": (
        LLAMA
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
    "qwen3_30b_a3b": (
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_shipped_shape_is_that_of_the_published_model(path, tmp_path):
    """So that `model.hf_path` on the command line never contradicts the file."""
    (name,) = [name for name in PUBLISHED if name in path.stem]
    hf, size = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ours = load_config(path, ["model.init=auto"]).model
    theirs = model_config_from_hf(tmp_path, ours)
    ignored = {"hf_path", "init", "head_dim", "num_query_groups"}
    assert theirs.model_dump(exclude=ignored) == ours.model_dump(exclude=ignored)
    assert (theirs.kv_channels, theirs.query_groups) == (ours.kv_channels, ours.query_groups)
    assert whole_model_size(ours.plain, "language") == size
