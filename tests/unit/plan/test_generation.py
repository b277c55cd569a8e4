"""The cache of keys and values, by hand."""

from marlhf_mega.plan.generation import replay_mask_bytes, routing_bytes
from marlhf_mega.plan.report import as_text
from tests.unit.plan.plans import planned
from tests.unit.plan.shapes import QWEN3_30B


def test_the_kv_cache_of_70b_by_hand():
    """20 layers, keys and values, 64 sequences, 1 head, 512 + 1024 tokens, 128 wide, 2 bytes."""
    held = planned().stages[0].phases["rollout"]
    assert held["kv cache"] == 20 * 2 * 64 * 1 * 1536 * 128 * 2


def test_graphs_keep_the_cache_in_every_phase():
    plain, kept = (
        planned({"rollout.cuda_graphs": graphs}).stages[0].phases for graphs in (False, True)
    )
    cache = plain["rollout"]["kv cache"]
    # 16 sequences in each of 4 groups, 128256 / 8 tokens: logits, weights, and sums of 8 bytes;
    # and twice the states that the logits come from.
    graphs = 16 * 16032 * (4 + 4 + 8) + 2 * 16 * 8192 * 2
    kept_always = {"kv cache": cache, "graphs": graphs}
    assert kept == {phase: kept_always | held for phase, held in plain.items()}


def test_masks_of_filters_are_counted_where_there_are_any():
    """DP4 of 128 ranks: 512 / 4 samples of 1024 tokens, 50 ids of 4 bytes or 128256 bits each."""
    assert replay_mask_bytes(planned().work) == 0
    top_k = planned({"rollout.top_k": 50}).work
    share = top_k.batch_sequences * top_k.config.rollout.max_response_tokens
    assert replay_mask_bytes(top_k) == share * 50 * 4
    top_p = planned({"rollout.top_p": 0.9}).work
    assert replay_mask_bytes(top_p) == share * 128256 // 8
    # To filter it, every rank holds the batch of all.
    # vLLM keeps those that tie with the 50th, for which there is room.
    by_engine = {"rollout.engine": "vllm", "rollout.pipeline_size": None, "rollout.top_k": 50}
    assert replay_mask_bytes(planned(by_engine).work) == share * (2 * 50 + 8) * 4
    filtered = planned({"rollout.top_k": 50, "rollout.filter": "pf_ppo"}).work
    assert replay_mask_bytes(filtered) == (share + share * 4) * 50 * 4


def test_recorded_routing_is_counted_on_the_device_and_on_the_host():
    """48 layers on 4 stages, 64 slots, 512 + 1024 tokens, 8 experts of a byte each."""
    experts = {f"model.{key}": value for key, value in QWEN3_30B.items()}
    plan = planned(experts)
    assert plan.stages[0].phases["rollout"]["routing"] == 12 * 64 * 1536 * 8
    assert routing_bytes(plan.work) == 64 * 1536 * 48 * 8
    (line,) = [x for x in as_text(plan, None).splitlines() if x.startswith("routing")]
    assert line == "routing of the rollout: 0.04 GiB of host memory a rank"
    more = planned(experts | {"model.num_experts": 256, "rollout.filter": "pf_ppo"})
    assert routing_bytes(more.work) == (64 + 256) * 1536 * 48 * 8 * 2
    for off in (planned(experts | {"ppo.router_replay": False}), planned()):
        assert "routing" not in off.stages[0].phases["rollout"]
        assert routing_bytes(off.work) == 0
