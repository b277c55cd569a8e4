import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from marlhf_mega.checkpoint.hf.importer import import_weights
from tests.unit.checkpoint.hf.transfers import edit, import_ranks, parameters_for, read_all, refused
from tests.unit.checkpoint.hf.virtual_ranks import Degrees, virtual_ranks


def test_tensors_that_would_change_the_model_are_refused(folder, table_of):
    bias = "model.layers.0.self_attn.o_proj.bias"
    edit(folder, lambda tensors: tensors.update({bias: torch.zeros(32)}))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: every tensor under model. must belong to llama; 1 do not, such as "
        f"{bias}. Use another model."
    )


def test_tensors_that_the_model_does_not_use_are_reported(folder, table_of, caplog):
    extra = {
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    edit(folder, lambda tensors: tensors.update(extra))
    table = table_of(folder)
    parameters, layout = parameters_for(table)
    with caplog.at_level(logging.WARNING):
        assert import_weights(folder, parameters, table, layout) == []
    assert caplog.text.rstrip().endswith(f"not used: {', '.join(sorted(extra))}")


def test_tied_checkpoint_with_an_output_layer_ignores_it(hf_root, table_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(hf_root / "qwen2_tied", folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(67, 32)}))
    table = table_of(folder)
    parameters, layout = parameters_for(table, Degrees(pp=2), rank=1)
    assert import_weights(folder, parameters, table, layout) == []
    output = next(p.tensor for p in parameters if p.name == "output_layer.weight")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(output[:67], embedding)


def test_language_model_given_as_reward_model(folder, table_of):
    table = table_of(folder, head="sequence_classification")
    assert refused(folder, table, key="reward.source") == (
        "reward.source=DIR: a reward model must have score.weight; the files do not. Use the "
        "folder of a *ForSequenceClassification model."
    )


def test_reward_model_given_as_language_model(hf_root, table_of):
    folder = hf_root / "llama31_reward"
    assert refused(folder, table_of(folder, head="causal_lm")) == (
        "model.hf_path=DIR: the files must have every tensor of the model; 1 of 39 are missing: "
        "lm_head.weight. Download the folder again."
    )


def test_model_of_another_layout(folder, table_of):
    table = table_of(folder)
    parameters, _ = parameters_for(table)
    _, layout = parameters_for(table, Degrees(tp=2))
    with pytest.raises(RuntimeError) as error:
        import_weights(folder, parameters, table, layout)
    assert str(error.value) == (
        "embedding.word_embeddings.weight: must have shape [40, 32] on this rank; it has "
        "[72, 32]. Build the model from the same config and layout."
    )


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "gemma", "qwen2_moe"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fused_parameters_are_what_megatron_core_multiplies_with(family, tp, hf_root, table_of):
    table, hf = table_of(hf_root / family), read_all(hf_root / family)
    config, rank = table.config, tp - 1
    _, parameters = import_ranks(hf_root / family, table, Degrees(tp=tp))
    ours = {p.name: p.tensor for p in parameters[rank]}
    groups, width = config.query_groups, config.kv_channels
    for kind in ["weight", "bias"] if config.qkv_bias else ["weight"]:
        parts = [hf[f"model.layers.2.self_attn.{n}_proj.{kind}"].float() for n in "qkv"]
        by_group = [p.view(groups, -1, width, *p.shape[1:]) for p in parts]
        fused = torch.cat(by_group, dim=1).flatten(0, 2).chunk(tp)[rank]
        assert torch.equal(ours[f"decoder.layers.2.self_attention.linear_qkv.{kind}"], fused)
    mlp, inner = ("mlp.shared_expert", "shared_experts.") if config.num_experts else ("mlp", "")
    halves = [hf[f"model.layers.2.{mlp}.{n}_proj.weight"].float() for n in ("gate", "up")]
    fused = torch.cat([half.chunk(tp)[rank] for half in halves])
    assert torch.equal(ours[f"decoder.layers.2.mlp.{inner}linear_fc1.weight"], fused)
    out = hf["model.layers.2.self_attn.o_proj.weight"].float().chunk(tp, dim=1)[rank]
    assert torch.equal(ours["decoder.layers.2.self_attention.linear_proj.weight"], out)


def test_only_the_first_replica_reads_when_asked_to_broadcast(hf_root, table_of):
    folder = hf_root / "mixtral"
    table = table_of(folder)
    ranks = virtual_ranks(table.config, table.head, Degrees(dp=2, ep=2))
    sent = []
    for rank in ranks:
        own, read = rank.parameters(table), []
        import_weights(
            *(folder, own, table, rank.layout),
            broadcast=lambda name, _: sent.append(name),
            progress=read.append,
        )
        experts = {p.name for p in own if ".local_experts." in p.name}
        filled = {p.name for p in own if not p.tensor.isnan().any()}
        first = rank.layout.data_rank == 0
        assert filled == ({p.name for p in own} if first else experts)
        assert sum(read) == sum(p.tensor.nbytes for p in own if p.name in filled) - (
            2 * 5 * 32 * 4 if first else 0
        )
    assert sent == [name for rank in ranks for name, _ in rank.names]
