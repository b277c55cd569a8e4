"""Adapters at every layout against peft: outputs, loss, gradients, and files both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TP2, PP2 = {"tensor_size": 2}, {"pipeline_size": 2}
LAYOUTS = {
    1: {"TP1": {"parallel": {}}},
    2: {"TP2": {"parallel": TP2}},
    4: {
        "TP2 PP2": {"parallel": TP2 | PP2, "memory": {"recompute": "full"}},
        "TP2 PP2 VPP2 SP": {
            "parallel": TP2 | PP2 | {"virtual_pipeline_size": 2, "sequence_parallel": True}
        },
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
MODELS = ("llama31", "llama32", "qwen2", "qwen3_tied", "gemma", "gemma2", "gemma2_reward")


def by_peft(*arguments):
    """peft runs apart, because transformers must not meet the CPU stand-ins for CUDA."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.peft_reference", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def found(root):
    """What every model gives at every layout."""
    models, answers = root / "models", {}
    by_peft("make", models)
    for world, layouts in LAYOUTS.items():
        options = [str(models), json.dumps(layouts)]
        answers |= run_ranks("lora_peft_ranks.py", world, root / f"{world}.json", *options)
    return answers


@pytest.fixture(scope="module")
def loaded(found, root):
    """What peft and transformers make of the exports of one rank."""
    by_peft("check", root / "models", root / "loaded.json")
    return json.loads((root / "loaded.json").read_text())


def expected_of(root, model):
    return json.loads((root / "models" / model / "expected.json").read_text())


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_outputs_loss_and_gradients_are_those_of_peft(found, root, model, layout):
    answer, expected = found[f"{model}/{layout}"], expected_of(root, model)
    assert_close(answer["outputs"], expected["outputs"])
    assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    folder = root / "models" / model
    theirs = load_file(folder / "gradients.safetensors")
    ours = load_file(folder / "exports" / layout / "gradients" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-5, atol=1e-5 * scale), name


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_without_its_adapters_a_model_is_its_base_bit_for_bit(found, model, layout):
    answer = found[f"{model}/{layout}"]
    assert answer["off"], "log-probs or scores before the adapters were attached"
    assert answer["restored"], "weights after an export and a rollout"


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("model", [model for model in MODELS if "reward" not in model])
def test_a_rollout_is_that_of_the_merged_model(found, model, layout):
    answer = found[f"{model}/{layout}"]
    assert answer["greedy"] == answer["merged_greedy"]
    assert_close(answer["sampled"], answer["merged_sampled"])


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_adapters_come_back_bit_for_bit_and_merged_weights_at_every_layout(
    found, root, model, layout
):
    folder = root / "models" / model
    original = load_file(folder / "adapter" / "adapter_model.safetensors")
    exports = folder / "exports"
    copy = load_file(exports / layout / "hf_peft" / "adapter_model.safetensors")
    assert copy.keys() == original.keys()
    assert all(copy[name].equal(tensor) for name, tensor in original.items())
    one, here = (load_file(exports / n / "hf" / "model.safetensors") for n in ("TP1", layout))
    assert all(here[name].equal(tensor) for name, tensor in one.items())


@pytest.mark.parametrize("model", MODELS)
def test_peft_loads_the_adapters_and_transformers_the_merged_model(loaded, root, model):
    expected = expected_of(root, model)["outputs"]
    assert loaded[model]["adapter"] == expected
    assert_close(loaded[model]["merged"], expected)
