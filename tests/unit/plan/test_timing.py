"""Seconds of the parts of a step, by hand."""

from dataclasses import replace

import pytest

from marlhf_mega.config.load import with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.gpus import find_gpu
from marlhf_mega.plan.plan import make_plan
from marlhf_mega.plan.report import as_text
from tests.unit.plan.plans import PPO, WHOLE, cluster, planned, planned_disaggregated


def test_offloading_takes_time():
    """Reference and reward are loaded once, the critic comes and goes twice, Adam state once."""
    keys = {"memory.offload_idle": True, "memory.offload_optimizer": True}
    size = 2_270_756_864
    moved = 2 * size * (1 + 1 + 4) + 2 * 2 * (12 * size // 4)
    assert planned(keys).seconds["offload"] == pytest.approx(moved / 20e9, rel=0.01)
    assert "offload" not in planned().seconds


def test_a_mask_policy_takes_memory_and_time_in_the_rollout_alone():
    """A frozen copy, a second cache, and weights without optimizer state in checkpoints."""
    plain, keys = planned(), {"rollout.top_p": 0.9}
    masked = keys | {"rollout.mask_interval": 5}
    one, two = planned(keys), planned(masked)
    for part in ("rollout prefill", "rollout decode"):
        assert two.seconds[part] == pytest.approx(2 * plain.seconds[part])
    assert {k: v for k, v in two.seconds.items() if "rollout" not in k} == {
        k: v for k, v in one.seconds.items() if "rollout" not in k
    }
    stage, without = two.stages[0], one.stages[0]
    assert stage.roles["mask"].total == stage.roles["reference"].weights
    held, before = stage.phases["rollout"], without.phases["rollout"]
    assert held["kv cache"] == 2 * before["kv cache"]
    assert held["mask weights"] == stage.roles["mask"].weights
    update = stage.phases["update"], without.phases["update"]
    assert update[0].keys() - update[1].keys() == {"mask weights"}
    policy = 70_553_706_496  # parameters
    assert two.checkpoints.num_bytes - one.checkpoints.num_bytes == 2 * policy
    away = {"memory.offload_idle": True}
    assert planned(masked | away).host.offload == planned(keys | away).host.offload
    assert planned(masked | away).stages[0].phases["update"]["mask weights"] > 0


def test_a_critic_takes_time_and_so_does_a_greedy_response():
    plain = planned().seconds
    keys = {"ppo.estimator": "remax", "ppo.whiten_advantages": False}
    found = planned(keys).seconds
    assert not [part for part in found if "critic" in part]
    for part in ("rollout prefill", "rollout decode"):
        assert found[part] == pytest.approx(2 * plain[part])
    assert found["update policy"] == plain["update policy"]


def test_what_a_filter_leaves_takes_less_time_and_what_it_scores_takes_as_much():
    size = {"ppo.minibatch_size": 64}
    plain = planned(size).seconds
    keys = {"rollout.filter": "best_worst", "rollout.samples_per_prompt": 8}
    found = planned(keys | size).seconds
    for part in ("rollout prefill", "rollout decode", "experience reward"):
        assert found[part] == pytest.approx(plain[part])
    for part in ("experience policy", "experience reference", "update policy"):
        assert found[part] == pytest.approx(plain[part] / 4)


@pytest.mark.parametrize(
    ("macro", "number"),
    [({"rule": "whole_response"}, 1), ({"n": 300}, 4), ({"rule": "token"}, 1024), ({}, 205)],
)
def test_continuations_take_the_time_of_half_a_response_each(macro, number):
    keys = {"ppo.estimator": "vine", "ppo.vine_samples": 2}
    keys |= {f"macro.{name}": value for name, value in macro.items()}
    found = planned(keys).seconds
    # Half of a response of 1024 tokens is as long as a prompt.
    prefill = 2 * found["rollout prefill"]
    expected = 2 * number * (prefill + found["rollout decode"] / 2)
    assert found["experience continuations"] == pytest.approx(expected)
    assert "experience continuations" not in planned().seconds


def counted(plan, sequences, *, prompt=512, response, outputs):
    """Seconds of a pass of Llama-3-70B: its products one by one, at 45 % of 128 H100.

    Queries, keys and values, their output, three matrices of the feed-forward, causal attention
    (scores and their use), and the head on the responses; then the idle time of 4 stages.
    """
    seq, hidden = prompt + response, 8192
    layer = hidden * hidden + 2 * hidden * 1024 + hidden * hidden + 3 * hidden * 28672
    attention = 2 * hidden * seq * (seq + 1) // 2
    flops = 2 * (80 * (layer * seq + attention) + hidden * outputs * response) * sequences
    microbatches = -(-sequences // 4 // plan.work.scoring.sequences)
    return flops / (0.45 * 989e12 * 128) * (1 + 3 / microbatches)


def test_passes_over_pairs_take_the_time_of_their_operations():
    def planned_for(job, **keys):
        return make_plan(with_keys(Config.model_validate(PPO), keys), job, cluster())

    plain = planned_for("reward")
    assert not [part for part in plain.seconds if part.startswith("experience")]
    odin = planned_for("reward", **{"reward_model.length_coef": 1.0})
    once = counted(odin, 128, response=512, outputs=1)
    assert odin.seconds == plain.seconds | {"experience lengths": pytest.approx(once)}
    keys = {"reward_model.latent_size": 512, "reward_model.latent_context": 3}
    users = planned_for("reward", **keys, **{"checkpoint.export_hf": False})
    assert users.seconds == plain.seconds | {"experience contexts": pytest.approx(3 * once)}
    pairs = planned_for("preference")
    expected = counted(pairs, 128, response=512, outputs=128256)
    assert pairs.besides == {"reference": pytest.approx(expected)}
    assert "\nreference " in as_text(pairs, None)
    assert planned_for("preference", **{"preference.loss": "cpl"}).besides == {}
    assert plain.besides == {}


def test_what_else_is_scored_takes_the_time_of_its_operations():
    plan = planned()
    scored = counted(plan, 256, response=1024, outputs=1)
    assert plan.seconds["experience reward"] == pytest.approx(scored)
    remax = planned({"ppo.estimator": "remax", "ppo.whiten_advantages": False}).seconds
    assert remax["experience reward"] == pytest.approx(2 * scored)
    vine = planned({"ppo.estimator": "vine", "ppo.vine_samples": 2, "macro.n": 300}).seconds
    assert vine["experience their scores"] == pytest.approx(2 * 4 * scored)
    shaped = planned({"reward.shaping": ["par"]}).seconds
    assert shaped["experience scores of references"] == pytest.approx(scored)
    assert plan.besides == {}
    keys = {"rollout.filter": "dynamic", "rollout.samples_per_prompt": 8}
    found = planned(keys)
    generated = found.seconds["rollout prefill"] + found.seconds["rollout decode"]
    assert found.besides == {"another try": pytest.approx(generated + scored)}
    assert "s: at most, up to rollout.filter_tries=10 in all\n" in as_text(found, None)
    assert found.seconds == plan.seconds


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_overlap_hides_what_fits_beside_passes(role):
    def visible(overlap, speed):
        gpu = replace(find_gpu("H100"), link=speed)
        config = with_keys(Config.model_validate(PPO), {"parallel.overlap": overlap})
        seconds = make_plan(config, "ppo", replace(cluster(), gpu=gpu)).seconds
        return seconds[f"gradients {role}"], seconds

    # Of 2,270,756,864 elements (4 bytes and 2) 3 of 4 replicas' shares are sent.
    plain, _ = visible(False, 40e9)
    sizes = {"policy": 2_270_765_056, "critic": 2_270_756_864}
    assert plain == pytest.approx(sizes[role] * 6 * 0.75 / 40e9)
    # At full speed only the largest bucket shows: 128,256 / 8 words, and of the first layer what
    # has not filled a bucket of 40 million: attention and both norms.
    hidden, _ = visible(True, 40e9)
    bucket = 16032 * 8192 + 10240 // 8 * 8192 + 8192 * 1024 + 2 * 8192
    assert hidden == pytest.approx(bucket * 4 * 0.75 / 40e9)
    # On a slow network passes hide as long as they take: those of the other role, and two thirds
    # of one of the 8 microbatches of 64 sequences.
    (plain, seconds), (slow, _) = visible(False, 1e6), visible(True, 1e6)
    other = {"policy": "critic", "critic": "policy"}[role]
    update, beside = seconds[f"update {role}"], seconds[f"update {other}"]
    assert plain - slow == pytest.approx(beside + update * 2 / 3 / 8)


def test_generating_and_training_follow_each_other_or_overlap():
    both, ahead = planned_disaggregated(), planned_disaggregated({"rollout.staleness": 1})
    seconds = both.seconds
    assert seconds == ahead.seconds
    # 80 layers of 0.3 ms for each of 1024 tokens, which is more than reading the weights takes.
    assert seconds["rollout decode"] == pytest.approx(80 * 3e-4 * 1024)
    # Every rank gets an eighth of the model over the network.
    assert seconds["rollout move"] == pytest.approx(2 * WHOLE / 40e9)
    generating = seconds["rollout prefill"] + seconds["rollout decode"]
    training = sum(size for part, size in seconds.items() if not part.startswith("rollout"))
    assert training < generating
    assert both.step_seconds == pytest.approx(generating + seconds["rollout move"] + training)
    assert ahead.step_seconds == pytest.approx(seconds["rollout move"] + generating)
    slow = planned_disaggregated({"rollout.staleness": 1, "ppo.epochs": 4})
    parts = [size for part, size in slow.seconds.items() if not part.startswith("rollout")]
    assert slow.step_seconds == pytest.approx(seconds["rollout move"] + sum(parts))


def test_fewer_ranks_train():
    """96 do the work of 128, with 40 microbatches on each of 3 replicas instead of 30 on each of 4.

    The pipeline of 4 stages idles for 3 of them.
    """
    alone = planned_disaggregated({"rollout.ranks": 0, "rollout.pipeline_size": None}).seconds
    disaggregated = planned_disaggregated().seconds
    ratio = 128 / 96 * (1 + 3 / 40) / (1 + 3 / 30)
    assert disaggregated["update critic"] == pytest.approx(ratio * alone["update critic"])
    assert disaggregated["experience reward"] == pytest.approx(ratio * alone["experience reward"])
    assert disaggregated["rollout prefill"] == pytest.approx(
        4 / (1 + 3 / 30) * alone["rollout prefill"]
    )
