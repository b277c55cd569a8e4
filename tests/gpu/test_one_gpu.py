"""One GPU: the maths, tiny models and a tiny run, against what the CPU says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marlhf_mega import platform
from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.memory import formats_of, stage_memory
from marlhf_mega.plan.workload import workload

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKING = ["ppo.packing=true", "ppo.microbatch_tokens=200"]
OFFLOAD = {"offload_idle": True, "offload_optimizer": True}


def offload_case(memory):
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "ffn_hidden_size": 2816,
            "vocab_size": 50,
        },
        "memory": memory,
        "rollout": {"batch_size": 8, "max_response_tokens": 6},
        "ppo": {"minibatch_size": 8, "microbatch_size": 2},
        "reward": {"source": "model"},
    }


def planned(memory):
    config = Config.model_validate(offload_case(memory))
    engine = bool(platform.current().transformer_engine)
    formats = formats_of(config.precision, on_gpu=True, has_engine=engine)
    return stage_memory(workload(config, "ppo", 1, on_gpu=True), 0, formats)


WITHOUT_ENGINE = """
import runpy, sys
sys.modules |= dict.fromkeys(("transformer_engine", "transformer_engine_torch"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(arguments, *, gpu, timeout=300):
    """Run Python in a process of its own, which sees the GPU or none; return its output."""
    hidden = {}
    if not gpu:
        # A process without a GPU must not find Transformer Engine.
        hidden, arguments = {"CUDA_VISIBLE_DEVICES": ""}, ["-c", WITHOUT_ENGINE, *arguments]
    # Transformer Engine multiplies float32 matrices in TF32, with 10 bits, unless forbidden.
    settings = {"OMP_NUM_THREADS": "4", "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | settings | hidden,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


def answers(out, dtype, *folder, gpu):
    run([ROOT / "tools" / "acceptance" / "tiny_answers.py", out, dtype, *folder], gpu=gpu)
    found = json.loads(out.read_text())
    assert found["device"] == ("cuda" if gpu else "cpu")
    return found


def quickstart(folder, *options):
    """Three steps of every job; return the lines of ppo's metrics."""
    arguments = [f"run.dir={folder}", "run.steps=3", *options]
    assert "gold reward" in run(["-m", "marlhf_mega", "quickstart", *arguments], gpu=True)
    lines = (folder / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    return [json.loads(line) for line in lines]


def flat(rows):
    return [value for row in rows for value in row]


def mean_difference(rows, others):
    pairs = list(zip(flat(rows), flat(others), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("name", ["ma_ppo_cases.json", "alol_cases.json"])
def test_the_golden_vectors_hold_on_the_device(name):
    golden = ROOT / "tests" / "golden" / name
    run([ROOT / "tools" / "check_golden.py", golden, "--device", "cuda"], gpu=True)


def test_random_draws_are_those_of_the_cpu():
    rows, positions = torch.arange(100), torch.arange(50)
    here = uniform(fold(fold(3, 5, rows)[:, None], positions))
    there = uniform(fold(fold(3, 5, rows.cuda())[:, None], positions.cuda()))
    assert torch.equal(here, there.cpu())


def test_macro_actions_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(64, 100, generator=generator) < 0.2
    mask = torch.arange(100) < torch.randint(1, 101, (64, 1), generator=generator)
    values = torch.randn(64, 100, generator=generator, dtype=torch.float64)
    here = MacroActions.from_starts(starts, mask)
    there = MacroActions.from_starts(starts.cuda(), mask.cuda())
    assert torch.equal(here.ids, there.ids.cpu())
    assert torch.allclose(here.pool(values), there.pool(values.cuda()).cpu(), atol=1e-12)


def test_a_tiny_model_gives_the_cpus_answers_in_float32(tmp_path):
    cpu = answers(tmp_path / "cpu.json", "float32", gpu=False)
    gpu = answers(tmp_path / "gpu.json", "float32", gpu=True)
    tokens = ["greedy", "graphs"]
    assert [gpu[name] for name in tokens] == [cpu[name] for name in tokens]
    for name in cpu.keys() - {"device", *tokens}:
        assert flat(gpu[name]) == pytest.approx(flat(cpu[name]), rel=1e-4, abs=1e-4), name


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path):
    """The same bfloat16 weights; the answers in float32 are the truth."""
    folder = tmp_path / "llama"
    theirs = json.loads(run([HERE / "hf_llama.py", folder], gpu=False))
    found = answers(tmp_path / "gpu.json", "bfloat16", folder, gpu=True)
    rounding = mean_difference(theirs["bfloat16"], theirs["float32"])
    for name in ("logprobs", "packed_logprobs"):
        assert mean_difference(found[name], theirs["float32"]) < 1.5 * rounding, name
    exact = answers(tmp_path / "exact.json", "float32", folder, gpu=True)["logprobs"]
    assert flat(exact) == pytest.approx(flat(theirs["float32"]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "options", [[], PACKING, ["parallel.overlap=true"], ["rollout.cuda_graphs=true"]]
)
def test_sft_reward_model_and_ppo_run_in_bfloat16(tmp_path, options):
    lines = quickstart(tmp_path, *options)
    assert "(nccl, cuda)" in (tmp_path / "ppo" / "config.yaml").read_text()
    assert lines[-1]["step"] == 3
    # bfloat16 keeps 8 bits, so sampler and trainer may differ in the third digit.
    assert lines[1]["rollout/logprob_gap"] < 0.05


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("tensorwise", []),
        ("tensorwise", ["precision.fp8_edge_layers_bf16=1", "precision.fp8_frozen=true"]),
        ("tensorwise", ["precision.fp8_param_gather=true"]),
        ("tensorwise", ["precision.fp8_param_gather=true", "parallel.overlap=true"]),
        ("tensorwise", PACKING),
        ("tensorwise", ["memory.offload_idle=true", "memory.offload_optimizer=true"]),
        ("delayed", []),
        ("blockwise", []),
        ("mxfp8", []),
    ],
)
def test_every_job_runs_in_fp8(tmp_path, recipe, options):
    support = platform.current().supports_fp8(recipe)
    if not support:
        pytest.skip(support.reason)
    lines = quickstart(
        tmp_path,
        "precision.fp8=hybrid",
        f"precision.fp8_recipe={recipe}",
        "precision.fp8_check_interval=1",
        *options,
    )
    for line in lines[1:]:
        # FP8 has 3 bits: near to bfloat16, but not the same.
        assert 0 < line["policy/fp8_logprob_gap"] < 0.1
        assert 0.9 < line["policy/fp8_gradient_cosine"] < 1
    if recipe != "delayed":  # Delayed scaling rolls out without FP8.
        assert lines[1]["rollout/logprob_gap"] < 0.1


def test_weights_and_moments_leave_the_gpu_and_come_back_bit_for_bit(tmp_path):
    cases = [offload_case(memory) for memory in ({}, OFFLOAD)]
    out = tmp_path / "out.json"
    run([ROOT / "tests" / "distributed" / "offload_ranks.py", out, json.dumps(cases)], gpu=True)
    plain, found = json.loads(out.read_text())
    assert found["digests"] == plain["digests"]
    policy, critic = plain["parameters"]
    # bfloat16 weights, float32 masters, gradients and two moments.
    frozen, training = 2 * (policy + critic), 16 * (policy + critic)
    assert found["away"] == pytest.approx(frozen + 2 * critic + training, rel=1e-3)
    fall = {
        phase: (plain[phase] - found[phase]) * 2**30
        for phase in ("rollout", "experience", "update")
    }
    assert fall == pytest.approx(
        {"rollout": found["away"], "experience": found["away"] - 2 * policy, "update": frozen},
        rel=0.1,
    )
    before, after = (planned(memory) for memory in ({}, OFFLOAD))
    assert fall == pytest.approx({p: before.total(p) - after.total(p) for p in fall}, rel=0.1)
    # What passes hold is an estimate; the rest of a peak is exact.
    for phase in fall:
        assert plain[phase] * 2**30 == pytest.approx(before.total(phase), rel=0.15)
