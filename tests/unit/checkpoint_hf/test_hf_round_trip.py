import json
from dataclasses import replace

import pytest
import torch
from conftest import run_clean
from make_hf import MODELS, SCALAR_HEADS
from safetensors.torch import load_file
from virtual_ranks import Degrees, ThreadPeers, run_together, virtual_ranks

from marlhf_mega.checkpoint.hf.exporter import export_weights
from marlhf_mega.checkpoint.hf.importer import import_weights
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.hf.table import WeightTable

FAMILIES = [*MODELS, *(f"{name}_reward" for name in SCALAR_HEADS)]
LAYOUTS = [
    Degrees(),
    Degrees(tp=2, pp=2),
    Degrees(tp=4),
    Degrees(pp=4),
    Degrees(pp=2, vpp=2, dp=2),
]
EXPERT_LAYOUTS = [Degrees(ep=2, dp=2), Degrees(tp=2, ep=2), Degrees(tp=2, dp=2, etp=2, ep=2)]
SMALL_SHARDS = 20_000


def read_all(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def import_ranks(folder, table, degrees, dtype=torch.float32, **options):
    ranks = virtual_ranks(table.config, table.head, degrees)
    parameters = [rank.parameters(table, dtype=dtype) for rank in ranks]
    for rank, own in zip(ranks, parameters, strict=True):
        import_weights(folder, own, table, rank.layout, **options)
    return ranks, parameters


def export_ranks(target, table, ranks, parameters, **options):
    def export(peers: ThreadPeers):
        own, layout = parameters[peers.rank], ranks[peers.rank].layout
        return export_weights(target, own, table, layout, peers=peers, **options)

    results = run_together(len(ranks), export)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_are_bit_exact_for_every_layout(family, hf_root, table_of, tmp_path):
    folder = hf_root / family
    table, original = table_of(folder), read_all(folder)
    dtype = next(iter(original.values())).dtype
    layouts = LAYOUTS + (EXPERT_LAYOUTS if table.config.num_experts else [])
    for number, degrees in enumerate(layouts):
        target = tmp_path / str(number)
        ranks, parameters = import_ranks(folder, table, degrees)
        reports = export_ranks(
            target,
            table,
            ranks,
            parameters,
            dtype=dtype,
            side_files=SideFiles(source=folder),
            max_shard_bytes=SMALL_SHARDS,
            gathered=degrees == LAYOUTS[1],
        )
        exported = read_all(target)
        assert list(exported.keys() ^ original.keys()) == []
        for name, tensor in original.items():
            assert exported[name].dtype == dtype
            assert torch.equal(exported[name], tensor), (degrees, name)
        assert len(reports[0].files) > 1
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == original.keys()
        for small in ("config.json", "generation_config.json"):
            if (folder / small).exists():
                assert (target / small).read_bytes() == (folder / small).read_bytes()


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


def test_vocabulary_padding_is_zero_and_left_out_of_the_export(hf_root, table_of):
    folder = hf_root / "llama2"
    table = table_of(folder)
    _, parameters = import_ranks(folder, table, Degrees(tp=2))
    embedding = torch.cat([own[0].tensor for own in parameters])
    assert embedding.shape[0] == 80
    assert embedding[67:].count_nonzero() == 0
    assert table.tensors["model.embed_tokens.weight"] == (67, 32)


def test_only_the_first_replica_reads_when_asked_to_broadcast(hf_root, table_of):
    folder = hf_root / "mixtral"
    table = table_of(folder)
    ranks = virtual_ranks(table.config, table.head, Degrees(dp=2, ep=2))
    sent = []
    for rank in ranks:
        own = rank.parameters(table)
        report = import_weights(
            folder, own, table, rank.layout, broadcast=lambda name, _: sent.append(name)
        )
        experts = {p.name for p in own if ".local_experts." in p.name}
        filled = {p.name for p in own if not p.tensor.isnan().any()}
        first = rank.layout.data_rank == 0
        assert filled == ({p.name for p in own} if first else experts)
        assert report.num_bytes == sum(p.tensor.nbytes for p in own if p.name in filled) - (
            2 * 5 * 32 * 4 if first else 0
        )
    assert sent == [name for rank in ranks for name, _ in rank.names]


def test_half_precision_parameters_take_full_precision_files_and_back(hf_root, table_of, tmp_path):
    folder = hf_root / "llama2"
    table, original = table_of(folder), read_all(folder)
    ranks, parameters = import_ranks(folder, table, Degrees(), dtype=torch.bfloat16)
    target = tmp_path / "out"
    export_ranks(
        target,
        table,
        ranks,
        parameters,
        dtype=torch.bfloat16,
        side_files=SideFiles(source=folder),
    )
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]
    for name, tensor in read_all(target).items():
        assert torch.equal(tensor, original[name].bfloat16())
    written = json.loads((target / "config.json").read_text())
    assert written == json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}


def test_reward_model_begins_as_a_language_model_and_ends_as_a_classifier(
    hf_root, table_of, tmp_path
):
    folder = hf_root / "qwen2_tied"
    table = table_of(folder, head="sequence_classification")
    ranks = virtual_ranks(table.config, table.head, Degrees(pp=2))
    parameters = [rank.parameters(table, fill=0.5) for rank in ranks]
    for rank, own in zip(ranks, parameters, strict=True):
        report = import_weights(folder, own, table, rank.layout, allow_fresh_head=True)
        assert report.fresh == ("score.weight",)
        assert report.unused == ()
    target = tmp_path / "out"
    files = SideFiles(source=folder, pad_token_id=3)
    export_ranks(target, table, ranks, parameters, dtype=torch.float32, side_files=files)
    exported = read_all(target)
    assert torch.equal(exported.pop("score.weight"), torch.full((1, 32), 0.5))
    assert exported.keys() == read_all(folder).keys()
    written = json.loads((target / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForSequenceClassification"]
    assert written["id2label"] == {"0": "LABEL_0"}
    assert written["pad_token_id"] == 3
    assert table_of(target).head == "sequence_classification"


def test_written_config_gives_the_same_logits_in_transformers(hf_root, table_of, tmp_path):
    families = ["llama31", "llama32", "llama_linear", "mistral_window", "qwen2_tied", "qwen3"]
    families += ["gemma", "gemma2", "gemma2_reward", "mixtral", "qwen2_moe", "qwen3_moe"]
    for family in families:
        folder = hf_root / family
        table = table_of(folder)
        config = table.config.model_copy(update={"hf_path": None})
        own = WeightTable(config, table.head)
        ranks, parameters = import_ranks(folder, own, Degrees())
        export_ranks(
            tmp_path / family,
            own,
            ranks,
            parameters,
            dtype=torch.float32,
            side_files=SideFiles(pad_token_id=0),
        )
    differences = json.loads(run_clean("compare_logits.py", hf_root, tmp_path))
    assert differences == dict.fromkeys(sorted(families), 0.0)


def test_tokenizer_files_come_along_byte_for_byte(hf_root, table_of, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "additional_chat_templates").mkdir(parents=True)
    kept = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "merges.txt",
    ]
    for name in [*kept, "modeling_custom.py", "pytorch_model.bin", "optimizer.pt"]:
        (tokenizer / name).write_bytes(b"\x00\xff" + name.encode())
    folder, target = hf_root / "llama2", tmp_path / "out"
    table = table_of(folder)
    ranks, parameters = import_ranks(folder, table, Degrees())
    files = SideFiles(source=folder, tokenizer=tokenizer)
    export_ranks(target, table, ranks, parameters, dtype=torch.float32, side_files=files)
    for name in kept:
        assert (target / name).read_bytes() == (tokenizer / name).read_bytes()
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == {*kept, "config.json", "generation_config.json", "model.safetensors"}


def test_a_later_export_replaces_an_earlier_one(hf_root, table_of, tmp_path):
    folder, target = hf_root / "llama2", tmp_path / "out"
    table = table_of(folder)
    ranks, parameters = import_ranks(folder, table, Degrees(tp=2))
    options = {"dtype": torch.float32, "side_files": SideFiles(source=folder)}
    export_ranks(target, table, ranks, parameters, **options, max_shard_bytes=SMALL_SHARDS)
    for own in parameters:
        for number, parameter in enumerate(own):
            own[number] = replace(parameter, tensor=parameter.tensor + 1)
    export_ranks(target, table, ranks, parameters, **options, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(target.glob("*.safetensors"))) == 1
    for name, tensor in read_all(target).items():
        assert torch.equal(tensor, read_all(folder)[name] + 1)
