import json
import re
import resource
from dataclasses import replace

import pytest
import torch

from marlhf_mega.checkpoint.hf import exporter
from marlhf_mega.checkpoint.hf.exporter import export_weights
from marlhf_mega.checkpoint.hf.importer import import_weights
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
from marlhf_mega.config.model import ModelConfig
from tests.unit.checkpoint.hf.make_hf import MODELS, SCALAR_HEADS
from tests.unit.checkpoint.hf.transfers import (
    SMALL_SHARDS,
    export_ranks,
    import_ranks,
    parameters_for,
    read_all,
)
from tests.unit.checkpoint.hf.virtual_ranks import Degrees, run_together, virtual_ranks

FAMILIES = [*MODELS, *(f"{name}_reward" for name in SCALAR_HEADS)]
LAYOUTS = [
    Degrees(),
    Degrees(tp=2, pp=2),
    Degrees(tp=4),
    Degrees(pp=4),
    Degrees(pp=2, vpp=2, dp=2),
]
EXPERT_LAYOUTS = [Degrees(ep=2, dp=2), Degrees(tp=2, ep=2), Degrees(tp=2, dp=2, etp=2, ep=2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_are_bit_exact_for_every_layout(
    family, hf_root, table_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(exporter, "BLOCK_BYTES", 3000)  # a few rows, of a vocabulary several blocks
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
            gathered=number % 3 == 1,
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


def test_vocabulary_padding_is_zero_and_left_out_of_the_export(hf_root, table_of):
    folder = hf_root / "llama2"
    table = table_of(folder)
    _, parameters = import_ranks(folder, table, Degrees(tp=2))
    embedding = torch.cat([own[0].tensor for own in parameters])
    assert embedding.shape[0] == 80
    assert embedding[67:].count_nonzero() == 0
    assert table.tensors["model.embed_tokens.weight"] == (67, 32)


def test_half_precision_parameters_read_and_write_full_precision_files(hf_root, table_of, tmp_path):
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
        fresh = import_weights(folder, own, table, rank.layout, allow_fresh_head=True)
        assert fresh == ["score.weight"]
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


def test_a_later_export_replaces_an_earlier_one(hf_root, table_of, tmp_path):
    folder, target = hf_root / "llama2", tmp_path / "out"
    table = table_of(folder)
    ranks, parameters = import_ranks(folder, table, Degrees(tp=2))
    options = {"dtype": torch.float32, "side_files": SideFiles(source=folder)}
    export_ranks(target, table, ranks, parameters, **options, max_shard_bytes=SMALL_SHARDS)
    for own in parameters:
        for number, parameter in enumerate(own):
            own[number] = replace(parameter, tensor=parameter.tensor + 1)
    export_ranks(target, table, ranks, parameters, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(target.glob("*.safetensors"))) == 1
    for name, tensor in read_all(target).items():
        assert torch.equal(tensor, read_all(folder)[name] + 1)


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
            tensor_peers=peers.tensor_peers,
        ),
        degrees.tp,
    )


def test_export_does_not_overwrite(folder, table_of, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    first, second = export(folder, table_of(folder), target, Degrees(tp=2))
    message = (
        f"{target}: must be a new or empty folder; it is neither. Use another one or remove it."
    )
    assert (type(first), str(first)) == (ValueError, message)
    assert (type(second), str(second)) == (RuntimeError, f"rank 0: {message}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]


def test_disk_space_is_checked_before_writing(tmp_path):
    huge = ModelConfig(hidden_size=2**24, ffn_hidden_size=2**24, vocab_size=2**24)
    target = tmp_path / "new" / "out"
    (error,) = run_together(
        1,
        lambda peers: export_weights(
            target,
            [],
            WeightTable(huge, "causal_lm"),
            Layout(padded_vocab_size=2**24),
            dtype=torch.bfloat16,
            side_files=SideFiles(),
            peers=peers,
            tensor_peers=peers.tensor_peers,
        ),
    )
    assert isinstance(error, ValueError)
    assert re.fullmatch(
        re.escape(f"{target}: the export needs 8,589,934,752.0 MiB; the disk has ")
        + r"[\d,.]+ MiB left\. Free space or use another disk\.",
        str(error),
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
            "behind: fix the disk and export again."
        )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_piece_that_no_rank_wrote_stops_the_export(folder, table_of, tmp_path):
    table, target = table_of(folder), tmp_path / "out"
    parameters, layout = parameters_for(table, Degrees(tp=2))
    (error,) = run_together(
        1,
        lambda peers: export_weights(
            target,
            parameters,
            table,
            layout,
            dtype=torch.float32,
            side_files=SideFiles(source=folder),
            peers=peers,
            tensor_peers=peers.tensor_peers,
        ),
    )
    assert isinstance(error, RuntimeError)
    assert str(error) == (
        f"{target}: every element of model.embed_tokens.weight must be held by exactly one rank; "
        "from index 40 on it is not. Export with the layout that the model was built with."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_model_that_its_architecture_cannot_express_is_refused_before_writing(
    folder, table_of, tmp_path
):
    table = table_of(folder)
    config = table.config.model_copy(update={"logits_softcap": 30.0})
    (error,) = export(
        folder, WeightTable(config, "causal_lm"), tmp_path / "out", side_files=SideFiles()
    )
    assert isinstance(error, ValueError)
    assert str(error) == (
        "model.logits_softcap=30.0: the Hugging Face architecture llama always has None. Change it "
        "or model.architecture."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
