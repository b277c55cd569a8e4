"""Imports and exports of virtual ranks, and folders to be damaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlhf_mega.checkpoint.hf.exporter import export_weights
from marlhf_mega.checkpoint.hf.importer import import_weights
from tests.unit.checkpoint.hf.virtual_ranks import Degrees, ThreadPeers, run_together, virtual_ranks

HERE = Path(__file__).parent
SMALL_SHARDS = 20_000
INDEX = "model.safetensors.index.json"


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
        together = {"peers": peers, "tensor_peers": peers.tensor_peers}
        return export_weights(target, own, table, layout, **together, **options)

    results = run_together(len(ranks), export, ranks[0].layout.tp_size)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def run_clean(script, *arguments):
    """Run a script where transformers is alone; returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
