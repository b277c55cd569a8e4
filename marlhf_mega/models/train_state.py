"""A model in training: data-parallel chunks, optimizer and learning-rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.gpt import StageModel


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of one optimizer step, the same on every rank."""

    grad_norm: float
    """Global, before clipping."""
    lr: float
    """Learning rate of the step just taken."""
    skipped: bool = False
    """The gradient was not finite; nothing has changed on any rank."""


def ddp_config(
    config: TransformerConfig, *, overlap: bool = False
) -> DistributedDataParallelConfig:
    """Return the formats of the gradient and weight buffers that fit a model's number formats."""
    return DistributedDataParallelConfig(
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        fp8_param_gather=config.fp8_param,
        reuse_grad_buf_for_mxfp8_param_ag=_shares_buffer(config),
    )


def optimizer_config(
    optimizer: OptimizerConfig, config: TransformerConfig, *, overlap: bool = False
) -> MegatronOptimizerConfig:
    """Translate our names and a model's number formats to Megatron-Core's optimizer."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.grad_clip,
        bf16=config.params_dtype == torch.bfloat16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        fp8_recipe=config.fp8_recipe if config.fp8 else None,
        reuse_grad_buf_for_mxfp8_param_ag=_shares_buffer(config),
    )


def _shares_buffer(config: TransformerConfig) -> bool:
    """Whether parameter gathers use the gradients' memory: mxfp8 has no buffer of its own."""
    return bool(config.fp8_param) and config.fp8_recipe == "mxfp8"


class TrainState:
    """The trained weights and their optimizer. All ranks call every method.

    With `overlap`, gradients are reduced bucket by bucket during the last microbatch's backward
    pass, and a step returns with parameter gathers still in flight between the data-parallel ranks.
    Reading `chunks` waits for them; code that kept the chunks from before the step must call
    `wait_params` before it reads a weight.
    """

    def __init__(
        self,
        chunks: Sequence[StageModel],
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        overlap: bool = False,
        bucket_size: int | None = None,
    ) -> None:
        """Wrap the chunks and build optimizer state.

        Args:
            chunks: this rank's chunks, with weights filled in.
            optimizer: AdamW and its schedule.
            total_steps: optimizer steps of the whole run, for the learning-rate decay.
            overlap: overlap data-parallel communication with computation.
            bucket_size: least number of elements in a bucket, with `overlap`; None means
                Megatron's default.
        """
        config = chunks[0].config
        ddp = ddp_config(config, overlap=overlap)
        ddp.bucket_size = bucket_size
        self._chunks = [
            # Gradients of a stage's other chunks are reduced while this one's are still computed.
            DistributedDataParallel(
                config=config, ddp_config=ddp, module=chunk, disable_bucketing=overlap and i > 0
            )
            for i, chunk in enumerate(chunks)
        ]
        if overlap:
            for chunk in self._chunks:
                # Megatron's hooks wait when a module is called. Heads and decoders read weights
                # without calling the module, so `wait_params` does the waiting instead.
                chunk.disable_forward_pre_hook(param_sync=False)
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            optimizer_config(optimizer, config, overlap=overlap),
            self._chunks,
            use_gloo_process_groups=False,
        )
        self._overlap, self._is_gathering = overlap, False
        self.fused = True if config.use_cpu_initialization else None
        """Use torch's fused AdamW, which makes one pass over memory; GPUs gain nothing from it."""
        self.schedule = lr_schedule(self.optimizer, optimizer, total_steps)
        self.num_skipped = 0
        """Consecutive skipped steps."""
        self._tell_schedule(config)

    def _tell_schedule(self, config: TransformerConfig) -> None:
        """Set the callbacks that Megatron's pipeline schedules read from the chunks' configs."""
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = None
        if self._overlap:
            no_sync = [chunk.no_sync for chunk in self._chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        for chunk in self._chunks:
            # Each chunk has a config object of its own.
            chunk.module.config.finalize_model_grads_func = finalize_model_grads

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """This rank's chunks, after in-flight parameter gathers have finished."""
        self.wait_params()
        return self._chunks

    @property
    def base_digest(self) -> str | None:
        """Hash of the weights that adapters leave as they are; None where all weights learn."""
        digest: str | None = self._chunks[0].module.base_digest
        return digest

    def wait_params(self) -> None:
        """Wait for in-flight parameter gathers."""
        if not self._is_gathering:
            return
        for chunk in self._chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)
        self._is_gathering = False

    def gradient_buffers(self) -> list[Tensor]:
        """Return the buffers that hold all gradients of this rank; `zero_grad` zeroes them."""
        return [
            buffer.grad_data
            for chunk in self._chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    def gradient_shards(self) -> list[Tensor]:
        """Return this rank's part of the reduced gradient; no element is on two ranks."""
        self.optimizer.prepare_grads()
        # Called one way by Megatron-Core 0.16, the other by 0.19.
        names = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")
        return [
            gradient
            for part in self.optimizers()
            for gradient in getattr(part, next(n for n in names if hasattr(part, n)))()
        ]

    def optimizers(self) -> list[Any]:
        """Return the optimizers that hold parameters on this rank: one, or two with experts."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if not part.is_stub_optimizer]

    def optimizer_tensors(self) -> list[Tensor]:
        """Return master weights and moments, except masters that are the weights themselves."""
        weights = {p.untyped_storage()._cdata for c in self._chunks for p in c.parameters()}
        found = []
        for part in self.optimizers():
            inner = part.optimizer
            found += [p for group in inner.param_groups for p in group["params"]]
            found += [x for state in inner.state.values() for x in state.values()]
        return [
            tensor
            for tensor in found
            # Step counters are single numbers, some not even tensors.
            if torch.is_tensor(tensor)
            and tensor.dim()
            and tensor.untyped_storage()._cdata not in weights
        ]

    def zero_grad(self) -> None:
        """Zero the gradients; call before the microbatches of every optimizer step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> StepResult:
        """Advance the schedule, clip, update; skip the step if the gradient is not finite.

        The norm is summed over all ranks, so all of them skip together. With `overlap`, parameter
        gathers are still in flight when it returns.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            self.num_skipped += 1
            return StepResult(grad_norm=grad_norm, lr=0.0, skipped=True)
        self.num_skipped = 0
        # The schedule advances first: warm-up step k of n uses lr * k / n, so none has lr 0.
        self.schedule.step(increment=1)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self._clip(grad_norm)
        for group in self.optimizer.param_groups:
            group["fused"] = self.fused  # a checkpoint may hold another platform's choice
        self.optimizer.step_with_ready_grads()
        if self._overlap:
            for chunk in self._chunks:
                chunk.start_param_sync()
            self._is_gathering = True
        return StepResult(grad_norm=grad_norm, lr=lr)

    def _clip(self, grad_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `grad_clip`.

        Torch's fused AdamW divides by `grad_scale` in the one pass that it makes over memory.
        """
        for part in self.optimizers():
            limit = part.config.clip_grad
            exceeds = 0 < limit < grad_norm
            if self.fused:
                part.optimizer.grad_scale = torch.tensor(grad_norm / limit) if exceeds else None
            elif exceeds:
                clip_grads_with_norm_(part.get_parameters(), limit, torch.tensor(grad_norm))


def lr_schedule(
    optimizer: MegatronOptimizer | torch.optim.Optimizer,
    settings: OptimizerConfig,
    total_steps: int,
) -> OptimizerParamScheduler:
    """Return what sets the learning rate before each of an optimizer's steps."""
    warmup = settings.num_warmup_steps(total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr),
        lr_warmup_steps=warmup,
        # The end of the decay is one step behind the last, which would else change nothing.
        lr_decay_steps=max(total_steps, warmup) + 1,
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
