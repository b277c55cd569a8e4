"""Shards of every model family are resharded between layouts in one process."""

import pytest
import torch

from marlhf_mega.checkpoint.hf.parameters import find_shards
from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.reshard import describe
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.parallel.reshard_plan import plan_transfers, schedule_rounds
from tests.unit.checkpoint.hf.virtual_ranks import Degrees, virtual_ranks

SIZES = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 24,
    "vocab_size": 50,
}
MODELS = {
    "llama": {},
    "qwen, tied": {"tied_embeddings": True, "qkv_bias": True, "qk_norm": True},
    "gemma2": {"architecture": "gemma2", "post_norms": True, "tied_embeddings": True},
    "mixtral": {"architecture": "mixtral", "num_experts": 4, "experts_per_token": 2},
}
CHANGES = [
    (Degrees(tp=2, pp=2), Degrees(dp=4)),
    (Degrees(tp=2, pp=2), Degrees(tp=2, dp=2)),
    (Degrees(pp=2, vpp=2, dp=2), Degrees(tp=4)),
    (Degrees(tp=4, pp=2), Degrees(tp=2, pp=4)),
]


def fill(rank, table, whole):
    """Parameters as the rank holds them: the shards' pieces of the whole tensors, zero padding."""
    parameters = rank.parameters(table, fill=0)
    for parameter, shard in find_shards(parameters, table, rank.layout):
        start = 0
        for piece in shard.pieces:
            if piece.name is not None:
                part = whole[piece.name].narrow(piece.dim, piece.lo, piece.size)
                parameter.tensor.narrow(piece.dim, start, piece.size).copy_(part)
            start += piece.size
    return parameters


def copy(transfer, before, after):
    t = transfer
    source, target = before[t.source][t.source_parameter], after[t.target][t.target_parameter]
    part = source.tensor.narrow(t.dim, t.source_start, t.size)
    assert part.numel() * part.element_size() == t.num_bytes
    target.tensor.narrow(t.dim, t.target_start, t.size).copy_(part)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_shard_equals_that_of_the_new_layout(name, change):
    config = ModelConfig.model_validate(SIZES | MODELS[name])
    if config.num_experts:
        change = [
            Degrees(tp=d.tp, pp=d.pp, vpp=d.vpp, dp=d.dp, ep=min(2, d.stage_size)) for d in change
        ]
    table = WeightTable(config, "causal_lm")
    whole = {n: torch.randn(shape) for n, shape in table.tensors.items()}
    old, new = (virtual_ranks(config, "causal_lm", degrees) for degrees in change)
    before, wanted = ([fill(rank, table, whole) for rank in ranks] for ranks in (old, new))
    after = [rank.parameters(table, fill=0) for rank in new]
    plan = plan_transfers(
        [describe(p, table, rank.layout) for p, rank in zip(before, old, strict=True)],
        [describe(p, table, rank.layout) for p, rank in zip(after, new, strict=True)],
    )
    for transfer in plan:
        if transfer.is_local:
            copy(transfer, before, after)
    for transfers in schedule_rounds(plan, limit_bytes=2048):
        for transfer in transfers:
            copy(transfer, before, after)
    for rank in range(len(new)):
        for mine, expected in zip(after[rank], wanted[rank], strict=True):
            assert torch.equal(mine.tensor, expected.tensor), mine.name
