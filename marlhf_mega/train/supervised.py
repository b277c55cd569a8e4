"""The run that sft, reward and offline share: stream -> microbatches -> optimizer step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.store import load
from marlhf_mega.config.checks import SECTIONS, TrainingJob
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.data.stream import SampleStream, WeightedStream
from marlhf_mega.metrics import rates
from marlhf_mega.metrics.held_out import HeldOut, SinceStart
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.forward import Forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.checkpoints import make_saver, resume
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.loop import Loop
from marlhf_mega.train.output import RunOutput
from marlhf_mega.train.resume import CONFIG, settings_of
from marlhf_mega.train.steps import num_steps
from marlhf_mega.update.metrics import add_optimizer_step
from marlhf_mega.update.skipped import keep_skipped

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one forward takes: the sequences, and what else the loss needs."""

    batch: Any
    extra: Any = None


class Labels(Protocol):
    """Labels that change with the epochs, and so are part of the run's state."""

    def enter(self, epoch: int, state: TrainState) -> None:
        """Change them if a new epoch begins. All ranks call it before every step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint has kept."""


@dataclass(frozen=True, kw_only=True)
class SupervisedJob(Generic[Example]):
    """What distinguishes one supervised job from another."""

    job: TrainingJob
    role: str
    """Name of the trained model in checkpoints and metrics: policy or reward."""
    optimizer: OptimizerConfig
    batch_size: int
    """Examples per optimizer step, over all ranks."""
    cut: Callable[[Sequence[Any]], list[Microbatch]]
    """A rank's examples, or what `respond` made of them -> microbatches."""
    forward: Forward
    loss: Callable[[Tensor, Microbatch], LossOutput]
    metric_names: Sequence[str]
    """Keys of the loss's metrics."""
    output_size: int
    """Columns of the head: the vocabulary size, or 1."""
    evaluate: Callable[[TrainState, Sequence[Example]], HeldOut]
    """Held-out results of this rank's model on all validation examples."""
    prepare: Callable[[TrainState, list[Microbatch]], list[Microbatch]] | None = None
    """Adds to a rank's microbatches what the loss needs of the whole batch. All ranks call it."""
    respond: Callable[[Sequence[Example], int], Sequence[Any]] | None = None
    """Turns a rank's prompts and the step into answered ones. All ranks call it."""
    labels: Labels | None = None
    """None means that those of the examples stay."""


def train_supervised(
    spec: SupervisedJob[Example],
    inputs: Inputs[Example],
    chunks: Sequence[StageModel],
    mesh: Mesh,
    watchdog: Watchdog,
    *,
    stream: SampleStream | WeightedStream | None = None,
) -> dict[str, float]:
    """Train, evaluate, save, export. All ranks call it.

    Args:
        spec: the job.
        inputs: configuration and examples.
        chunks: this rank's chunks, filled.
        mesh: this rank's mesh.
        watchdog: of this job.
        stream: the order of the examples; none: epochs.

    Returns:
        The last held-out results.
    """
    stream = stream or inputs.stream(spec.batch_size)
    run = SupervisedRun(spec, inputs, chunks, mesh, watchdog, stream)
    with run.output:
        loop = Loop(run)
        loop.start()
        for step in loop.steps():
            with run.output.step(step + 1):
                metrics = run.step(step)
            loop.finish_step(step + 1, metrics)
        loop.finish()
    return run.last_results


class SupervisedRun(Generic[Example]):
    """What a run consists of: one model, a stream of examples, checkpoints, writers."""

    def __init__(
        self,
        spec: SupervisedJob[Example],
        inputs: Inputs[Example],
        chunks: Sequence[StageModel],
        mesh: Mesh,
        watchdog: Watchdog,
        stream: SampleStream | WeightedStream,
    ) -> None:
        """Take what `train_supervised` takes and, where there is a checkpoint, resume from it."""
        self.spec, self.inputs, self.config = spec, inputs, inputs.config
        self.chunks, self.mesh, self.stream = chunks, mesh, stream
        key = f"{SECTIONS[spec.job]}.batch_size"
        self.num_steps = num_steps(self.config, inputs.epoch_size, spec.batch_size, key=key)
        overlap = self.config.parallel.overlap
        self.state = TrainState(chunks, spec.optimizer, total_steps=self.num_steps, overlap=overlap)
        self.roles = {spec.role: self.state}
        self.last_results: dict[str, float] = {}
        self.since_start = SinceStart(inputs.validation_hash)
        self.first_step = self._resume()
        self.saver = make_saver(self.config, mesh)
        self.output = RunOutput(
            spec.job, inputs, mesh, watchdog, num_steps=self.num_steps, first_step=self.first_step
        )

    def _resume(self) -> int:
        labels = self.spec.labels
        required = ("step", "stream") if labels is None else ("step", "stream", "labels")
        state = resume(self.config, self.spec.job, self.roles, self.mesh, required=required)
        if state is None:
            return 0
        self.stream.load_state_dict(state["stream"])
        self.since_start.load_state(state.get("first_results"))
        if labels is not None:
            labels.load_state_dict(state["labels"])
        return int(state["step"])

    def step(self, step: int) -> dict[str, float]:
        """Take one optimizer step; returns the reduced metrics."""
        own = None
        if self.spec.respond is not None:
            with self.output.timers("rollout"):
                own = self.spec.respond(self._own_examples(), step)
        with self.output.timers("update"):
            metrics = self._update(step, self._own_examples() if own is None else own)
        role = self.spec.role
        metrics |= rates.rates(
            metrics,
            {role: self.output.timers.seconds("update")},
            num_devices=self.mesh.world_size,
            device_name=self.mesh.platform.device_name,
        )
        metrics["perf/tokens_per_second"] = metrics[f"perf/tokens_per_second_{role}"]
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Judge the model on the validation examples."""
        if not self.inputs.validation:
            return {}
        with self.output.timers("evaluate"):
            results = self.spec.evaluate(self.state, self.inputs.validation)
        self.last_results = self.since_start.metrics(results)
        return self.last_results

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        progress = {
            "step": done,
            "stream": self.stream.state_dict(),
            "first_results": self.since_start.state(),
            CONFIG: settings_of(self.config),
        }
        if self.spec.labels is not None:
            progress["labels"] = self.spec.labels.state_dict()
        self.saver.save(done, self.roles, progress)

    def load(self, folder: Path) -> None:
        """Take the model from a checkpoint of this run."""
        load(folder, self.roles, self.mesh)

    def export(self) -> None:
        """Write the model as a Hugging Face folder."""
        target = self.config.run.dir / "hf"
        export_hf(
            self.chunks, self.config, self.mesh, target=target, tokenizer=self.inputs.tokenizer
        )

    def _own_examples(self) -> Sequence[Example]:
        """Return this rank's share of the next batch."""
        if self.spec.labels is not None and isinstance(self.stream, SampleStream):
            self.spec.labels.enter(self.stream.epoch, self.state)
        batch = [self.inputs.train[i] for i in self.stream.next_batch().tolist()]
        share = len(batch) // self.mesh.dp_size
        return batch[self.mesh.dp_rank * share : (self.mesh.dp_rank + 1) * share]

    def _update(self, step: int, own: Sequence[Any]) -> dict[str, float]:
        spec, mesh, state = self.spec, self.mesh, self.state
        state.zero_grad()
        microbatches = spec.cut(own)
        if spec.prepare is not None:
            microbatches = spec.prepare(state, microbatches)
        with dropping(state.chunks, self.config.run.seed, step):
            losses = pipeline_forward_backward(state.chunks, microbatches, spec.forward, spec.loss)
        result = state.step()
        # There is no other model whose passes the new weights could travel beside.
        state.wait_params()
        if result.skipped:
            tokens = {f"{i}.tokens": m.batch.tokens for i, m in enumerate(microbatches)}
            keep_skipped(state.num_skipped, tokens, self.config, mesh, role=spec.role, step=step)
        names = [f"{spec.job}/loss", *(f"{spec.job}/{n}" for n in spec.metric_names)]
        names += [f"{spec.role}/{n}" for n in ("lr", "grad_norm", "skipped_fraction")]
        sums = MetricSums(mean=names, total=rates.declared([spec.role]))
        if mesh.reports_metrics:
            rates.add(sums, {spec.role: self._work(microbatches)})
            add_optimizer_step(sums, losses, result, role=spec.role, loss_prefix=spec.job)
        return self.output.reduce(sums)

    def _work(self, microbatches: Sequence[Microbatch]) -> rates.PhaseWork:
        """Count what this replica's microbatches take; fillers count nowhere."""
        prompts = torch.cat([m.batch.prompt_lengths for m in microbatches])
        responses = torch.cat([m.batch.response_lengths for m in microbatches])
        real = ~torch.cat([m.batch.is_filler for m in microbatches])
        return rates.training_work(
            self.config.model,
            prompts[real].tolist(),
            responses[real].tolist(),
            output_size=self.spec.output_size,
        )
