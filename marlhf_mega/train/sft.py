"""Supervised fine-tuning: token-mean cross entropy on the responses only."""

from collections.abc import Sequence

from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput, sft_loss
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import ExampleBuilder, SupervisedExample
from marlhf_mega.data.files import Row
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.forward import cut_rows, forward_rows
from marlhf_mega.models.roles import LogprobStep
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.build import build_model, policy_origin
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised

RUN = LogprobStep(1.0)


def sft_inputs(config: Config, world_size: int) -> Inputs[SupervisedExample]:
    """Read what sft needs; raises ValueError for anything the user has to mend."""

    def build(builder: ExampleBuilder, rows: Sequence[Row]) -> list[SupervisedExample]:
        return builder.supervised(rows)

    policy_origin(config)
    return read_inputs(config, "sft", world_size=world_size, kind="sft", build=build)


def run_sft(inputs: Inputs[SupervisedExample], mesh: Mesh) -> dict[str, float]:
    """Fine-tune the policy on demonstrations; returns the last held-out results."""
    config = inputs.config
    chunks = build_model(
        config.model,
        config,
        mesh,
        head="language",
        origin=policy_origin(config),
        name="policy",
    )

    def cut(examples: Sequence[SupervisedExample]) -> list[Microbatch]:
        cuts = cut_rows(
            [e.prompt_ids for e in examples],
            [e.response_ids for e in examples],
            limit=MicrobatchLimit.of(config.sft),
            mesh=mesh,
        )
        return [Microbatch(batch=cut.batch) for cut in cuts]

    def loss(output: Tensor, microbatch: Microbatch) -> LossOutput:
        return sft_loss(output[0], microbatch.batch.response_mask)

    def evaluate(state: TrainState, examples: Sequence[SupervisedExample]) -> dict[str, float]:
        own = examples[mesh.dp_rank :: mesh.dp_size]
        logprobs = forward_rows(
            state.chunks,
            [e.prompt_ids for e in own],
            [e.response_ids for e in own],
            mesh=mesh,
            limit=MicrobatchLimit.of(config.sft),
            run=RUN,
            leading=(2,),
        )[0]
        tokens = sum(len(e.response_ids) for e in own)
        sums = sum_over_data(logprobs.new_tensor([-logprobs.sum().item(), tokens]), mesh)
        return {"eval/loss": float(sums[0] / sums[1])}

    spec = SupervisedJob(
        job="sft",
        role="policy",
        optimizer=config.policy,
        optimizer_prefix="policy",
        batch_size=config.sft.batch_size,
        cut=cut,
        run=RUN,
        loss=loss,
        metric_names=(),
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    return train_supervised(spec, inputs, chunks, mesh)
