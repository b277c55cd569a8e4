"""Folders of peft: there and back bit for bit, and what is refused. peft itself: test_lora.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlhf_mega.checkpoint.hf.peft import export_adapters, import_adapters
from marlhf_mega.checkpoint.weights import fill_adapters, fill_random, layout_of, learning_parts
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": 20,
    "lora": {"rank": 2},
}


@pytest.fixture(scope="module")
def mesh():
    mesh = create_mesh(Config().parallel)
    yield mesh
    destroy_mesh()


def model(mesh, seed, head="scalar"):
    config = Config.model_validate({"model": SHAPE})
    chunks = build_chunks(config.model, config.precision, mesh, head=head)
    fill_random(chunks, mesh, seed=seed)
    fill_adapters(chunks, mesh, seed=seed)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if name.endswith("lora.b"):
                parameter.normal_()
    return chunks


def export(chunks, mesh, folder, digest="abc"):
    layout = layout_of(mesh, chunks[0].model)
    export_adapters(folder, learning_parts(chunks), layout, config={"r": 2}, digest=digest)


def load(chunks, mesh, folder, digest="abc"):
    import_adapters(folder, learning_parts(chunks), layout_of(mesh, chunks[0].model), digest=digest)


def learned(chunks):
    return {n: p.detach().clone() for n, p in chunks[0].named_parameters() if p.requires_grad}


def test_there_and_back_changes_no_bit(mesh, tmp_path):
    first, second = model(mesh, 1), model(mesh, 2)
    export(first, mesh, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"r": 2}
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 7 * 2 + 1
    assert "base_model.model.score.weight" in names
    load(second, mesh, tmp_path)
    expected, found = learned(first), learned(second)
    assert all(found[name].equal(value) for name, value in expected.items())
    assert len(found) == 2 * 4 * 2 + 1


def test_draws_are_within_the_bound_of_kaiming_and_b_is_zero(mesh):
    config = Config.model_validate({"model": SHAPE})
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    fill_adapters(chunks, mesh, seed=3)
    found = learned(chunks)
    a = torch.cat([v.flatten() * v.shape[1] ** 0.5 for n, v in found.items() if n[-1] == "a"])
    assert a.abs().max() <= 1
    assert a.abs().max() > 0.95
    assert a.abs().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not any(v.any() for n, v in found.items() if n[-1] == "b")


def refused(chunks, mesh, folder, digest="abc"):
    before = learned(chunks)
    with pytest.raises(ValueError, match=r"^model\.lora\.path=") as error:
        load(chunks, mesh, folder, digest)
    assert all(learned(chunks)[name].equal(value) for name, value in before.items())
    (line,) = str(error.value).splitlines()
    return line


def test_adapters_of_another_model_are_refused_in_one_line(mesh, tmp_path):
    chunks = model(mesh, 1)
    export(chunks, mesh, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert "hash xyz; its own are those with hash abc" in refused(chunks, mesh, tmp_path, "xyz")
    name = next(iter(sorted(tensors)))
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    line = refused(chunks, mesh, tmp_path)
    assert f"1 of 29 tensors are missing, first {name}" in line
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, file)
    assert "no place for base_model.model.lm_head.lora_A.weight" in refused(chunks, mesh, tmp_path)
    save_file(tensors | {name: torch.zeros(3, 24)}, file)
    assert f"{name} must have shape [2, 24] as the model's; it has [3, 24]" in refused(
        chunks, mesh, tmp_path
    )
    file.write_bytes(b"nothing")
    assert "must have a complete adapter_model.safetensors" in refused(chunks, mesh, tmp_path)
    # A language model has no place for a scalar head.
    save_file(tensors, file)
    line = refused(model(mesh, 1, "language"), mesh, tmp_path)
    assert "no place for base_model.model.score.weight" in line


def test_files_of_others_do_not_say_their_base(mesh, tmp_path):
    chunks = model(mesh, 1)
    export(chunks, mesh, tmp_path, digest=None)
    load(chunks, mesh, tmp_path, digest="xyz")
