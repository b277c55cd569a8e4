"""Every family, imported at every layout, answers like transformers and exports bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

HERE = Path(__file__).parent
LAYOUTS = {
    1: {"TP1": {}},
    2: {
        "TP2 SP": {"tensor_size": 2, "sequence_parallel": True},
        # Four chunks, two of them with neither embedding nor head.
        "PP2 VPP2": {"pipeline_size": 2, "virtual_pipeline_size": 2},
        "EP2": {"expert_size": 2},
    },
    4: {
        "TP2 PP2": {"tensor_size": 2, "pipeline_size": 2},
        "TP4": {"tensor_size": 4},
        "EP2 DP4": {"expert_size": 2},
        "TP2 EP2 PP2 SP": {
            "tensor_size": 2,
            "pipeline_size": 2,
            "expert_size": 2,
            "sequence_parallel": True,
        },
    },
}


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return (expected by model, found by layout and model)."""
    scratch = tmp_path_factory.mktemp("hf")
    models = scratch / "models"
    models.mkdir()
    run(HERE.parent / "unit" / "checkpoint" / "hf" / "make_hf.py", models)
    run(HERE / "hf_reference.py", models, scratch / "expected.json")
    found = {}
    for world, layouts in LAYOUTS.items():
        exports = scratch / f"exports{world}"
        for name in layouts:
            (exports / name).mkdir(parents=True)
        options = [str(models), json.dumps(layouts), str(exports)]
        found |= run_ranks("hf_parity_ranks.py", world, scratch / f"{world}.json", *options)
    return json.loads((scratch / "expected.json").read_text()), found


def names(answers, layout):
    prefix = f"{layout}/"
    return [key.removeprefix(prefix) for key in answers[1] if key.startswith(prefix)]


@pytest.mark.parametrize("layout", [name for world in LAYOUTS.values() for name in world])
def test_every_model_that_fits_the_layout_answers_like_transformers(answers, layout):
    expected, found = answers
    models = names(answers, layout)
    assert len(models) >= (4 if "EP2" in layout else 17)
    for model in models:
        ours, theirs = found[f"{layout}/{model}"], expected[model]
        if "scores" in theirs:
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5, rel=1e-5), model
            continue
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert mine == pytest.approx(other, abs=1e-5, rel=1e-5), model
        assert ours["greedy"] == theirs["greedy"], model


@pytest.mark.parametrize("layout", [name for world in LAYOUTS.values() for name in world])
def test_every_export_is_bit_for_bit_the_import(answers, layout):
    for model in names(answers, layout):
        assert answers[1][f"{layout}/{model}"].get("export_exact", True), model
