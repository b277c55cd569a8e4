"""What is offered for a job that does not fit."""

from marlhf_mega.plan.changes import smallest_change
from marlhf_mega.plan.report import verdict
from tests.unit.plan.plans import planned, planned_disaggregated


def test_a_change_is_offered_and_makes_it_fit():
    plan = planned()
    assert not plan.fits
    keys, changed = smallest_change(plan)
    assert keys == {"ppo.microbatch_size": 4}
    assert changed.fits
    assert planned(keys).spare == changed.spare


def test_nothing_helps_where_the_models_alone_are_too_large():
    plan = planned({"parallel.tensor_size": 1, "parallel.sequence_parallel": False}, nodes=1)
    assert not plan.fits
    assert smallest_change(plan) is None


def test_more_layouts_are_tried_where_settings_do_not_help():
    plan = planned({"parallel.pipeline_size": 1, "ppo.microbatch_size": 1})
    keys, changed = smallest_change(plan)
    assert keys["parallel.pipeline_size"] > 1
    assert changed.fits


def test_scoring_less_at_a_time_is_offered_before_smaller_microbatches():
    keys = {"rollout.batch_size": 2048, "memory.recompute": "full"}
    plan = planned(keys | {"ppo.scoring_microbatch_factor": 64})
    assert not plan.fits
    change, smaller = smallest_change(plan)
    assert list(change) == ["ppo.scoring_microbatch_factor"]
    assert smaller.fits


def test_a_rank_that_only_generates_and_does_not_fit_is_named():
    """70.6 billion parameters are 131.4 GiB; half of them fit."""
    plan = planned_disaggregated({"rollout.tensor_size": 1})
    assert [stage.peak > plan.cluster.usable for stage in plan.stages] == [False] * 4
    change = smallest_change(plan)
    assert change[0] == {"rollout.tensor_size": 2, "rollout.pipeline_size": 1}
    assert change[1].fits
    line = verdict(plan, change)
    assert line.startswith("does not fit: ")
    assert "GiB of H100 (rollout rank of stage 0); with rollout.tensor_size=2 rollout." in line
    assert (plan.worst.where, plan.spare < 0) == ("rollout rank of stage 0", True)


def test_a_change_can_be_pasted_into_the_command_line():
    plan = planned()
    change = {"memory.recompute_num_layers": None, "ppo.packing": True, "memory.recompute": "full"}
    keys = "memory.recompute_num_layers=null ppo.packing=true memory.recompute=full"
    assert f"with {keys} it fits" in verdict(plan, (change, plan))


def test_fewer_slots_are_offered_for_a_cache_that_does_not_fit():
    plan = planned_disaggregated(
        {"rollout.tensor_size": 2, "rollout.batch_size": 960, "rollout.ranks": 32}
    )
    assert plan.rollout_stages[0].phases["rollout"]["kv cache"] == 80 * 2 * 60 * 4 * 1536 * 256
    assert plan.worst.only_generates
    assert not plan.fits
    assert smallest_change(plan)[0] == {"rollout.slots": 15}


def test_only_ranks_that_lack_memory_are_changed():
    training = planned_disaggregated({"ppo.microbatch_size": 8})
    assert training.worst.where == "stage 0, update"
    assert smallest_change(training)[0] == {"ppo.microbatch_size": 4}
    keys, changed = smallest_change(
        planned_disaggregated({"ppo.microbatch_size": 8, "rollout.tensor_size": 1})
    )
    assert keys["rollout.tensor_size"] > 1
    assert "parallel.tensor_size" in keys or keys["ppo.microbatch_size"] < 8
    assert changed.fits
