"""Files written block by block in any order, read back by safetensors."""

import json
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from marlhf_mega.checkpoint.hf.shards import (
    BlockWriter,
    create_files,
    plan_shards,
    write_index,
)

SHAPES = {"a": (4, 6), "b": (5,), "c": (3, 2), "d": (7, 8)}


def test_tensors_fill_files_in_order_up_to_a_size():
    """Bytes in bfloat16: a 48, b 10, c 12, d 112."""
    plan = plan_shards(SHAPES, torch.bfloat16, 60)
    assert {name: slot.file for name, slot in plan.slots.items()} == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
    }
    assert set(plan_shards(SHAPES, torch.bfloat16, 182).sizes) == {"model.safetensors"}


def blocks(draw, name, shape):
    """Cut a tensor into blocks of rows."""
    cuts = draw(st.sets(st.integers(1, shape[0] - 1))) if shape[0] > 1 else set()
    bounds = [0, *sorted(cuts), shape[0]]
    return [(name, lo, hi) for lo, hi in pairwise(bounds)]


@settings(max_examples=40)
@given(
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([20, 100, 10**6]),
)
def test_any_split_in_any_order_gives_the_tensors(tmp_path_factory, data, dtype, max_shard_bytes):
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    plan = plan_shards(SHAPES, dtype, max_shard_bytes)
    create_files(plan, folder)
    write_index(plan, folder)
    cut = [block for name, shape in SHAPES.items() for block in blocks(data.draw, name, shape)]
    written = 0
    with BlockWriter(plan, folder) as writer:
        for name, lo, hi in data.draw(st.permutations(cut)):
            written += writer.write(name, lo, whole[name][lo:hi].to(dtype))
    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.to(dtype).tolist() for name, tensor in whole.items()
    }
    assert written == sum(tensor.nbytes for tensor in found.values())
    assert plan.num_bytes == sum(file.stat().st_size for file in files)
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": written}
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118


def test_headers_end_where_tensors_are_aligned():
    plan = plan_shards({"odd name \u00e9": (3,), "next": (2, 2)}, torch.float32, 10**6)
    for header in plan.headers.values():
        assert len(header) % 8 == 0
