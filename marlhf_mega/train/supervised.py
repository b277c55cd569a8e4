"""The loop that sft and reward share: stream -> microbatches -> optimizer step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import OptimizerConfig
from marlhf_mega.data.stream import SampleStream, WeightedStream
from marlhf_mega.metrics import rates
from marlhf_mega.metrics.progress import Job
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward_backward
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.output import RunOutput
from marlhf_mega.train.resume import CONFIG, make_saver, resume, settings_of
from marlhf_mega.train.stop import StopRequest, count_attempt
from marlhf_mega.update.skipped import keep_skipped

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one forward takes: the sequences, and what else the loss needs."""

    batch: Any
    extra: Any = None


@dataclass(frozen=True, kw_only=True)
class SupervisedJob(Generic[Example]):
    """What distinguishes one supervised job from another."""

    job: Job
    role: str
    """Name of the trained model in checkpoints: policy or reward."""
    optimizer: OptimizerConfig
    optimizer_prefix: str
    """Metrics of the optimizer: policy/lr or reward/lr."""
    batch_size: int
    """Examples per optimizer step, over all ranks."""
    cut: Callable[[Sequence[Example]], list[Microbatch]]
    """A rank's examples -> microbatches."""
    run: Callable[[Any, Any], Tensor]
    """Calls one chunk on a batch."""
    loss: Callable[[Tensor, Microbatch], LossOutput]
    metric_names: Sequence[str]
    """Keys of the loss's metrics."""
    output_size: int
    """Columns of the head: the vocabulary size, or 1."""
    evaluate: Callable[[TrainState, Sequence[Example]], Mapping[str, float]]
    """Held-out results of this rank's model on all validation examples."""


def train_supervised(
    spec: SupervisedJob[Example],
    inputs: Inputs[Example],
    chunks: Sequence[StageModel],
    mesh: Mesh,
    *,
    stream: SampleStream | WeightedStream | None = None,
) -> dict[str, float]:
    """Train, evaluate, save, export. All ranks call it.

    Args:
        spec: the job.
        inputs: configuration and examples.
        chunks: this rank's chunks, filled.
        mesh: where this rank stands.
        stream: the order of the examples; none: epochs.

    Returns:
        The last held-out results.
    """
    config = inputs.config
    steps = config.run.steps or max(1, len(inputs.train) // spec.batch_size)
    overlap = config.parallel.overlap
    state = TrainState(chunks, spec.optimizer, total_steps=steps, overlap=overlap)
    stream = stream or _epochs(inputs, spec.batch_size)
    roles = {spec.role: state}
    restored = resume(config, spec.job, roles, mesh, required=("step", "stream"))
    first = 0
    if restored is not None:
        first = int(restored["step"])
        stream.load_state_dict(restored["stream"])
    results: Mapping[str, float] = {}
    saver = make_saver(config, mesh)
    count_attempt(config, first, mesh)
    request = StopRequest(config, mesh)
    with RunOutput(spec.job, inputs, mesh, num_steps=steps, first_step=first) as output:
        for step in range(first, steps):
            with output.step(step + 1), output.timers("update"):
                metrics = _step(spec, inputs, state, stream, mesh, output, step)
            metrics |= _rates(spec, metrics, output.timers.seconds("step"), mesh)
            done = step + 1
            if inputs.validation and _due(done, config.evaluate.interval, steps):
                with output.timers("evaluate"):
                    results = spec.evaluate(state, inputs.validation)
                metrics.update(results)
            output.finish_step(done, metrics)
            stopping = request.is_made() and done < steps
            with output.timers("checkpoint"):
                saver.poll()
                if stopping or _due(done, config.checkpoint.interval, steps):
                    progress = {"step": done, "stream": stream.state_dict()}
                    saver.save(done, roles, progress | {CONFIG: settings_of(config)})
                if stopping or done == steps:
                    saver.finish()
            if stopping:
                raise request.end(done)
        if config.checkpoint.export_hf:
            target = config.run.dir / "hf"
            with output.timers("export"):
                export_hf(chunks, config, mesh, target=target, tokenizer=inputs.tokenizer)
        output.write_report()
    return dict(results)


def _epochs(inputs: Inputs[Example], batch_size: int) -> SampleStream:
    return SampleStream(
        num_samples=len(inputs.train),
        batch_size=batch_size,
        seed=inputs.config.run.seed,
        shuffle=inputs.config.data.shuffle,
        data_hash=inputs.data_hash,
    )


def _due(done: int, interval: int, steps: int) -> bool:
    return done == steps or (interval > 0 and done % interval == 0)


def _step(
    spec: SupervisedJob[Example],
    inputs: Inputs[Example],
    state: TrainState,
    stream: SampleStream | WeightedStream,
    mesh: Mesh,
    output: RunOutput,
    step: int,
) -> dict[str, float]:
    """Take one optimizer step; returns the reduced metrics."""
    job, prefix = spec.job, spec.optimizer_prefix
    batch = [inputs.train[i] for i in stream.next_batch().tolist()]
    share = len(batch) // mesh.dp_size
    own = batch[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
    state.zero_grad()
    microbatches = spec.cut(own)
    losses = run_forward_backward(
        state.chunks, microbatches, lambda chunk, m: spec.run(chunk, m.batch), spec.loss
    )
    result = state.step()
    # There is no other model whose passes the new weights could travel beside.
    state.settle()
    if result.skipped:
        tokens = {f"{i}.tokens": m.batch.tokens for i, m in enumerate(microbatches)}
        keep_skipped(state, tokens, inputs.config, mesh, role=prefix, step=step)
    names = [f"{job}/loss", *(f"{job}/{n}" for n in spec.metric_names)]
    names += [f"{prefix}/{n}" for n in ("lr", "grad_norm", "skipped_fraction")]
    sums = MetricSums(mean=names, total=rates.declared([prefix]))
    if mesh.is_reporter:
        rates.add(sums, {prefix: _work(spec, inputs.config.model, microbatches)})
        sums.add_means({f"{prefix}/skipped_fraction": float(result.skipped)}, count=1)
    if mesh.is_reporter and not result.skipped:
        for loss in losses:
            sums.add_means({f"{job}/loss": loss.loss_sum}, count=loss.count)
            for name, (total, count) in loss.metrics.items():
                sums.add_means({f"{job}/{name}": total}, count=count)
        sums.add_means(
            {f"{prefix}/lr": result.lr, f"{prefix}/grad_norm": result.grad_norm}, count=1
        )
    return output.reduce(sums)


def _work(
    spec: SupervisedJob[Example], model: ModelConfig, microbatches: Sequence[Microbatch]
) -> rates.Work:
    """Count what this replica's microbatches take; rows that only fill up count nowhere."""
    prompts = torch.cat([m.batch.prompt_lengths for m in microbatches])
    responses = torch.cat([m.batch.response_lengths for m in microbatches])
    real = responses > 0
    return rates.training_work(
        model, prompts[real].tolist(), responses[real].tolist(), output_size=spec.output_size
    )


def _rates(
    spec: SupervisedJob[Example], metrics: dict[str, float], seconds: float, mesh: Mesh
) -> dict[str, float]:
    role = spec.optimizer_prefix
    found = rates.rates(
        metrics,
        {role: seconds},
        num_devices=mesh.world_size,
        device_name=mesh.platform.device_name,
    )
    return found | {"perf/tokens_per_second": found[f"perf/tokens_per_second_{role}"]}
