"""Writers of metrics and samples: JSON Lines, TensorBoard, Weights & Biases."""

import importlib.util
import json
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf_mega.metrics.format import number
from marlhf_mega.metrics.jsonl import JsonLines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

HPARAM_METRICS = (
    *("eval/gold_mean", "eval/score_mean", "eval/win_rate", "eval/kl"),
    *("eval/loss", "eval/accuracy"),
)
"""Metrics beside the hyper-parameters in TensorBoard, of the jobs that have them."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """One macro action of a response, and what learning made of it."""

    start: int
    """Index of its first token."""
    length: int
    """Tokens."""
    advantage: float
    """What the policy's loss takes: whitened and weighted if asked for."""
    value: float | None
    """The critic's value at rollout, pooled as the config says; None without a critic."""
    kl: float | None
    """Sum over its tokens of log p / p_reference; None without a reference."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and response as it is shown to people."""

    id: int
    """Index among the samples of the step; of held-out prompts, among those."""
    prompt: str
    """The prompt's text."""
    tokens: Sequence[str]
    """The text each token of the response adds; joined, they are the response."""
    end: str | None = None
    """How the end token is written; None: the response was cut off or ended by its text."""
    actions: Sequence[Action] = ()
    """Empty if not segmented."""
    score: float | None = None
    """The reward that trains, as it was given; None means masked or not scored."""
    shaped: float | None = None
    """The score after normalising, clipping and the penalty for a missing end."""
    kl: float | None = None
    """Sum over the response of log p / p_reference."""
    gold: float | None = None
    """The judge that never trains; None means that there is none."""

    @property
    def response(self) -> str:
        """The response's text."""
        return "".join(self.tokens)


class MetricsWriter:
    """Writes the metrics of each step. Only rank 0 has one."""

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
        """Open the outputs; a resume replaces the steps from `first_step` on.

        Args:
            run_dir: gets `metrics.jsonl` and `tensorboard/`.
            run_name: shown by Weights & Biases.
            config: the resolved configuration, for TensorBoard and Weights & Biases.
            first_step: the first step this attempt will write.
            tensorboard: write event files.
            wandb_project: Weights & Biases project; None means off.

        Raises:
            ValueError: Weights & Biases is requested but not installed.
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
            _open_events(run_dir / "tensorboard", config, first_step=first_step)
            if tensorboard
            else None
        )
        self._known_bad: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step to every output; warn once per metric that is not finite."""
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

    def write_texts(self, step: int, samples: Sequence[Sample]) -> None:
        """Write samples as texts of TensorBoard."""
        if self._events:
            for position, sample in enumerate(samples):
                self._events.add_text(f"sample/{position}", _markdown(sample), step)
            self._events.flush()

    def add(self, step: int, more: Mapping[str, float]) -> None:
        """Add to the metrics of a step in metrics.jsonl; the other outputs only take new steps."""
        self._lines.add(step, more)

    def close(self) -> None:
        """Flush and close every output."""
        self._lines.close()
        if self._events:
            self._events.close()
        if self._wandb_run:
            self._wandb_run.finish()


class SamplesWriter:
    """Writes samples to `samples.jsonl` in the run directory."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Open the file; a resume replaces the steps from `first_step` on."""
        self._lines = JsonLines(run_dir / "samples.jsonl", first_step=first_step)

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Append samples of one step."""
        for sample in samples:
            record = asdict(sample) | {"response": sample.response}
            self._lines.write({"step": step, **record})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _open_events(folder: Path, config: Mapping[str, Any], *, first_step: int) -> "SummaryWriter":
    """Open TensorBoard event files; a fresh run's have the configuration as hyper-parameters."""
    # Only the first rank of a run needs it.
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    events = SummaryWriter(str(folder), purge_step=first_step)
    if first_step == 0:
        # `add_hparams` would write them as another run, without the curves.
        settings = {key: _hyper_parameter(value) for key, value in _flat(config)}
        assert events.file_writer is not None
        for part in hparams(settings, dict.fromkeys(HPARAM_METRICS, 0.0)):
            events.file_writer.add_summary(part)
    return events


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hyper_parameter(value: Any) -> float | str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or isinstance(value, str) else json.dumps(value)


def _markdown(sample: Sample) -> str:
    """Write a sample as code blocks, in which no text is taken for markup; | between actions."""
    starts = {action.start for action in sample.actions} - {0}
    pieces = [("|" if i in starts else "") + token for i, token in enumerate(sample.tokens)]
    numbers = {"score": sample.score, "shaped": sample.shaped, "KL": sample.kl}
    known = [f"{name} {number(value)}" for name, value in numbers.items() if value is not None]
    prompt, response = (
        "\n".join(f"    {line}" for line in text.splitlines())
        for text in (sample.prompt, "".join(pieces) + (sample.end or ""))
    )
    return f"sample {sample.id}: {', '.join(known)}\n\n{prompt}\n\nresponse:\n\n{response}"


def check_wandb(project: str | None) -> None:
    """Check that Weights & Biases is installed if a run is to use it.

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
    # The server ignores steps that are not above the last one it has of a run.
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
