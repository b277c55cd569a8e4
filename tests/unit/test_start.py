"""What a start loads, by name: an import of a second is one of every rank, and of every check."""

import subprocess
import sys

import pytest

CODE = """
import sys
from marlhf_mega.cli import main

def loaded(*names):
    return [name for name in names if name in sys.modules]

job = sys.argv[1:]
assert main([*job, "--check"]) == 0
assert "marlhf_mega.train.inputs" in sys.modules
found = loaded("megatron", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy")
found += loaded("torch._dynamo", "tensorboard", "rich.progress", "pyarrow", "datasets", "safetensors.torch")
assert not found, found
if job[0] == "ppo":
    assert main(job) == 0
    assert loaded("megatron")
    found = loaded("torch._dynamo", "torch._inductor", "pyarrow", "datasets", "wandb", "peft")
    assert not found, found
"""


@pytest.mark.parametrize(("command", "data"), [("ppo", "prompts"), ("sft", "sft")])
def test_a_check_loads_no_megatron_and_a_rank_no_compiler(job_files, tmp_path, command, data):
    job = [
        *(command, f"run.dir={tmp_path / 'run'}", f"tokenizer.path={job_files / 'tok'}"),
        *(f"data.train_path={job_files / data}.jsonl", "run.steps=1", "checkpoint.export_hf=false"),
        *("reward.source=marlhf_mega.data.toy:gold_reward", "rollout.max_response_tokens=4"),
        *("rollout.batch_size=4", "ppo.minibatch_size=4"),
    ]
    subprocess.run([sys.executable, "-c", CODE, *job], check=True, timeout=600)
