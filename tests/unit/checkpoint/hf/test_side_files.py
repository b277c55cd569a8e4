"""Tokenizer files and the config beside exported weights."""

import json
import shutil

import torch

from marlhf_mega.checkpoint.hf.side_files import SideFiles, copy_side_files
from marlhf_mega.checkpoint.hf.table import WeightTable
from tests.unit.checkpoint.hf.transfers import export_ranks, import_ranks, run_clean
from tests.unit.checkpoint.hf.virtual_ranks import Degrees


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


def test_tokenizer_files_are_copied_byte_for_byte(hf_root, table_of, tmp_path):
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


def test_everything_of_the_models_folder_but_weights_and_code_comes_along(
    hf_root, table_of, tmp_path
):
    folder, run, target = tmp_path / "source", tmp_path / "tokenizer", tmp_path / "out"
    shutil.copytree(hf_root / "llama2", folder)
    kept = ["merges.txt", "vocab.bpe", "LICENSE", "README.md", "original/params.json"]
    kept += ["additional_chat_templates/rag.jinja", "added_tokens.json"]
    left = ["x.bin", "consolidated.pth", "modeling_x.py", ".cache/a", "onnx/m.onnx_data"]
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    table = table_of(folder)
    ranks, parameters = import_ranks(folder, table, Degrees())
    run.mkdir()
    copy_side_files(folder, run)
    # By way of a run's own copy, and of the copy of a run that begins there.
    again = tmp_path / "again"
    again.mkdir()
    copy_side_files(run, again)
    (folder / "vocab.json").write_text("of a tokenizer that is not used")
    files = SideFiles(source=folder, tokenizer=again)
    export_ranks(target, table, ranks, parameters, dtype=torch.float32, side_files=files)
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == {*kept, "config.json", "generation_config.json", "model.safetensors"}
    assert all((target / name).read_text() == name for name in kept)


def test_the_export_stops_where_training_did(hf_root, table_of, tmp_path):
    """The folder's own ids stay byte for byte where they are the same."""
    folder = tmp_path / "source"
    shutil.copytree(hf_root / "llama2", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_k": 3}')
    table = table_of(folder)
    ranks, parameters = import_ranks(folder, table, Degrees())

    def exported(name, **files):
        files = SideFiles(source=folder, **files)
        export_ranks(
            tmp_path / name, table, ranks, parameters, dtype=torch.float32, side_files=files
        )
        names = ("config.json", "generation_config.json")
        return [(tmp_path / name / file).read_text() for file in names]

    untouched = exported("no tokenizer")
    assert exported("same", end_ids=(7, 2))[1] == untouched[1]
    config, generation = map(json.loads, exported("others", end_ids=(7, 3)))
    assert config == json.loads(untouched[0]) | {"eos_token_id": [7, 3]}
    assert generation == {"eos_token_id": [7, 3], "top_k": 3}
    own = WeightTable(table.config.model_copy(update={"hf_path": None}), table.head)
    files = SideFiles(bos_token_id=1, end_ids=(2,))
    export_ranks(tmp_path / "own", own, ranks, parameters, dtype=torch.float32, side_files=files)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "own" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)


def test_settings_of_generation_survive_runs_whose_first_folder_is_gone(
    hf_root, table_of, tmp_path
):
    """A run keeps them with its tokenizer."""
    table = table_of(hf_root / "llama2")
    ranks, parameters = import_ranks(hf_root / "llama2", table, Degrees())
    own = WeightTable(table.config.model_copy(update={"hf_path": None}), table.head)
    kept = tmp_path / "run" / "tokenizer"
    kept.mkdir(parents=True)
    settings = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 5, "eos_token_id": [2]}
    (kept / "generation_config.json").write_text(json.dumps(settings))
    files = SideFiles(tokenizer=kept, bos_token_id=1, pad_token_id=0, end_ids=(2, 7))
    export_ranks(tmp_path / "out", own, ranks, parameters, dtype=torch.float32, side_files=files)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == settings | {"pad_token_id": 0, "eos_token_id": [2, 7]}
