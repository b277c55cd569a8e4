"""Plans with ranks that only generate: Llama-3-70B on 128 ranks, 96 that train at TP8 x PP4."""

import json

import pytest
from shapes import LLAMA_70B

from marlhf_mega.cli import run
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.changes import smallest_change
from marlhf_mega.plan.gpus import GIB, find_gpu
from marlhf_mega.plan.plan import Cluster, make_plan, with_keys
from marlhf_mega.plan.report import as_text, summary, verdict
from marlhf_mega.plan.search import search

APART = {
    "model": LLAMA_70B,
    "parallel": {"tensor_size": 8, "pipeline_size": 4, "sequence_parallel": True},
    "rollout": {"batch_size": 240, "max_response_tokens": 1024, "ranks": 32, "pipeline_size": 1},
    "ppo": {"minibatch_size": 240, "microbatch_size": 2, "sampler_cap": 2.0},
    "reward": {"source": "runs/none/reward"},
}
WHOLE = 8_820_367_360
"""Parameters of a rank that holds an eighth of all layers: 80 x 106,971,136, two shards of
16032 x 8192 of the vocabulary, and a norm of 8192."""


def planned(changes=None, *, gpu="H100", nodes=16):
    cluster = Cluster(nodes=nodes, gpus_per_node=8, gpu=find_gpu(gpu))
    return make_plan(with_keys(Config.model_validate(APART), changes or {}), "ppo", cluster)


def test_a_rank_that_only_generates_by_hand():
    """80 layers, keys and values, 240 / 4 sequences, 1 head, 512 + 1024 tokens, 128 wide."""
    (stage,) = planned().rollout_stages
    assert stage.roles["policy"].num_parameters == WHOLE
    held = dict(stage.phases["rollout"])
    assert held.pop("prefill and sampling") > 0
    assert held == {
        "policy weights": 2 * WHOLE,
        "buckets of the move": 64 * 2**20,
        "kv cache": 80 * 2 * 60 * 1 * 1536 * 128 * 2,
    }


def test_ranks_that_train_hold_no_cache_but_in_evaluations():
    plan = planned({"data.validation_path": "prompts.jsonl", "evaluate.batch_size": 30})
    assert plan.work.layout.data == 3
    stage = plan.stages[0]
    # Masters and moments of a third, which buckets round up.
    third = 12 * 2_270_756_864 / 3
    assert stage.roles["policy"].optimizer == pytest.approx(third, rel=1e-6)
    assert "kv cache" not in stage.phases["rollout"]
    assert stage.phases["rollout"]["buckets of the move"] == 64 * 2**20
    # 20 layers, 30 / 3 sequences in 4 groups of 3, each with room for the 8 ranks that share it.
    assert stage.phases["evaluate"]["kv cache"] == 20 * 2 * 4 * 8 * 1 * 1536 * 128 * 2
    assert "evaluate" not in planned().stages[0].phases


def test_weights_that_rest_leave_only_ranks_that_train():
    keys = {"memory.offload_idle": True, "memory.offload_optimizer": True}
    plain, away = planned(), planned(keys)
    assert away.rollout_stages == plain.rollout_stages
    weights = away.stages[0].roles["policy"].weights
    assert weights == pytest.approx(2 * 2_270_756_864, rel=1e-6)
    assert away.stages[0].total("rollout") == weights + 64 * 2**20


def test_fp8_needs_one_more_copy_of_the_products_to_generate():
    (stage,) = planned({"precision.fp8": "hybrid"}).rollout_stages
    products = 80 * (10240 // 8 * 8192 + 8192 * 1024 + 3 * 8192 * 28672 // 8)
    assert stage.roles["policy"].fp8_copies == products
    assert stage.roles["policy"].weights == 2 * WHOLE


def test_generating_and_training_follow_each_other_or_overlap():
    both, ahead = planned(), planned({"rollout.staleness": 1})
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
    slow = planned({"rollout.staleness": 1, "ppo.epochs": 4})
    parts = [size for part, size in slow.seconds.items() if not part.startswith("rollout")]
    assert slow.step_seconds == pytest.approx(seconds["rollout move"] + sum(parts))


def test_fewer_ranks_train():
    """96 do the work of 128, with 40 microbatches on each of 3 replicas instead of 30 on each of 4.

    The pipeline of 4 stages idles for 3 of them.
    """
    alone = planned({"rollout.ranks": 0, "rollout.pipeline_size": None}).seconds
    apart = planned().seconds
    ratio = 128 / 96 * (1 + 3 / 40) / (1 + 3 / 30)
    assert apart["update critic"] == pytest.approx(ratio * alone["update critic"])
    assert apart["experience reward"] == pytest.approx(ratio * alone["experience reward"])
    assert apart["rollout prefill"] == pytest.approx(4 / (1 + 3 / 30) * alone["rollout prefill"])


def test_any_rank_may_fail_and_those_that_train_write():
    plan = planned().checkpoints
    assert plan.world_mtbf_seconds == 50_000 * 3600 / 128
    assert plan.write_seconds == pytest.approx(plan.num_bytes / (12 * 2e9))


def test_a_rank_that_only_generates_and_does_not_fit_is_named():
    """70.6 billion parameters are 131.4 GiB; half of them fit."""
    plan = planned({"rollout.tensor_size": 1})
    assert [stage.peak > plan.cluster.usable for stage in plan.stages] == [False] * 4
    change = smallest_change(plan)
    assert change[0] == {"rollout.tensor_size": 2, "rollout.pipeline_size": 1}
    assert change[1].fits
    line = verdict(plan, change)
    assert line.startswith("does not fit: ")
    assert "GiB of H100 (rollout rank of stage 0); with rollout.tensor_size=2 rollout." in line
    assert "on the worst rank (rollout rank of stage 0), -" in summary(plan)


def test_fewer_slots_are_offered_for_a_cache_that_does_not_fit():
    plan = planned({"rollout.tensor_size": 2, "rollout.batch_size": 960, "rollout.ranks": 32})
    assert plan.rollout_stages[0].phases["rollout"]["kv cache"] == 80 * 2 * 60 * 4 * 1536 * 256
    assert plan.worst.only_generates
    assert not plan.fits
    assert smallest_change(plan)[0] == {"rollout.slots": 15}


def test_only_ranks_that_lack_memory_are_changed():
    training = planned({"ppo.microbatch_size": 8})
    assert training.worst.where == "stage 0, update"
    assert smallest_change(training)[0] == {"ppo.microbatch_size": 2}
    keys, changed = smallest_change(planned({"ppo.microbatch_size": 8, "rollout.tensor_size": 1}))
    assert keys["rollout.tensor_size"] > 1
    assert "parallel.tensor_size" in keys or keys["ppo.microbatch_size"] < 8
    assert changed.fits


def test_search_tries_other_numbers_of_ranks():
    """Of 128 an eighth leaves 7 x 16, to which no batch can be dealt."""
    keys = {"model.num_layers": 8, "ppo.minibatch_size": 48, "rollout.staleness": 1}
    config = with_keys(Config.model_validate(APART), keys)
    found = search(config, "ppo", Cluster(nodes=16, gpus_per_node=8, gpu=find_gpu("H100")))
    assert {keys["rollout.ranks"] for keys, _ in found} == {32, 64}
    assert all(plan.work.num_rollout_ranks == keys["rollout.ranks"] for keys, plan in found)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "apart.yaml"
    path.write_text(json.dumps(APART))
    return str(path)


def test_the_report_shows_both_kinds_of_ranks(file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["rollout.staleness=1", "--nodes", "16", "--json", str(out)]
    assert run(["plan", "--config", file, *options]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "16 x 8 H100: 96 ranks train at TP8 x PP4 x DP3 + SP, bfloat16\n" in text
    assert "\n32 ranks only generate, at TP8 x PP1 x DP4: 60 sequences at a time" in text
    assert "\nGiB on a rollout rank of stage 0\n" in text
    assert "\nrollout rank " in text
    generating, training = 24.576 + found["step_seconds"]["rollout prefill"], 0.0
    for part, seconds in found["step_seconds"].items():
        training += 0.0 if part.startswith("rollout") else seconds
    assert (
        f"\nweights move for 0.4 s; 32 ranks generate for {generating:.1f} s, while 96 train for "
        f"{training:.1f} s\n"
    ) in text
    assert found["whole_step_seconds"] == pytest.approx(generating + 2 * WHOLE / 40e9)
    assert (found["rollout_ranks"], found["rollout_layout"]["data"]) == (32, 4)
    (stage,) = found["rollout_stages"]
    assert stage["roles"]["policy"]["weights"] == 2 * WHOLE
    assert ", then 96 train for " in as_text(planned(), None)


def test_a_runs_peak_corrects_activations_of_its_own_number_of_ranks(file, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    held = planned().stages[0].phases["update"]
    measured = sum(held.values()) - 0.5 * (held["activations"] + held["backward"])
    layout = "96 ranks: TP8 x PP4 x DP3 + SP (nccl, cuda), 32 more that only generate"
    values = Config.model_validate(APART).model_dump(mode="json") | {"layout": layout}
    (folder / "config.yaml").write_text(json.dumps(values))
    peaks = dict.fromkeys(("perf/update_peak_memory_gib", "perf/peak_memory_gib"), measured / GIB)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **peaks}) + "\n")
    assert run(["plan", "--config", file, "--nodes", "16", "--calibrate", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: activations x 0.500\n")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"rollout.ranks": 128}, "rollout.ranks=128: must leave ranks that train; 128 are started"),
        ({"rollout.ranks": 30}, "parallel: tensor_size * pipeline_size * context_size = 32 must"),
        ({"rollout.pipeline_size": 5}, "rollout: tensor_size * pipeline_size * context_size = 40"),
        (
            {"ppo.minibatch_size": 80},
            "ppo.minibatch_size=80: must be a multiple of the data-parallel size 3. Use 78 or 81.",
        ),
        (
            {"rollout.staleness": 1, "ppo.sampler_cap": None},
            "rollout.staleness=1: samples of older weights need ppo.sampler_cap; it is not set.",
        ),
    ],
)
def test_what_a_start_would_refuse_has_no_plan(keys, line):
    with pytest.raises(ConfigError) as caught:
        planned(keys)
    assert str(caught.value).startswith(line)


def test_other_jobs_have_no_such_ranks():
    config = with_keys(Config.model_validate(APART), {"sft.batch_size": 64})
    plan = make_plan(config, "sft", Cluster(nodes=16, gpus_per_node=8, gpu=find_gpu("H100")))
    assert (plan.work.layout.data, plan.rollout_stages) == (4, ())
