"""Reward-model training: Bradley-Terry on preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput, preference_loss, preference_span_loss
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import ExampleBuilder, PreferencePair
from marlhf_mega.data.files import Row
from marlhf_mega.data.microbatch import MicrobatchLimit, round_up, split_by_size
from marlhf_mega.experience.scoring import last_token_scores
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.roles import score_step
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.build import build_model, policy_origin
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised


@dataclass(frozen=True)
class _Margins:
    """How much better each chosen response is said to be, [pairs]."""

    margins: Tensor


def reward_inputs(config: Config, world_size: int) -> Inputs[PreferencePair]:
    """Read what reward needs; raises ValueError for anything the user has to mend."""

    def build(builder: ExampleBuilder, rows: Sequence[Row]) -> list[PreferencePair]:
        return builder.preferences(rows)

    policy_origin(config)
    return read_inputs(config, "reward", world_size=world_size, kind="preferences", build=build)


def run_reward(inputs: Inputs[PreferencePair], mesh: Mesh) -> dict[str, float]:
    """Train a reward model, usually from the fine-tuned policy; returns held-out results."""
    config = inputs.config
    settings = config.reward_model
    chunks = build_model(
        config.model, config, mesh, head="scalar", origin=policy_origin(config), name="reward"
    )

    def cut(pairs: Sequence[PreferencePair]) -> list[Microbatch]:
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        size, stages = settings.microbatch_size, mesh.pp_size if mesh.num_chunks > 1 else 1
        count = round_up(-(-len(pairs) // size), stages)
        parts = split_by_size(lengths, microbatch_size=size, min_microbatches=count)
        return [
            _pair_microbatch([pairs[i] for i in p.tolist()], mesh, packed=settings.packing)
            for p in parts.indices
        ]

    def evaluate(state: TrainState, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        own = pairs[mesh.dp_rank :: mesh.dp_size]
        chosen, rejected = (
            last_token_scores(
                state.chunks,
                [p.prompt_ids for p in own],
                responses,
                mesh=mesh,
                limit=MicrobatchLimit(rows=2 * settings.microbatch_size, packed=settings.packing),
            )
            for responses in ([p.chosen_ids for p in own], [p.rejected_ids for p in own])
        )
        return _held_out(chosen, rejected, mesh)

    spec = SupervisedJob(
        job="reward",
        role="reward",
        optimizer=settings,
        optimizer_prefix="reward",
        batch_size=settings.batch_size,
        cut=cut,
        run=score_step,
        loss=lambda output, microbatch: _loss(output, microbatch, config),
        metric_names=("accuracy", "margin", "score", "score_square"),
        output_size=1,
        evaluate=evaluate,
    )
    return train_supervised(spec, inputs, chunks, mesh)


def _pair_microbatch(pairs: Sequence[PreferencePair], mesh: Mesh, *, packed: bool) -> Microbatch:
    """Lay out pairs: first all chosen responses, then all rejected ones."""
    prompts = [p.prompt_ids for p in pairs]
    batch = SequenceBatch.create(
        prompts * 2,
        [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs],
        pad_id=0,
        multiple=mesh.sequence_multiple,
        context_multiple=mesh.context_multiple,
        device=mesh.device,
        packed=packed,
    )
    margins = torch.tensor([p.margin for p in pairs], device=mesh.device)
    return Microbatch(batch=batch, extra=_Margins(margins))


def _loss(output: Tensor, microbatch: Microbatch, config: Config) -> LossOutput:
    settings, batch = config.reward_model, microbatch.batch
    margin: Tensor = microbatch.extra.margins
    label = 1.0 - settings.label_smoothing
    if settings.loss == "last":
        last = output.gather(1, (batch.response_lengths - 1)[:, None])[:, 0]
        chosen, rejected = last.chunk(2)
        return preference_loss(
            chosen,
            rejected,
            margin=margin,
            chosen_probability=label,
            center_coef=settings.center_coef,
        )
    chosen, rejected = output.chunk(2)
    tokens = batch.to_grid(batch.response_tokens).chunk(2)
    masks = batch.response_mask.chunk(2)
    return preference_span_loss(
        chosen,
        rejected,
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_mask=masks[0],
        rejected_mask=masks[1],
        margin=margin,
        chosen_probability=label,
        center_coef=settings.center_coef,
    )


def _held_out(chosen: Tensor, rejected: Tensor, mesh: Mesh) -> dict[str, float]:
    lead, both = chosen - rejected, torch.cat((chosen, rejected)).double()
    right = (lead > 0).double()
    loss = torch.nn.functional.softplus(-lead)
    parts = [
        right.sum(),
        lead.double().sum(),
        loss.double().sum(),
        both.sum(),
        both.square().sum(),
        right.new_tensor(len(lead)),
    ]
    sums = sum_over_data(torch.stack(parts), mesh)
    accuracy, margin, loss_mean = (sums[:3] / sums[5]).tolist()
    mean, square = (sums[3:5] / (2 * sums[5])).tolist()
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": (accuracy * (1 - accuracy) / sums[5].item()) ** 0.5,
        "eval/margin": margin,
        "eval/loss": loss_mean,
        "eval/score_mean": mean,
        "eval/score_std": max(square - mean**2, 0.0) ** 0.5,
    }
