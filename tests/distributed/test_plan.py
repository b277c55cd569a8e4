"""The planner against real ranks: models to the byte, the peak of an update to 15 %."""

import json

import pytest

from marlhf_mega.commands.quickstart import SETTINGS, VOCABULARY
from tests.distributed.ranks import run_ranks

QUICKSTART = {
    "model": SETTINGS["model"] | {"vocab_size": VOCABULARY},
    "data": SETTINGS["data"],
    "rollout": SETTINGS["rollout"],
    "ppo": SETTINGS["ppo"],
    "reward": {"source": "runs/quickstart/reward"},
}
SMALL = {"batch_size": 16, "max_response_tokens": 24}
PPO = {"minibatch_size": 16, "microbatch_size": 4}
TEXT = {"max_prompt_tokens": 40}
CASES = {
    "quickstart": QUICKSTART | {"parallel": {"tensor_size": 2, "pipeline_size": 2}},
    "TP2 SP DP2 bfloat16 tied": {
        "model": {
            "architecture": "gemma",
            "num_layers": 3,
            "num_query_groups": 1,
            "vocab_size": 1000,
            "tied_embeddings": True,
            "zero_centered_norm": True,
        },
        "parallel": {"tensor_size": 2, "sequence_parallel": True},
        "precision": {"dtype": "bfloat16"},
        "data": TEXT,
        "rollout": SMALL | {"slots": 10},
        "ppo": PPO,
        "reward": {"source": "runs/none"},
    },
    "PP2 VPP2 DP2": {
        "model": {"num_layers": 8, "vocab_size": 300, "qkv_bias": True, "qk_norm": True},
        "parallel": {"pipeline_size": 2, "virtual_pipeline_size": 2},
        "data": TEXT,
        # Fewer microbatches than this would all be in flight at once.
        "rollout": SMALL | {"batch_size": 32},
        "ppo": PPO | {"minibatch_size": 32},
        "reward": {"source": "runs/none"},
    },
    "TP2 PP2 SP softcap": {
        "model": {
            "architecture": "gemma2",
            "num_layers": 4,
            "vocab_size": 300,
            "post_norms": True,
            "tied_embeddings": True,
            "attention_softcap": 20.0,
            "logits_softcap": 10.0,
        },
        "parallel": {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO,
        "reward": {"source": "runs/none"},
    },
    "PP2 recompute": {
        "model": {"num_layers": 8, "vocab_size": 300},
        "parallel": {"pipeline_size": 2},
        "memory": {"recompute": "full"},
        "data": TEXT,
        "rollout": SMALL | {"top_p": 0.9, "mask_interval": 5},
        "ppo": PPO,
        "reward": {"source": "runs/none"},
    },
    "PP2 packed": {
        "model": {"num_layers": 4, "vocab_size": 300, "num_query_groups": 2},
        "parallel": {"pipeline_size": 2},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO | {"microbatch_tokens": 150, "packing": True},
        "reward": {"source": "runs/none"},
    },
    "TP2 PP2 SP softcap packed": {
        "model": {
            "architecture": "gemma2",
            "num_layers": 4,
            "vocab_size": 300,
            "post_norms": True,
            "attention_softcap": 20.0,
        },
        "parallel": {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True},
        "precision": {"dtype": "bfloat16"},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO | {"microbatch_tokens": 201, "packing": True},
        "reward": {"source": "runs/none"},
    },
    "CP2 DP2": {
        "model": {"num_layers": 4, "vocab_size": 300, "num_query_groups": 2},
        "parallel": {"context_size": 2},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO,
        "reward": {"source": "runs/none"},
    },
    "PP2 CP2 packed selective": {
        "model": {"num_layers": 4, "vocab_size": 300},
        "parallel": {"context_size": 2, "pipeline_size": 2},
        "memory": {"recompute": "selective"},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO | {"microbatch_tokens": 152, "packing": True},
        "reward": {"source": "runs/none"},
    },
    "PP2 VPP2 DP2 adapters": {
        "model": {"num_layers": 8, "vocab_size": 300, "lora": {"rank": 8, "dropout": 0.1}},
        "parallel": {"pipeline_size": 2, "virtual_pipeline_size": 2},
        "data": TEXT,
        "rollout": SMALL | {"batch_size": 32},
        "ppo": PPO | {"minibatch_size": 32},
        "reward": {"source": "runs/none"},
    },
    "TP2 DP2 bfloat16 tied adapters on one base": {
        "model": {
            "num_layers": 3,
            "vocab_size": 300,
            "tied_embeddings": True,
            "lora": {"rank": 4},
        },
        "parallel": {"tensor_size": 2},
        "precision": {"dtype": "bfloat16"},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO,
        "reward": {"source": "runs/none", "share_base": True},
        "critic": {"share_base": True},
    },
    "TP2 SP EP2 experts": {
        "model": {
            "num_layers": 2,
            "vocab_size": 300,
            "num_experts": 4,
            "expert_ffn_hidden_size": 160,
            "shared_expert_ffn_hidden_size": 96,
        },
        "parallel": {"tensor_size": 2, "expert_size": 2, "sequence_parallel": True},
        "data": TEXT,
        "rollout": SMALL,
        "ppo": PPO,
        "reward": {"source": "runs/none"},
    },
}


APART = {
    "model": {
        "num_layers": 2,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 4096,
        "vocab_size": 300,
    },
    "parallel": {"tensor_size": 2, "sequence_parallel": True},
    "data": TEXT | {"validation_path": "prompts.jsonl"},
    "rollout": SMALL | {"batch_size": 32, "ranks": 2, "tensor_size": 1, "slots": 10},
    "ppo": PPO,
    "evaluate": {"batch_size": 6},
}
"""Two ranks train and two only generate; their weights are more than the buckets of a move."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "out.json"
    found = run_ranks("plan_ranks.py", 4, out, json.dumps(list(CASES.values())), timeout=600)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_models_and_caches_take_the_planned_bytes(results, name):
    for rank in results[name]:
        real, planned = rank["real"], rank["planned"]
        assert real["kv cache"] == planned["kv cache"]
        for role in ("policy", "critic", "reference", "reward"):
            for part in ("weights", "gradients"):
                assert real[role][part] == planned[role][part], role


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_largest_optimizer_share_takes_the_planned_bytes(results, name, role):
    for stage in {rank["stage"] for rank in results[name]}:
        ranks = [rank for rank in results[name] if rank["stage"] == stage]
        largest = max(rank["real"][role]["optimizer"] for rank in ranks)
        assert largest == ranks[0]["planned"][role]["optimizer"] > 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_autograd_saves_as_much_as_planned_at_its_peak(results, name, role):
    for rank in results[name]:
        real, planned = rank["real"][role]["saved"], rank["planned"][role]["saved"]
        assert planned == pytest.approx(real, rel=0.15), rank["stage"]


# Elsewhere it cannot be told.
@pytest.mark.parametrize("name", [name for name in CASES if "SP" not in name and "CP" not in name])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_allocators_peak_in_an_update_is_as_planned(results, name, role):
    for rank in results[name]:
        real, planned = rank["real"][role]["peak"], rank["planned"][role]["peak"]
        assert planned == pytest.approx(real, rel=0.15), rank["stage"]


def test_ranks_that_only_generate_take_the_planned_bytes(tmp_path):
    (ranks,) = run_ranks("plan_ranks.py", 4, tmp_path / "out.json", json.dumps([APART]))
    assert [rank["only generates"] for rank in ranks] == [False, False, True, True]
    for rank in ranks:
        real, planned = rank["real"], rank["planned"]
        assert real["weights"] == planned["weights"]
        assert real["kv cache"] == planned["kv cache"]
        # 64 tokens, 128 wide, float32: 10 sequences of 4 groups, or 6 of 2.
        slots = 10 * 4 if rank["only generates"] else 6 * 2
        assert real["kv cache"] == 2 * 2 * slots * 64 * 128 * 4
        room = planned["resharding buckets"]
        assert 0.9 * room < real["resharding buckets"] <= room
