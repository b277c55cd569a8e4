"""Memory of passes, by hand."""

from dataclasses import replace

from marlhf_mega.config.load import with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.activations import Formats, layer_shape
from marlhf_mega.plan.plan import make_plan
from marlhf_mega.plan.workload import workload
from tests.unit.plan.plans import LONG, PPO, cluster
from tests.unit.plan.shapes import GEMMA2_27B


def test_sequences_that_ranks_share_are_sized_by_hand():
    """8192 tokens, the last 1024 of them a response: one piece of 4 is 2048 tokens."""
    work = workload(Config.model_validate(LONG), "ppo", 128)
    assert work.layout.describe() == "TP8 x PP1 x CP2 x DP8 + SP"
    assert work.microbatch.seq == 8192
    formats = Formats(element=2, has_engine=True, fp8=False)
    shape = layer_shape(work.policy, work.layout, work.microbatch, formats)
    sequences = 8
    assert shape.tokens == sequences * 4096
    # The whole response is in the last piece, so one rank's head sees all of it.
    assert shape.selected == sequences * 1024
    assert (shape.gathered, shape.masks) == (0, 0)
    local = replace(shape, formats=replace(formats, has_engine=False))
    # One group of keys and one of values, 128 wide, of the whole sequence.
    assert local.gathered == sequences * 2 * 8192 * 128
    # Of the 4 pieces, rank 0 has the first (sees 1) and the last (sees 4).
    assert local.masks == 2048 * 5 * 2048
    # A response of 3 pieces: the rank with the last two of its own has two.
    longer = replace(work.microbatch, response=3 * 2048)
    assert replace(shape, microbatch=longer).selected == sequences * 2 * 2048


def test_softcaps_keep_whole_attention_matrices_unless_recomputed():
    shape = {"model": GEMMA2_27B, "parallel": {"tensor_size": 8, "sequence_parallel": True}}
    plain = Config.model_validate(PPO | shape)
    kept = [
        make_plan(with_keys(plain, keys), "ppo", cluster(nodes=2)).worst.phases["update"]
        for keys in ({}, {"memory.recompute": "selective"})
    ]
    scores = 46 * 8 * 4 * 1536**2
    assert kept[0]["activations"] - kept[1]["activations"] > scores * 7.9
