"""The metrics of an optimizer step."""

from collections.abc import Sequence

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.models.train_state import StepResult


def add_optimizer_step(
    sums: MetricSums,
    losses: Sequence[LossOutput],
    result: StepResult,
    *,
    role: str,
    loss_prefix: str | None = None,
) -> None:
    """Add one optimizer step; called on one rank of each replica.

    Args:
        sums: takes `role`/{skipped_fraction, grad_norm, lr} and what the losses report.
        losses: of this replica's microbatches.
        result: of the step.
        role: of the model.
        loss_prefix: of the losses' metrics; None means `role`.
    """
    sums.add_means({f"{role}/skipped_fraction": float(result.skipped)}, count=1)
    if result.skipped:
        return
    prefix = loss_prefix or role
    for loss in losses:
        sums.add_means({f"{prefix}/loss": loss.loss_sum}, count=loss.count)
        for name, (total, count) in loss.metrics.items():
            sums.add_means({f"{prefix}/{name}": total}, count=count)
    sums.add_means({f"{role}/grad_norm": result.grad_norm, f"{role}/lr": result.lr}, count=1)
