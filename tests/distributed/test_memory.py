"""Recompute: the same gradients to the bit from fewer kept activations, at every layout."""

import json

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_model import TINY

SOFTCAP = TINY | {
    "architecture": "gemma2",
    "tied_embeddings": True,
    "post_norms": True,
    "zero_centered_norm": True,
    "attention_softcap": 20.0,
}
MODELS = {"llama": TINY, "softcap": SOFTCAP}
TP2_PP2 = {"tensor_size": 2, "pipeline_size": 2}
LAYOUTS = {
    "TP2 PP2": TP2_PP2,
    "TP2 PP2 SP": TP2_PP2 | {"sequence_parallel": True},
    "PP2 VPP2": {"pipeline_size": 2, "virtual_pipeline_size": 2},
}
SETTINGS = {
    "none": {},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "one layer": {"recompute": "full", "recompute_num_layers": 1},
}
CASES = [*(("llama", layout) for layout in LAYOUTS), ("softcap", "TP2 PP2 SP")]
KEYS = [(*case, setting) for case in CASES for setting in SETTINGS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    cases = [
        {"model": MODELS[m], "parallel": LAYOUTS[layout], "memory": SETTINGS[s]}
        for m, layout, s in KEYS
    ]
    answers = run_ranks("memory_ranks.py", 4, folder / "out.json", json.dumps(cases))
    for number, answer in enumerate(answers):
        for head in ("language", "scalar"):
            paths = [folder / f"gradients_{number}" / f"{head}_{rank}.pt" for rank in range(4)]
            answer[head]["gradients"] = [torch.load(path) for path in paths]
    return dict(zip(KEYS, answers, strict=True))


@pytest.mark.parametrize("head", ["language", "scalar"])
@pytest.mark.parametrize(("model", "layout", "setting"), [k for k in KEYS if k[2] != "none"])
def test_recompute_changes_no_bit_of_the_gradients(results, model, layout, setting, head):
    expected = results[model, layout, "none"][head]
    found = results[model, layout, setting][head]
    assert found["grad_norm"] == expected["grad_norm"] > 0
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("head", ["language", "scalar"])
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_recompute_keeps_fewer_activations(results, model, layout, head):
    kept = {s: results[model, layout, s][head]["kept"] for s in SETTINGS}
    assert kept["full"] < 0.5 * kept["none"]
    if layout == "PP2 VPP2":
        assert kept["full"] == kept["one layer"]  # One layer is all that a chunk has.
    else:
        assert kept["full"] < kept["one layer"] < kept["none"]
    if model == "softcap":
        assert kept["selective"] < kept["none"]
