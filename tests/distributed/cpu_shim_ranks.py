"""Rank program of test_cpu_shim.py: tiny Megatron models on the CPU, one layout after another.

Usage: cpu_shim_ranks.py REPORT. Started with one rank it writes the
answers of a single process; with four ranks it trains the same models sharded. Weights depend on
the parameter's global name and position only, so that every layout starts from the same model.
"""

import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from marlhf_mega.platform import prepare

PLATFORM = prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core import tensor_parallel as tp  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 64, 12, 4


@dataclass(frozen=True)
class Case:
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    sequence_parallel: bool = False
    num_experts: int | None = None
    bf16: bool = False
    distributed_optimizer: bool = True
    tied: bool = False


class Norm(torch.nn.Module):
    """RMSNorm whose weight takes part in sequence parallel gradient sums."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight


class CausalAttention(torch.nn.Module):
    """Causal attention by torch; q, k, v are [seq, batch, heads, head dim]."""

    def __init__(self, config, layer_number, attn_mask_type, **_):
        super().__init__()

    def forward(self, q, k, v, attention_mask, **_):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class Trainer:
    def __init__(self, case):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=case.tp_size,
            pipeline_model_parallel_size=case.pp_size,
            expert_model_parallel_size=case.ep_size,
        )
        tp.model_parallel_cuda_manual_seed(7)
        model = build_model(case)
        set_weights(model)
        if case.bf16:
            model = Float16Module(model.config, model)
        self.model = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed_optimizer
            ),
            module=model,
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-2,
                bf16=case.bf16,
                params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
                use_distributed_optimizer=case.distributed_optimizer,
                clip_grad=1.0,
            ),
            [self.model],
        )
        self.adam = self.optimizer.chained_optimizers[0].optimizer
        assert {p.dtype for p in model.parameters()} == {model.config.params_dtype}
        assert {p.dtype for p in self.adam_params()} == {torch.float32}

    def adam_params(self):
        return [p for group in self.adam.param_groups for p in group["params"]]

    def step(self, index):
        """Train on step `index`'s batch; return its loss and gradient norm, on every rank."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        dp_rank = parallel_state.get_data_parallel_rank()
        rows = GLOBAL_BATCH // parallel_state.get_data_parallel_world_size()
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(VOCAB_SIZE, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
        mine = text[dp_rank * rows : (dp_rank + 1) * rows]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine.split(1)),
            model=[self.model],
            num_microbatches=rows,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        updated, grad_norm, _ = self.optimizer.step()
        assert updated
        total = torch.tensor([sum(losses), len(losses)], dtype=torch.float64)
        dist.all_reduce(total)
        return {"loss": (total[0] / total[1]).item(), "grad_norm": float(grad_norm)}


def build_model(case):
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case.tp_size,
        pipeline_model_parallel_size=case.pp_size,
        expert_model_parallel_size=case.ep_size,
        sequence_parallel=case.sequence_parallel,
        num_moe_experts=case.num_experts,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        use_cpu_initialization=True,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=case.bf16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    layer = get_gpt_layer_local_spec(num_experts=case.num_experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    stage_layers = config.num_layers // case.pp_size
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * stage_layers, layer_norm=Norm),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
    )


@torch.no_grad()
def set_weights(model):
    """Give every parameter its slice of a tensor that depends on its global name only."""
    for sharded in model.sharded_state_dict().values():
        if not isinstance(sharded, ShardedTensor):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(sharded.key.encode()))
        whole = 0.1 * torch.randn(sharded.global_shape, generator=generator)
        if "norm" in sharded.key:
            whole += 1
        lengths = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
        offsets = sharded.global_offset
        window = [slice(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
        sharded.data.copy_(whole[tuple(window)].reshape(sharded.local_shape))


def forward_step(batches, model):
    text = next(batches)
    tokens, labels = text[:, :-1], text[:, 1:]
    positions = torch.arange(SEQ_LENGTH).expand_as(tokens)

    def mean_loss(token_losses):
        loss = token_losses.float().mean()
        return loss, loss.detach().clone()

    return model(tokens, positions, None, labels=labels), mean_loss


def rng_tracker_report():
    """Draw inside and outside a fork of the tracker, on two tensor parallel ranks."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)

    def draw(cpu_seed):
        torch.manual_seed(cpu_seed)
        tp.model_parallel_cuda_manual_seed(7)
        torch.manual_seed(cpu_seed)
        with tp.get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        return inside, torch.rand(4)

    inside, outside = draw(cpu_seed=3)
    inside_again, outside_again = draw(cpu_seed=4)
    torch.manual_seed(3)
    by_rank = [torch.empty(4) for _ in range(2)]
    dist.all_gather(by_rank, inside, group=parallel_state.get_tensor_model_parallel_group())
    parallel_state.destroy_model_parallel()
    return {
        "inside_depends_on_the_tracker_seed_only": torch.equal(inside, inside_again),
        "inside_differs_between_tp_ranks": not torch.equal(*by_rank),
        "outside_goes_on_as_without_the_fork": torch.equal(outside, torch.rand(4)),
        "outside_depends_on_the_cpu_seed": not torch.equal(outside, outside_again),
    }


def run(case):
    trainer = Trainer(case)
    report = [trainer.step(index) for index in range(2)]
    parallel_state.destroy_model_parallel()
    return report


def one_rank_reports():
    return {
        "dense": run(Case()),
        "tied": run(Case(tied=True)),
        "moe": run(Case(num_experts=4)),
        "bf16": run(Case(bf16=True)),
        "bf16_plain": run(Case(bf16=True, distributed_optimizer=False)),
    }


def four_rank_reports():
    return {
        "tp2_pp2": run(Case(tp_size=2, pp_size=2)),
        "tp2_sp": run(Case(tp_size=2, sequence_parallel=True)),
        "tied_pp2": run(Case(pp_size=2, tied=True)),
        "moe_ep2": run(Case(ep_size=2, num_experts=4)),
        "bf16_tp2": run(Case(tp_size=2, bf16=True)),
        "bf16_plain_dp4": run(Case(bf16=True, distributed_optimizer=False)),
        "rng_tracker": rng_tracker_report(),
    }


def main():
    report_path = Path(sys.argv[1])
    torch.set_num_threads(1)
    alone = "RANK" not in os.environ
    if alone:
        dist.init_process_group(PLATFORM.backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(PLATFORM.backend)
    reports = one_rank_reports() if alone else four_rank_reports()
    if dist.get_rank() == 0:
        report_path.write_text(json.dumps(reports))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
