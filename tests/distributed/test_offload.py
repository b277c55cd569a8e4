"""Idle weights and optimizer state leave memory between phases; no bit of the run changes."""

import json

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.plan.memory import formats_of, stage_memory
from marlhf_mega.plan.workload import workload
from tests.distributed.ranks import run_ranks

SMALL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 50,
}
LARGE = SMALL | {"hidden_size": 384, "ffn_hidden_size": 1024}
EXPERTS = SMALL | {"num_experts": 4, "expert_ffn_hidden_size": 32}
SETTINGS = {
    "nothing": {},
    "both": {"offload_idle": True, "offload_optimizer": True},
    "idle": {"offload_idle": True},
    "optimizer": {"offload_optimizer": True},
}


def case(model, memory, parallel=(), dtype="float32"):
    return {
        "model": model,
        "memory": memory,
        "parallel": dict(parallel),
        "precision": {"dtype": dtype},
        "rollout": {"batch_size": 8, "max_response_tokens": 6},
        "ppo": {"minibatch_size": 8, "microbatch_size": 2},
        "reward": {"source": "model"},
    }


def run(folder, world, *cases):
    return run_ranks("offload_ranks.py", world, folder / "out.json", json.dumps(cases))


def planned(memory):
    config = Config.model_validate(case(LARGE, memory))
    formats = formats_of(config.precision, on_gpu=False, has_engine=False)
    return stage_memory(workload(config, "ppo", 1), 0, formats)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Each of the first two has a process of its own, so that their peaks can be compared."""
    cases = {name: case(LARGE, memory) for name, memory in SETTINGS.items()}
    plain = run(tmp_path_factory.mktemp("plain"), 1, cases.pop("nothing"))
    found = run(tmp_path_factory.mktemp("offload"), 1, *cases.values())
    return {"nothing": plain[0]} | dict(zip(cases, found, strict=True))


def test_memory_falls_by_what_leaves_in_each_phase(one_rank):
    plain, found = one_rank["nothing"], one_rank["both"]
    if plain["rollout"] is None:
        pytest.skip("this system does not let a process reset its peak")
    policy, critic = plain["parameters"]
    assert min(policy, critic) * 4 > 20 * 2**20
    expected = {
        "rollout": found["away"],
        # One role at a time is back.
        "experience": found["away"] - 4 * policy,
        "update": 4 * (policy + critic),
    }
    fall = {phase: (plain[phase] - found[phase]) * 2**30 for phase in expected}
    # Pages of libraries and the heap come and go: a few MiB.
    assert fall == pytest.approx(expected, rel=0.1, abs=10 * 2**20)
    before, after = (planned(SETTINGS[name]) for name in ("nothing", "both"))
    assert fall == pytest.approx(
        {p: before.total(p) - after.total(p) for p in fall}, rel=0.1, abs=10 * 2**20
    )


@pytest.mark.parametrize("setting", ["both", "idle", "optimizer"])
def test_what_is_away_during_rollouts_is_what_was_asked_for(one_rank, setting):
    policy, critic = one_rank["nothing"]["parameters"]
    # In float32 a weight, its gradient and two moments have 4 bytes each; masters are the weights.
    idle, optimizer = 4 * (policy + 2 * critic), 12 * (policy + critic)
    expected = {"both": idle + optimizer, "idle": idle, "optimizer": optimizer}[setting]
    assert one_rank["nothing"]["away"] == 0
    assert one_rank[setting]["away"] == pytest.approx(expected, rel=1e-3)
    assert one_rank[setting]["digests"] == one_rank["nothing"]["digests"]


def test_every_rank_of_a_layout_keeps_its_bits(tmp_path):
    layouts = [
        (SMALL, {"pipeline_size": 2, "virtual_pipeline_size": 2}, "bfloat16"),
        (EXPERTS, {"tensor_size": 2, "sequence_parallel": True, "expert_size": 2}, "float32"),
    ]
    cases = [case(m, SETTINGS[s], p, d) for m, p, d in layouts for s in ("nothing", "both")]
    results = run(tmp_path, 4, *cases)
    for plain, found in (results[:2], results[2:]):
        assert found["digests"] == plain["digests"]
        assert found["away"] > 0 == plain["away"]
