"""Megatron-Core on CPU ranks under the shim gives the answers of one process."""

import pytest
import torch

from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPU machines")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks("cpu_shim_ranks.py", 1, tmp_path_factory.mktemp("one") / "out.json")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks("cpu_shim_ranks.py", 4, tmp_path_factory.mktemp("four") / "out.json")


def assert_same_steps(actual, expected, *, relative):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=relative)


@pytest.mark.parametrize(
    ("sharded", "alone"),
    [
        ("tp2_pp2", "dense"),
        ("tp2_sp", "dense"),
        ("tied_pp2", "tied"),
        ("moe_ep2", "moe"),
    ],
)
def test_sharded_training_steps_equal_those_of_one_rank(sharded, alone, one_rank, four_ranks):
    assert_same_steps(four_ranks[sharded], one_rank[alone], relative=1e-5)


def test_bfloat16_parameters_train_alike_with_both_mixed_precision_optimizers(one_rank, four_ranks):
    # Both optimizers keep float32 main parameters, so one rank's numbers agree exactly, and the
    # loss differs from float32's by the rounding of bfloat16 weights (2**-9) at most.
    assert one_rank["bf16"] == one_rank["bf16_plain"]
    assert one_rank["bf16"] != one_rank["dense"]
    assert_same_steps(one_rank["bf16"], one_rank["dense"], relative=2**-7)
    assert_same_steps(four_ranks["bf16_plain_dp4"], one_rank["bf16_plain"], relative=1e-5)
    # Tensor parallel sums of bfloat16 activations are rounded once per rank.
    assert_same_steps(four_ranks["bf16_tp2"], one_rank["bf16"], relative=2**-7)


def test_the_rng_tracker_keeps_its_own_stream_on_every_tensor_parallel_rank(four_ranks):
    assert four_ranks["rng_tracker"] == {
        "inside_depends_on_the_tracker_seed_only": True,
        "inside_differs_between_tp_ranks": True,
        "outside_goes_on_as_without_the_fork": True,
        "outside_depends_on_the_cpu_seed": True,
    }
