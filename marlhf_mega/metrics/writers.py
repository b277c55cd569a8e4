"""Where a run's numbers and samples go: JSON Lines, TensorBoard, Weights & Biases."""

import importlib.util
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from marlhf_mega.metrics.jsonl import JsonLines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and response as it is shown to people."""

    prompt: str
    """The prompt's text."""
    tokens: Sequence[str]
    """The text each token of the response adds; joined, they are the response."""
    action_starts: Sequence[int] = ()
    """Index of the first token of each macro action; empty: not segmented."""
    score: float | None = None
    """The reward that trains; none: masked or not scored."""
    gold: float | None = None
    """The judge that never trains; none: there is none."""

    @property
    def response(self) -> str:
        """The response's text."""
        return "".join(self.tokens)


class MetricsWriter:
    """Writes the metrics of each step. One rank of the run makes one."""

    def __init__(
        self,
        run_dir: Path,
        *,
        run_name: str,
        config: Mapping[str, Any],
        first_step: int,
        tensorboard: bool,
        wandb_project: str | None,
    ) -> None:
        """Open the outputs; on a resume, steps from `first_step` on are written anew.

        Args:
            run_dir: the run directory; `metrics.jsonl` and `tensorboard/` lie in it.
            run_name: the name Weights & Biases shows.
            config: the resolved configuration, for Weights & Biases.
            first_step: the first step this attempt will write.
            tensorboard: write event files.
            wandb_project: Weights & Biases project; none: off.

        Raises:
            ValueError: Weights & Biases is asked for and not installed.
        """
        self._wandb_run = (
            _start_wandb(
                run_dir,
                project=wandb_project,
                name=run_name,
                config=config,
                is_fresh=first_step == 0,
            )
            if wandb_project
            else None
        )
        self._lines = JsonLines(run_dir / "metrics.jsonl", first_step=first_step)
        self._events = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
            if tensorboard
            else None
        )
        self._known_bad: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step everywhere; a name that is not finite is warned about once."""
        bad = {name for name, value in metrics.items() if not math.isfinite(value)}
        for name in sorted(bad - self._known_bad):
            logger.warning("step %d: %s is %s; written as null", step, name, metrics[name])
        self._known_bad |= bad
        self._lines.write({"step": step, **metrics})
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._wandb_run:
            self._wandb_run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush and close every output."""
        self._lines.close()
        if self._events:
            self._events.close()
        if self._wandb_run:
            self._wandb_run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SamplesWriter:
    """Writes samples to `samples.jsonl` in the run directory."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Open the file; on a resume, steps from `first_step` on are written anew."""
        self._lines = JsonLines(run_dir / "samples.jsonl", first_step=first_step)

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Append samples of one step."""
        for sample in samples:
            record = asdict(sample) | {"response": sample.response}
            self._lines.write({"step": step, **record})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_wandb(project: str | None) -> None:
    """Check, before anything starts, that Weights & Biases can be used if it is asked for.

    Raises:
        ValueError: the package is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb={project}: needs the wandb package; it is not installed. "
            "Run `pip install marlhf-mega[wandb]` or set logging.wandb=null."
        )


def _start_wandb(
    run_dir: Path, *, project: str, name: str, config: Mapping[str, Any], is_fresh: bool
) -> Any:
    check_wandb(project)
    import wandb

    folder = run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "run_id"
    # The server ignores steps that are not above the last it has of a run.
    if is_fresh or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        name=name,
        dir=str(run_dir),
        config=dict(config),
        id=id_file.read_text(),
        resume="allow",
    )
