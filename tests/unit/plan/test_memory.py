"""Bytes of a rank in every phase, by hand."""

from dataclasses import replace

import pytest

from marlhf_mega.config.load import with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.plan import make_plan
from tests.unit.plan.plans import PPO, WHOLE, cluster, planned, planned_disaggregated
from tests.unit.plan.shapes import QWEN3_30B


def test_models_of_70b_by_hand():
    """Rank 0 has 2,270,756,864 parameters and, of 4 replicas, a quarter of their Adam state."""
    roles = planned().stages[0].roles
    size = 2_270_756_864
    assert roles["policy"].weights == 2 * size
    assert roles["policy"].gradients == 4 * size
    assert roles["policy"].optimizer == 12 * size // 4
    assert roles["reference"].total == 2 * size
    assert roles["reward"].total == 2 * size
    # The critic's head is one row on the last stage instead of the vocabulary's share.
    last = planned().stages[-1].roles
    assert last["policy"].num_parameters - last["critic"].num_parameters == (16032 - 1) * 8192


def test_what_is_offloaded_in_each_phase_of_70b_by_hand():
    size, critic = 2_270_756_864, 2_270_756_864  # No head on the first stage.
    plain = planned().stages[0]
    keys = {"memory.offload_idle": True, "memory.offload_optimizer": True}
    away = planned(keys).stages[0]
    training = 2 * (4 + 12 // 4) * size
    fall = {phase: plain.total(phase) - away.total(phase) for phase in plain.phases}
    assert fall == {
        # Critic, reference and reward; gradients and Adam state of policy and critic.
        "rollout": 2 * (critic + size + critic) + training,
        # One of the three is back.
        "experience": 2 * (critic + size) + training,
        "update": 2 * (size + critic),
    }


def test_without_a_critic_none_is_planned():
    keys = {"ppo.estimator": "grpo", "rollout.samples_per_prompt": 8}
    away = {"memory.offload_idle": True}
    critic = planned().stages[0].roles["critic"]
    plain, alone = planned().stages[0], planned(keys).stages[0]
    assert set(alone.roles) == {"policy", "reference", "reward"}
    for phase in plain.phases:
        assert plain.total(phase) - alone.total(phase) == critic.total
    # The largest of reference and reward is on the device; the policy is, in every phase.
    offloaded = planned(keys | away).stages[0]
    assert alone.total("experience") - offloaded.total("experience") == critic.weights
    with_critic, without = planned().checkpoints, planned(keys).checkpoints
    assert without.num_bytes < 0.51 * with_critic.num_bytes


def test_judges_are_planned_with_the_head_that_they_have():
    """A rule is no model; one that answers a template or rewards tokens by RTO has a vocabulary."""
    asked = {"source": "runs/lm", "template": "{response}?", "answers": ["Good", "Bad"]}
    keys = {
        "reward.source": [{"source": "a:b"}, {"source": "runs/rm"}, asked],
        "reward.constraints": [{"source": "runs/safe", "threshold": 0}],
        "reward.dense": [{"source": "runs/dpo", "kind": "rto"}],
        "ppo.kl_coef": 0,
    }
    plan = planned(keys)
    roles = plan.stages[-1].roles
    names = {"policy", "critic", "reference", "reward 1", "reward 2", "reward 3", "reward 4"}
    assert set(roles) == names
    assert roles["reward 2"].weights == roles["reward 4"].weights == roles["reference"].weights
    assert roles["reward 1"].weights == roles["reward 3"].weights < roles["reference"].weights
    assert {f"experience {name}" for name in names if "reward" in name} <= plan.seconds.keys()


def test_without_a_penalty_no_reference_is_planned():
    keys, away = {"ppo.kl_coef": 0}, {"memory.offload_idle": True}
    plain, alone = planned(), planned(keys)
    reference = plain.stages[0].roles["reference"]
    assert set(alone.stages[0].roles) == {"policy", "critic", "reward"}
    for phase in plain.stages[0].phases:
        saved = plain.stages[0].total(phase) - alone.stages[0].total(phase)
        assert saved == reference.total
    assert plain.seconds.keys() - alone.seconds.keys() == {"experience reference"}
    # Nor is one offloaded: the larger of critic and reward model is on the device.
    offloaded = planned(keys | away).stages[0]
    fall = alone.stages[0].total("experience") - offloaded.total("experience")
    assert fall == alone.stages[0].roles["reward"].weights
    for needed in ({"ppo.kl_loss_coef": 0.1}, {"macro.rule": "perplexity"}):
        assert "reference" in planned(keys | needed).stages[0].roles


def test_a_rollout_layout_of_its_own_costs_weights_and_buckets():
    held = planned({"rollout.pipeline_size": 2}).stages[0].phases["rollout"]
    assert held["policy in the rollout layout"] == 2 * (16032 * 8192 + 2 * 2_139_422_720 + 8192)
    assert held["resharding buckets"] == 128 * 2**20
    assert held["kv cache"] == 40 * 2 * 32 * 1 * 1536 * 128 * 2


def test_an_engine_costs_its_share_of_the_weights_its_pages_and_tensors_on_their_way():
    """TP8, 16 replicas: 16 sequences of 12 pages, one page more, 80 layers of one key head."""
    keys = {"rollout.engine": "vllm", "rollout.pipeline_size": None}
    held = planned(keys).stages[0].phases["rollout"]
    assert held["policy in the engine"] == 2 * 70_553_706_496 // 8
    assert held["whole tensors and buckets"] == (512 + 128) * 2**20
    assert held["kv cache"] == 80 * 2 * 128 * (16 * 12 + 1) * 128 * 2
    fixed = planned(keys | {"rollout.vllm": {"kv_cache_gib": 3}}).stages[0].phases["rollout"]
    assert fixed["kv cache"] == 3 * 2**30


def test_every_rank_of_a_pipeline_keeps_the_microbatches_that_it_runs_ahead():
    kept = [stage.phases["update"]["activations"] for stage in planned().stages]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[1] == 3 / 2 * kept[2]


def test_scoring_memory_grows_with_its_microbatches():
    def forward(factor):
        plan = planned({"ppo.scoring_microbatch_factor": factor})
        return plan.stages[0].phases["experience"]["forward"]

    assert forward(3) == 3 * forward(1)
    assert forward(8) == forward(100)  # each replica has 64 sequences


def test_recompute_and_fp8_change_what_they_should():
    plain, again = planned(), planned({"memory.recompute": "full"})
    assert (
        again.stages[0].phases["update"]["activations"]
        < plain.stages[0].phases["update"]["activations"] / 10
    )
    assert again.seconds["update policy"] > plain.seconds["update policy"]
    fp8 = planned({"precision.fp8": "hybrid"})
    assert fp8.seconds["update policy"] < plain.seconds["update policy"]
    products = 20 * (10240 // 8 * 8192 + 8192 * 1024 + 3 * 8192 * 28672 // 8)
    assert fp8.stages[0].roles["policy"].fp8_copies == 2 * products
    assert fp8.stages[0].roles["reference"].fp8_copies == 0
    gathered = planned({"precision.fp8": "hybrid", "precision.fp8_param_gather": True})
    assert gathered.stages[0].roles["policy"].weights == (
        plain.stages[0].roles["policy"].weights - products
    )


def test_torchs_adam_needs_more_than_a_small_backward_pass():
    keys = {"memory.recompute": "full", "ppo.microbatch_size": 1}
    config = with_keys(Config.model_validate(PPO), keys)
    without = replace(cluster(), has_engine=False)
    held = make_plan(config, "ppo", without).stages[0].phases["update"]
    state = 2_270_756_864 // 4
    assert held["activations"] + held["backward"] == pytest.approx(4 * state, rel=1e-3)


def test_experts_are_distributed():
    degrees = {"tensor_size": 2, "expert_size": 8, "sequence_parallel": True}
    config = Config.model_validate(PPO | {"model": QWEN3_30B, "parallel": degrees})
    plan = make_plan(config, "ppo", cluster(nodes=4))
    experts = 48 * 16 * 3 * 768 * 2048
    rest = 48 * (2 * 2048 + 2 * 128 + 128 * 2048 + (4096 + 1024 + 4096) // 2 * 2048)
    assert plan.stages[0].roles["policy"].num_parameters == (
        experts + rest + 2 * 75968 * 2048 + 2048
    )


def test_a_rank_that_only_generates_by_hand():
    """80 layers, keys and values, 240 / 4 sequences, 1 head, 512 + 1024 tokens, 128 wide."""
    (stage,) = planned_disaggregated().rollout_stages
    assert stage.roles["policy"].num_parameters == WHOLE
    held = dict(stage.phases["rollout"])
    assert held.pop("prefill and sampling") > 0
    assert held == {
        "policy weights": 2 * WHOLE,
        "resharding buckets": 64 * 2**20,
        "kv cache": 80 * 2 * 60 * 1 * 1536 * 128 * 2,
    }


def test_ranks_that_train_hold_no_cache_but_in_evaluations():
    plan = planned_disaggregated(
        {"data.validation_path": "prompts.jsonl", "evaluate.batch_size": 30}
    )
    assert plan.work.layout.data == 3
    stage = plan.stages[0]
    # Masters and moments of a third, which buckets round up.
    third = 12 * 2_270_756_864 / 3
    assert stage.roles["policy"].optimizer == pytest.approx(third, rel=1e-6)
    assert "kv cache" not in stage.phases["rollout"]
    assert stage.phases["rollout"]["resharding buckets"] == 64 * 2**20
    # 20 layers, 30 / 3 sequences in 4 groups of 3, each with room for the 8 ranks that share it.
    assert stage.phases["evaluate"]["kv cache"] == 20 * 2 * 4 * 8 * 1 * 1536 * 128 * 2
    assert "evaluate" not in planned_disaggregated().stages[0].phases


def test_idle_weights_are_offloaded_on_training_ranks_only():
    keys = {"memory.offload_idle": True, "memory.offload_optimizer": True}
    plain, away = planned_disaggregated(), planned_disaggregated(keys)
    assert away.rollout_stages == plain.rollout_stages
    weights = away.stages[0].roles["policy"].weights
    assert weights == pytest.approx(2 * 2_270_756_864, rel=1e-6)
    assert away.stages[0].total("rollout") == weights + 64 * 2**20


def test_fp8_needs_one_more_copy_of_the_products_to_generate():
    (stage,) = planned_disaggregated({"precision.fp8": "hybrid"}).rollout_stages
    products = 80 * (10240 // 8 * 8192 + 8192 * 1024 + 3 * 8192 * 28672 // 8)
    assert stage.roles["policy"].fp8_copies == products
    assert stage.roles["policy"].weights == 2 * WHOLE
