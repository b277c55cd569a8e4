"""The cache of keys and values, by hand."""

from marlhf_mega.plan.generation import replay_mask_bytes
from tests.unit.plan.plans import planned


def test_the_kv_cache_of_70b_by_hand():
    """20 layers, keys and values, 64 sequences, 1 head, 512 + 1024 tokens, 128 wide, 2 bytes."""
    held = planned().stages[0].phases["rollout"]
    assert held["kv cache"] == 20 * 2 * 64 * 1 * 1536 * 128 * 2


def test_graphs_keep_the_cache_in_every_phase():
    plain, kept = (
        planned({"rollout.cuda_graphs": graphs}).stages[0].phases for graphs in (False, True)
    )
    cache = plain["rollout"]["kv cache"]
    assert kept == {phase: {"kv cache": cache} | held for phase, held in plain.items()}


def test_masks_of_filters_are_counted_where_there_are_any():
    """DP4 of 128 ranks: 512 / 4 samples of 1024 tokens, 50 ids of 4 bytes or 128256 bits each."""
    assert replay_mask_bytes(planned().work) == 0
    top_k = planned({"rollout.top_k": 50}).work
    share = top_k.batch_sequences * top_k.config.rollout.max_response_tokens
    assert replay_mask_bytes(top_k) == share * 50 * 4
    top_p = planned({"rollout.top_p": 0.9}).work
    assert replay_mask_bytes(top_p) == share * 128256 // 8
    # To filter it, every rank holds the batch of all.
    filtered = planned({"rollout.top_k": 50, "rollout.filter": "pf_ppo"}).work
    assert replay_mask_bytes(filtered) == (share + share * 4) * 50 * 4
