"""Folders that are damaged, incomplete or unsafe; no parameter is touched."""

import json

import pytest
import torch
from safetensors.torch import save_file

from marlhf_mega.checkpoint.hf.reader import open_folder
from marlhf_mega.checkpoint.hf.table import Piece
from tests.unit.checkpoint.hf.transfers import INDEX, edit, refused


def test_missing_shard(folder, table_of):
    (folder / "model-00002-of-00006.safetensors").unlink()
    assert refused(folder, table_of(folder)) == (
        "model.hf_path=DIR: every shard must exist; model-00002-of-00006.safetensors is "
        "missing. Download it again."
    )


@pytest.mark.parametrize("size", [3, 200, 20_000])
def test_truncated_shard(folder, table_of, size):
    path = folder / "model-00001-of-00006.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refused(folder, table_of(folder))
    assert message.startswith(
        "model.hf_path=DIR: model-00001-of-00006.safetensors must be a complete safetensors file; "
    )
    assert message.endswith(". Download it again.")


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".."]
)
def test_index_that_names_a_file_outside_the_folder(folder, table_of, outside):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = outside
    (folder / INDEX).write_text(json.dumps(index))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: {INDEX} must name files in the folder; it names {outside}. Do not "
        "use this folder."
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(folder, table_of, text):
    (folder / INDEX).write_text(text)
    message = refused(folder, table_of(folder))
    assert message.startswith(f"model.hf_path=DIR: {INDEX} must hold a weight_map; ")


def test_index_that_lists_a_tensor_its_shard_does_not_have(folder, table_of):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00006.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: {INDEX} must match the shards; model-00001-of-00006.safetensors has no "
        "lm_head.weight. Download the folder again."
    )


def test_a_single_file_beside_stale_shards_is_used_as_transformers_does(folder, table_of):
    table = table_of(folder)
    whole = {
        name: torch.full(shape, 7.0, dtype=torch.bfloat16) for name, shape in table.tensors.items()
    }
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    reader = open_folder(folder)
    assert reader.dtypes == {"BF16"}
    name, shape = next(iter(table.tensors.items()))
    assert reader.read(Piece(name, 0, 0, shape[0])).unique().tolist() == [7.0]


def test_shards_without_index(folder, table_of):
    (folder / INDEX).unlink()
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: shards need {INDEX}; found model-00001-of-00006.safetensors, "
        "model-00002-of-00006.safetensors, model-00003-of-00006.safetensors and 3 more without it. "
        "Download the index."
    )


def test_pickles_only(folder, table_of):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert refused(folder, table_of(folder)) == (
        "model.hf_path=DIR: weights must be safetensors; found only pytorch_model.bin, and "
        "pickles are never loaded. Convert it in an isolated environment: load it with "
        "transformers and call save_pretrained."
    )


def test_no_weights(folder, table_of):
    for path in folder.glob("model*"):
        path.unlink()
    assert refused(folder, table_of(folder)) == (
        f"model.hf_path=DIR: weights must be model.safetensors or shards with {INDEX}; found "
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
