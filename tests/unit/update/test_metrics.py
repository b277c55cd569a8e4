"""The metrics of optimizer steps, by hand."""

import pytest
import torch

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics
from marlhf_mega.models.train_state import StepResult
from marlhf_mega.update.metrics import add_optimizer_step


def loss(total, count, clipped):
    return LossOutput(
        loss_sum=torch.tensor(total),
        count=torch.tensor(count),
        metrics={"clip_fraction": (torch.tensor(clipped), torch.tensor(count))},
    )


def declared(role, prefix):
    names = [f"{role}/{name}" for name in ("skipped_fraction", "grad_norm", "lr")]
    return MetricSums(mean=[*names, f"{prefix}/loss", f"{prefix}/clip_fraction"])


def test_losses_are_means_over_their_elements_and_skipped_steps_count_in_one_metric_only():
    sums = declared("policy", "policy")
    taken = StepResult(skipped=False, grad_norm=2.0, lr=0.5)
    add_optimizer_step(sums, [loss(6.0, 3, 1.0), loss(2.0, 1, 0.0)], taken, role="policy")
    skipped = StepResult(skipped=True, grad_norm=float("nan"), lr=0.25)
    add_optimizer_step(sums, [loss(float("nan"), 4, 4.0)], skipped, role="policy")
    assert reduce_metrics(sums, *2 * [lambda packed: packed]) == pytest.approx(
        {
            "policy/skipped_fraction": 1 / 2,
            "policy/loss": 8 / 4,
            "policy/clip_fraction": 1 / 4,
            "policy/grad_norm": 2.0,
            "policy/lr": 0.5,
        }
    )


def test_a_job_may_name_its_losses():
    sums = declared("policy", "sft")
    result = StepResult(skipped=False, grad_norm=1.0, lr=0.1)
    add_optimizer_step(sums, [loss(3.0, 2, 0.0)], result, role="policy", loss_prefix="sft")
    found = reduce_metrics(sums, *2 * [lambda packed: packed])
    assert found["sft/loss"] == 1.5
    assert found["policy/lr"] == pytest.approx(0.1)
