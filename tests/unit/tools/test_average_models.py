"""tools/average_models.py: sums by hand, what is copied bit for bit, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tools.average_models as tool
from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.model import ModelConfig

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(3)
        for name, shape in {
            "input_layernorm": (4,),
            "self_attn.q_proj": (4, 4),
            "mlp.down_proj": (4, 6),
        }.items()
    },
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}


def model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: int) -> Path:
    """Write a folder of the tensors that this tool looks at."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    sizes = {"vocab_size": 9, **changes}
    tensors = {
        name: torch.randn(shape, generator=draw).to(dtype)
        if shape[0] != 9
        else torch.randn(sizes["vocab_size"], 4, generator=draw).to(dtype)
        for name, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(
        num_layers=3, hidden_size=4, num_attention_heads=1, ffn_hidden_size=6, **sizes
    )
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(config)))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["average_models.py", *map(str, arguments)])
    return tool.main()


def test_a_linear_average_is_that_of_a_loop(tmp_path, monkeypatch):
    """In pieces of a few rows, as large models have."""
    monkeypatch.setattr(tool, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(tool, "SHARD_BYTES", 200)
    one, two, three = (model(tmp_path / str(n), n) for n in range(3))
    assert run(monkeypatch, tmp_path / "out", one, two, three, "--weights", "0.5,0.25,0.25") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    found = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    parts = [load_file(folder / "model.safetensors") for folder in (one, two, three)]
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        a, b, c = (part[name].double() for part in parts)
        assert torch.equal(tensor, (0.5 * a + 0.25 * b + 0.25 * c).float()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_one_copies_bit_for_bit(tmp_path, monkeypatch, dtype):
    one, two = model(tmp_path / "1", 1, dtype), model(tmp_path / "2", 2, dtype)
    tensors = load_file(two / "model.safetensors")
    tensors["model.norm.weight"][0] = -0.0  # a sum would lose its sign
    save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
    assert run(monkeypatch, tmp_path / "out", one, two, "--weights", "0,1") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


def test_sums_have_the_format_of_the_first_model(tmp_path, monkeypatch):
    one, two = model(tmp_path / "1", 1, torch.bfloat16), model(tmp_path / "2", 2)
    assert run(monkeypatch, tmp_path / "out", one, two) == 0
    found, *parts = (
        load_file(folder / "model.safetensors")["lm_head.weight"]
        for folder in (tmp_path / "out", one, two)
    )
    assert torch.equal(found, (0.5 * parts[0].double() + 0.5 * parts[1].double()).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_blocks_of_layers_have_their_own_weights(tmp_path, monkeypatch):
    one, two = model(tmp_path / "1", 1), model(tmp_path / "2", 2)
    options = ("--block-logits=0.5,-0.2,0.1", "--ratio", "0.2")
    assert run(monkeypatch, tmp_path / "out", one, two, *options) == 0
    shares = (0.224552, 0.177511, 0.197937)
    assert tool.block_weights([0.5, -0.2, 0.1], 0.2) == pytest.approx(shares, abs=1e-6)
    found, sft, ppo = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", one, two)
    )
    places = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 2}
    for name, tensor in found.items():
        share = shares[places[name] if name in places else int(name.split(".")[2])]
        expected = share * sft[name] + (1 - share) * ppo[name]
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-5), name


def test_blocks_have_as_many_layers_as_fit() -> None:
    blocks = [tool._block_of(f"model.layers.{n}.x", 7, 3) for n in range(7)]
    assert blocks == [0, 0, 0, 1, 1, 2, 2]


def test_models_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    one, two = model(tmp_path / "1", 1), model(tmp_path / "2", 2)
    other = model(tmp_path / "other", 3, vocab_size=11)
    lacking = model(tmp_path / "lacking", 4)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    rope = model(tmp_path / "rope", 5, max_positions=64)
    mixed = model(tmp_path / "mixed", 6)
    tensors = load_file(mixed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    for arguments, reason in (
        ((out, one, other), "lm_head.weight is [9, 4] and [11, 4]"),
        ((out, one, lacking), "1 are in one of them only: lm_head.weight"),
        ((out, one, rope), "max_positions is 2048 and 64"),
        ((out, mixed, one), "it has BF16, F32. Convert it."),
        ((out, one, two, "--weights", "1,1"), "they are 2 and add up to 2."),
        ((out, one, two, "--weights", "1"), "they are 1 and add up to 1."),
        ((out, one, "--block-weights", "1"), "the first of two models; 1 are given"),
        ((out, one, two, "--block-weights", "1,1,1,1"), "each of 4 blocks; it has 3."),
        ((tmp_path / "there", one, two), "must be a new folder; it is there."),
        ((out, one, tmp_path / "nothing"), "nothing"),
    ):
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert reason in error
        assert not out.exists()
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


def test_help_says_what_the_weights_are() -> None:
    done = subprocess.run(
        [sys.executable, tool.__file__, "--help"], capture_output=True, text=True, check=True
    )
    assert "--block-logits" in done.stdout
