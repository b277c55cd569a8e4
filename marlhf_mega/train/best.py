"""Which evaluation was the best so far, by `checkpoint.keep_best`, and when to stop after it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.glossary import METRICS, WIN_RATES


@dataclass(kw_only=True)
class Best:
    """The evaluation with the best value of one metric."""

    metric: str
    step: int | None = None
    """Steps done at the best evaluation; None before the first."""
    value: float = 0.0
    num_worse: int = 0
    """Evaluations since then."""

    def update(self, step: int, results: Mapping[str, Any]) -> bool:
        """Count an evaluation, if it has the metric; returns whether it is the best. NaN is not."""
        if self.metric not in results:
            return False
        value = float(results[self.metric])
        gain = value - self.value if METRICS[self.metric].higher_is_better else self.value - value
        is_best = not math.isnan(value) if self.step is None else gain > 0
        if is_best:
            self.step, self.value, self.num_worse = step, value, 0
        else:
            self.num_worse += 1
        return is_best

    @staticmethod
    def of_run(metric: str, lines: Iterable[Mapping[str, Any]], *, first_step: int) -> "Best":
        """Count the evaluations that a resumed run made up to its checkpoint.

        Args:
            metric: `checkpoint.keep_best`.
            lines: of metrics.jsonl.
            first_step: steps done at the checkpoint.
        """
        best = Best(metric=metric)
        for line in lines:
            if 0 < line["step"] <= first_step:
                best.update(line["step"], line)
        return best


def check_best(config: Config) -> None:
    """Refuse a metric that no direction is better of, or that is not evaluated.

    Raises:
        ConfigError: with the key.
    """
    metric, patience = config.checkpoint.keep_best, config.evaluate.patience
    if metric is None:
        if patience is not None:
            raise ConfigError(
                f"evaluate.patience={patience}: counts evaluations that are no better by "
                "checkpoint.keep_best, which is not set. Set it, for example to eval/loss."
            )
        return
    known = [
        name
        for name, about in METRICS.items()
        if name.startswith("eval/")
        and about.higher_is_better is not None
        and name not in WIN_RATES.values()
    ]
    if metric not in known:
        raise ConfigError(
            f"checkpoint.keep_best={metric}: must be a held-out metric of which more or less is "
            f"better. Use one of {', '.join(known)}."
        )
    if config.data.validation_path is None:
        raise ConfigError(
            f"checkpoint.keep_best={metric}: needs held-out data; data.validation_path is not set. "
            "Set it, or remove the key."
        )
