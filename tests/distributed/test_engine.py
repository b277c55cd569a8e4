"""The layers of Transformer Engine, by a stand-in that knows its arguments, against our own layers.

It shows that Megatron-Core's wrappers, packing, decoding and checkpoints fit the engine, not what
its kernels compute.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

HERE = Path(__file__).parent
RANKS = 4
CASES = [
    *(f"{family} TP1" for family in ("llama", "qwen3", "adapters", "gemma", "mixtral")),
    *(f"{family} TP2 SP" for family in ("llama", "qwen3", "adapters", "gemma", "mixtral")),
    *(f"{family} TP4" for family in ("llama", "qwen3", "adapters", "gemma")),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Start ranks that have not imported Megatron: it looks for the engine only once."""
    out = tmp_path_factory.mktemp("engine") / "out"
    known = json.loads((HERE.parent / "engine" / "names.json").read_text())
    is_old = Version(version("megatron-core")) < Version("0.17")
    wanted = [v for v in sorted(known, key=Version) if (Version(v) < Version("2.12")) == is_old]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(HERE / "engine_ranks.py"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TE_VERSION": wanted[-1]},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(RANKS)]


def test_megatron_takes_the_stand_in_for_the_engine(found):
    assert all(ranks["have_te"] for ranks in found)


@pytest.mark.parametrize("case", CASES)
def test_the_engines_layers_say_what_ours_say(found, case):
    for rank in found:
        answers = dict(rank[case])
        assert answers.pop("same checkpoint")
        assert answers.pop("same tokens")
        assert bool(answers.pop("grouped products")) == case.startswith("mixtral")
        # The engine's kernels for packed rows have no float32.
        assert answers.pop("layouts of attention") == ["sbhd"]
        assert answers.keys() == {
            *("padded log-probs", "packed log-probs", "padded values", "packed values"),
            *("greedy", "gradient norms"),
        }
        assert max(answers.values()) < 2e-5, answers


def test_packed_rows_reach_the_engine_in_bfloat16(found):
    for rank in found:
        answers = rank["bfloat16"]
        assert answers["layouts of attention"] == ["sbhd", "thd"]
        assert answers["same checkpoint"]
        # Bfloat16 has 8 bits: both round, in other places.
        assert answers["packed log-probs"] < 0.1
        assert answers["packed values"] < 0.05


def test_a_decode_step_launches_few_kernels_in_a_layer(found):
    """On the meta device; see tests/unit/test_launches.py for what is around the layers."""
    budget = {
        "llama 1": 17,
        "llama 2": 19,
        "qwen3 1": 20,
        "qwen3 2": 22,
        "gemma 1": 19,
        "gemma 2": 21,
    }
    for rank in found:
        assert rank["launches"].keys() == budget.keys()
        assert all(rank["launches"][name] <= most for name, most in budget.items()), rank[
            "launches"
        ]
