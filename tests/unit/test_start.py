"""What a start loads, by name: an import of a second is one of every rank, and of every check."""

import json
import subprocess
import sys

CODE = """
import json, sys
from marlhf_mega.cli import main

def loaded(*names):
    return [name for name in names if name in sys.modules]

jobs = json.loads(sys.argv[1])
for job in jobs:
    assert main([*job, "--check"]) == 0
    assert "marlhf_mega.train.inputs" in sys.modules
    found = loaded("megatron", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy")
    found += loaded("torch._dynamo", "tensorboard", "rich.progress", "pyarrow", "datasets", "safetensors.torch")
    assert not found, (job[0], found)
assert main(jobs[-1]) == 0
assert loaded("megatron")
found = loaded("torch._dynamo", "torch._inductor", "pyarrow", "datasets", "wandb", "peft")
assert not found, found
"""


def test_checks_load_no_megatron_and_a_rank_no_compiler(job_files, tmp_path):
    run = [f"run.dir={tmp_path / 'run'}", "checkpoint.export_hf=false"]
    tokenizer = f"tokenizer.path={job_files / 'tok'}"
    ppo = ["run.steps=1", "rollout.max_response_tokens=4", "rollout.batch_size=4"]
    ppo += ["ppo.minibatch_size=4", "reward.source=marlhf_mega.data.toy:gold_reward"]
    jobs = [
        ["quickstart", *run],
        ["sft", *run, tokenizer, f"data.train_path={job_files}/sft.jsonl"],
        ["preference", *run, tokenizer, f"data.train_path={job_files}/pairs.jsonl"],
        ["generate", *run, tokenizer, f"data.validation_path={job_files}/prompts.jsonl"],
        ["ppo", *run, tokenizer, f"data.train_path={job_files}/prompts.jsonl", *ppo],
    ]
    subprocess.run([sys.executable, "-c", CODE, json.dumps(jobs)], check=True, timeout=600)
