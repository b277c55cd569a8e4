"""`adapter_config.json`: what is read, what is written, what is refused."""

import json
from pathlib import Path

import pytest

from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.peft import head_of_peft, lora_from_peft, peft_from_lora

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}


def folder_of(path, **changes):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    return path


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_what_is_written_is_read_again(tmp_path, head):
    lora = LoraConfig(
        rank=6, alpha=2.5, rank_stabilized=True, dropout=0.1, targets=("o_proj", "up_proj")
    )
    folder = folder_of(tmp_path / "a", **peft_from_lora(lora, head, Path("/base")))
    found = lora_from_peft(folder, LoraConfig())
    assert (found.rank, found.scale, found.modules) == (6, lora.scale, lora.modules)
    assert found.dropout == 0.1
    assert head_of_peft(folder, key="adapters") == head
    written = peft_from_lora(lora, head, Path("/base"))
    assert written["modules_to_save"] == (["score"] if head == "scalar" else None)
    assert written["base_model_name_or_path"] == "/base"


def test_targets_may_be_whole_names_or_all_linear(tmp_path):
    names = [f"model.layers.{i}.self_attn.k_proj" for i in range(3)]
    folder = folder_of(tmp_path / "a", target_modules=names)
    assert lora_from_peft(folder, LoraConfig()).modules == ("k_proj",)
    folder = folder_of(tmp_path / "b", target_modules="all-linear")
    assert len(lora_from_peft(folder, LoraConfig()).modules) == 7


def test_a_folder_decides_the_section(tmp_path):
    folder = folder_of(tmp_path / "a")
    lora = load_config(None, [f"model.lora.path={folder}"]).model.lora
    assert (lora.rank, lora.alpha, lora.modules) == (4, 8.0, ("q_proj", "v_proj"))
    assert lora.is_on
    again = load_config(None, [f"model.lora.path={folder}", "model.lora.rank=4"])
    assert again.model.lora == lora


def test_dropout_is_that_of_the_folder_unless_the_key_is_set(tmp_path):
    path = f"model.lora.path={folder_of(tmp_path / 'a', lora_dropout=0.05)}"
    assert load_config(None, [path]).model.lora.dropout == 0.05
    assert load_config(None, [path, "model.lora.dropout=0"]).model.lora.dropout == 0
    assert load_config(None, [path, "model.lora.dropout=0.2"]).model.lora.dropout == 0.2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"peft_type": "IA3"}, "must hold plain LoRA adapters; it has peft_type=IA3."),
        ({"use_dora": True}, "must hold plain LoRA adapters; it has use_dora=True."),
        ({"rank_pattern": {"x": 1}}, "must hold plain LoRA adapters; it has rank_pattern="),
        ({"bias": "all"}, "must hold plain LoRA adapters; it has bias=all."),
        ({"modules_to_save": ["lm_head"]}, "it has modules_to_save=['lm_head']."),
        ({"target_modules": ".*_proj"}, "target_modules must be a list in adapter_config.json"),
        ({"target_modules": ["c_attn"]}, "known are q_proj, k_proj"),
        ({"r": None}, "adapter_config.json must give the rank r; it does not."),
        ({"r": 0}, "Input should be greater than 0"),
        ({"lora_dropout": 1.0}, "Input should be less than 1"),
    ],
)
def test_other_adapters_are_refused_in_one_line(tmp_path, changes, line):
    folder = folder_of(tmp_path / "a", **changes)
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"model.lora.path={folder}"])
    assert line in str(error.value)
    assert str(error.value).startswith(f"model.lora.path={folder}: ")
    assert len(str(error.value).splitlines()) == 1


def test_a_key_that_says_otherwise_and_a_file_that_is_none_are_refused(tmp_path):
    folder = folder_of(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=8: must be that of adapter_config"):
        load_config(None, [f"model.lora.path={folder}", "model.lora.rank=8"])
    with pytest.raises(ValueError, match="must be a folder of peft; it has no adapter_config"):
        lora_from_peft(tmp_path, LoraConfig())
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json must be peft's; TypeError"):
        lora_from_peft(folder, LoraConfig())
