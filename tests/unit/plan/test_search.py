"""Layouts that fit, the fastest first."""

import time

from marlhf_mega.cli import main
from marlhf_mega.config.load import with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.changes import smallest_change
from marlhf_mega.plan.plan import make_plan
from marlhf_mega.plan.search import search
from tests.unit.plan.plans import DISAGGREGATED, LONG, PPO, cluster, planned
from tests.unit.plan.shapes import LLAMA_8B


def test_a_smaller_token_budget_is_offered_and_searched():
    keys = {"ppo.microbatch_tokens": 8 * 1536, "ppo.packing": True}
    plan = planned(keys)
    assert not plan.fits
    assert smallest_change(plan)[0] == {"ppo.microbatch_tokens": 4 * 1536}
    small = with_keys(Config.model_validate(PPO | {"model": LLAMA_8B}), keys)
    found = {changed["ppo.microbatch_tokens"] for changed, _ in search(small, "ppo", cluster())}
    assert found == {1536, 2 * 1536, 4 * 1536, 8 * 1536, 16 * 1536}


def test_context_parallelism_is_searched_where_sequences_are_long():
    small = LONG | {"model": LLAMA_8B | {"max_positions": 8192}}
    found = search(Config.model_validate(small), "ppo", cluster(nodes=2))
    assert {keys["parallel.context_size"] for keys, _ in found} == {1, 2}
    short = search(Config.model_validate(PPO | {"model": LLAMA_8B}), "ppo", cluster(nodes=2))
    assert {keys["parallel.context_size"] for keys, _ in short} == {1}


def test_search_ranks_what_fits():
    config = Config.model_validate(PPO | {"model": LLAMA_8B})
    found = search(config, "ppo", cluster(nodes=1))
    assert len(found) > 5
    seconds = [round(plan.step_seconds, 2) for _, plan in found]
    assert seconds == sorted(seconds)
    assert all(plan.fits for _, plan in found)


def test_search_offloads_where_nothing_else_makes_a_layout_fit():
    config = Config.model_validate(PPO | {"model": LLAMA_8B})
    found = search(config, "ppo", cluster(nodes=1))
    offloaded = [keys for keys, _ in found if "memory.offload_idle" in keys]
    assert 0 < len(offloaded) < len(found)
    keys = dict(offloaded[0])
    del keys["memory.offload_idle"], keys["memory.offload_optimizer"]
    assert not make_plan(with_keys(config, keys), "ppo", cluster(nodes=1)).fits


def test_layouts_are_searched(file, capsys):
    arguments = ["plan", "--config", file, "--nodes", "16", "--search", "model.num_layers=8"]
    start = time.perf_counter()
    assert main(arguments) == 0
    assert time.perf_counter() - start < 120
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all("GiB to spare  parallel.tensor_size=" in line for line in lines)


def test_search_tries_other_numbers_of_ranks():
    """An eighth of 128 leaves 7 x 16 ranks, a number that divides no batch."""
    keys = {"model.num_layers": 8, "ppo.minibatch_size": 48, "rollout.staleness": 1}
    config = with_keys(Config.model_validate(DISAGGREGATED), keys)
    found = search(config, "ppo", cluster())
    assert {keys["rollout.ranks"] for keys, _ in found} == {32, 64}
    assert all(plan.work.num_rollout_ranks == keys["rollout.ranks"] for keys, plan in found)
