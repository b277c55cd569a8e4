"""Checkpoints by Young's and Daly's formula."""

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.plan.checkpoints import Reliability, checkpoint_plan
from marlhf_mega.plan.workload import workload
from tests.unit.plan.plans import PPO, planned_disaggregated
from tests.unit.plan.shapes import LLAMA_8B


def test_the_interval_of_saves_is_young_and_dalys():
    """600 s to write, one failure in 50,000 GPU-hours: sqrt(2 * 600 * MTBF) - 600."""
    config = Config.model_validate(PPO | {"model": LLAMA_8B})
    work = workload(config, "sft", 32)
    size = 8_030_261_248 * 14
    save = checkpoint_plan(
        work,
        nodes=4,
        element=2,
        step_seconds=60.0,
        rates=Reliability(mtbf_hours=50_000, write_bytes=size / 2400, restart_seconds=300),
    )
    assert save.num_bytes == size
    assert save.write_seconds == pytest.approx(600)
    assert save.world_mtbf_seconds == 50_000 * 3600 / 32
    assert save.interval_seconds == pytest.approx((2 * 600 * 5_625_000) ** 0.5 - 600)
    assert save.interval_steps == round(save.interval_seconds / 60)
    assert save.failures_per_week == pytest.approx(604_800 / 5_625_000)


def test_any_rank_may_fail_and_those_that_train_write():
    plan = planned_disaggregated().checkpoints
    assert plan.world_mtbf_seconds == 50_000 * 3600 / 128
    assert plan.write_seconds == pytest.approx(plan.num_bytes / (12 * 2e9))
