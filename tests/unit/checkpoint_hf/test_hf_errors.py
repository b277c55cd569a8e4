import json
import logging
import re
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from virtual_ranks import Degrees, run_together, virtual_ranks

from marlhf_mega.checkpoint.hf.exporter import export_weights
from marlhf_mega.checkpoint.hf.importer import import_weights
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
from marlhf_mega.config.model import ModelConfig

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(hf_root, tmp_path):
    """A copy of a Llama in several shards, to be damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(hf_root / "llama2", copy)
    return copy


def parameters_for(table, degrees=Degrees(), rank=0):
    virtual = virtual_ranks(table.config, table.head, degrees)[rank]
    return virtual.parameters(table, fill=7.0), virtual.layout


def refused(folder, table, **options):
    """Import must fail and must not touch a parameter; returns the message."""
    parameters, layout = parameters_for(table)
    with pytest.raises(ValueError, match=".") as error:
        import_weights(folder, parameters, table, layout, **options)
    assert all((p.tensor == 7.0).all() for p in parameters)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(folder), "DIR")


def edit(folder, change):
    """Rewrite the shards as one file after a change."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_shard(folder, table_of):
    (folder / "model-00002-of-00006.safetensors").unlink()
    assert refused(folder, table_of(folder)) == (
        "model.hf_path=DIR: every shard must be there; model-00002-of-00006.safetensors is "
        "missing. Download it again."
    )


@pytest.mark.parametrize("size", [3, 200, 20_000])
def test_truncated_shard(folder, table_of, size):
    path = folder / "model-00001-of-00006.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refused(folder, table_of(folder))
    assert message.startswith(
        "model.hf_path=DIR: model-00001-of-00006.safetensors must be a whole safetensors file; "
    )
    assert message.endswith(". Download it again.")


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".."]
)
def test_index_that_names_a_file_outside_of_the_folder(folder, table_of, outside):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = outside
    (folder / INDEX).write_text(json.dumps(index))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: {INDEX} must name files of the folder; it names {outside}. Do not "
        "use this folder."
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(folder, table_of, text):
    (folder / INDEX).write_text(text)
    message = refused(folder, table_of(folder))
    assert message.startswith(f"model.hf_path=DIR: {INDEX} must hold a weight_map; ")


def test_index_that_promises_a_tensor_its_shard_does_not_have(folder, table_of):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00006.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: {INDEX} must fit the shards; model-00001-of-00006.safetensors has no "
        "lm_head.weight. Download the folder again."
    )


def test_shards_without_index(folder, table_of):
    (folder / INDEX).unlink()
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: shards need {INDEX}; there is model-00001-of-00006.safetensors, "
        "model-00002-of-00006.safetensors, model-00003-of-00006.safetensors and 3 more without it. "
        "Download the index."
    )


def test_pickles_only(folder, table_of):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert refused(folder, table_of(folder)) == (
        "model.hf_path=DIR: weights must be safetensors; there is only pytorch_model.bin, and "
        "pickles are never loaded. Convert it in an isolated environment: load it with "
        "transformers and call save_pretrained."
    )


def test_no_weights(folder, table_of):
    for path in folder.glob("model*"):
        path.unlink()
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: weights must be model.safetensors or shards with {INDEX}; there are "
        "none. Download them."
    )


def test_missing_tensors(folder, table_of):
    def change(tensors):
        for layer in range(4):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]

    edit(folder, change)
    assert refused(folder, table_of(folder)) == (
        "model.hf_path=DIR: the files must have every tensor of the model; 4 of 39 are missing: "
        "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight, "
        "model.layers.2.mlp.up_proj.weight and 1 more. Download the folder again."
    )


def test_shape_mismatch_names_the_tensor_and_both_shapes(folder, table_of):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(16, 32)}))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: {name} must have shape [32, 32] as config.json says; it has "
        "[16, 32]. Use the config.json of these weights."
    )


def test_tensors_that_would_change_the_model_are_refused(folder, table_of):
    bias = "model.layers.0.self_attn.o_proj.bias"
    edit(folder, lambda tensors: tensors.update({bias: torch.zeros(32)}))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: every tensor under model. must belong to llama; 1 do not, such as "
        f"{bias}. Use another model."
    )


def test_tensors_beside_the_model_are_reported(folder, table_of, caplog):
    extra = {
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    edit(folder, lambda tensors: tensors.update(extra))
    table = table_of(folder)
    parameters, layout = parameters_for(table)
    with caplog.at_level(logging.WARNING):
        report = import_weights(folder, parameters, table, layout)
    assert report.unused == tuple(sorted(extra))
    assert report.fresh == ()
    assert "no use for" in caplog.text
    assert "v_head.summary.weight" in caplog.text


def test_tied_checkpoint_with_an_output_layer_ignores_it(hf_root, table_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(hf_root / "qwen2_tied", folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(67, 32)}))
    table = table_of(folder)
    parameters, layout = parameters_for(table, Degrees(pp=2), rank=1)
    report = import_weights(folder, parameters, table, layout)
    assert report.unused == ("lm_head.weight",)
    output = next(p.tensor for p in parameters if p.name == "output_layer.weight")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(output[:67], embedding)


def test_language_model_given_as_reward_model(folder, table_of):
    table = table_of(folder, head="sequence_classification")
    assert refused(folder, table, key="reward.source") == (
        "reward.source=DIR: a reward model must have score.weight; the files do not. Give the "
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


def export(folder, table, target, degrees=Degrees(), **options):
    """Export from every rank; returns the error or report of each."""
    ranks = [parameters_for(table, degrees, rank) for rank in range(degrees.tp * degrees.pp)]
    return run_together(
        len(ranks),
        lambda peers: export_weights(
            target,
            *(ranks[peers.rank][0], table, ranks[peers.rank][1]),
            dtype=torch.float32,
            **{"side_files": SideFiles(source=folder), "peers": peers} | options,
        ),
    )


def test_export_does_not_overwrite(folder, table_of, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for replace in (False, True):
        first, second = export(folder, table_of(folder), target, Degrees(tp=2), replace=replace)
        message = (
            f"{target}: an export needs a new folder; this one is not empty. Name another or "
            "remove it."
        )
        assert (type(first), str(first)) == (ValueError, message)
        assert (type(second), str(second)) == (
            RuntimeError,
            f"rank 0: {message}",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]


def test_disk_space_is_checked_before_writing(tmp_path):
    huge = ModelConfig(hidden_size=2**24, ffn_hidden_size=2**24, vocab_size=2**24)
    target = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match="the export needs") as error:
        export_weights(
            target,
            [],
            WeightTable(huge, "causal_lm"),
            Layout(padded_vocab_size=2**24),
            dtype=torch.bfloat16,
            side_files=SideFiles(),
        )
    assert re.fullmatch(
        re.escape(f"{target}: the export needs 8,589,934,752.0 MiB; the disk has ")
        + r"[\d,.]+ MiB left\. Free some or name another disk\.",
        str(error.value),
    )
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("gathered", [False, True])
def test_disk_that_fills_up_leaves_nothing_behind(folder, table_of, tmp_path, gathered):
    target = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_more_space(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        errors = export(
            folder,
            table_of(folder),
            target,
            Degrees(tp=2, pp=2),
            gathered=gathered,
            progress=no_more_space,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert str(error).removeprefix("rank 0: ") == (
            f"{target}: every file must be written; [Errno 27] File too large. Nothing is left "
            "behind: mend the disk and export again."
        )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_piece_nobody_wrote_stops_the_export(folder, table_of, tmp_path):
    table, target = table_of(folder), tmp_path / "out"
    parameters, layout = parameters_for(table, Degrees(tp=2))
    with pytest.raises(RuntimeError) as error:
        export_weights(
            target,
            parameters,
            table,
            layout,
            dtype=torch.float32,
            side_files=SideFiles(source=folder),
        )
    assert str(error.value) == (
        f"{target}: every element of model.embed_tokens.weight must be written exactly once; it "
        "was not from index 40 on. Export with the layout the model was built with."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_model_its_architecture_cannot_express_is_refused_before_writing(
    folder, table_of, tmp_path
):
    table = table_of(folder)
    config = table.config.model_copy(update={"logits_softcap": 30.0})
    (error,) = export(
        folder, WeightTable(config, "causal_lm"), tmp_path / "out", side_files=SideFiles()
    )
    assert isinstance(error, ValueError)
    assert str(error) == (
        "model.logits_softcap=30.0: model.architecture=llama of Hugging Face always has None. "
        "Change one of them."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
