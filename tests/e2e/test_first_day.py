"""A new user's first day: a config by `marlhf init`, then the README's commands, one rank each."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = ["run.steps=1", "run.epochs=null", "rollout.max_response_tokens=8"]
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(
    vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    bos_token_id=1, eos_token_id=2,
)).save_pretrained("HF_DIR")
"""
COMMANDS = """
import json, sys
from marlhf_mega.cli import main
for arguments in json.load(sys.stdin):
    assert main(arguments) == 0, arguments
"""


def python(code, folder, text=""):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def readme_command(job):
    """Return the arguments of the README's own command, and what keeps it small."""
    (line,) = re.findall(rf"^marlhf ({job} --config configs/hf_small.*)$", README, re.MULTILINE)
    return [*shlex.split(line), *TINY]


def test_the_first_commands_lead_from_a_model_folder_to_an_evaluated_policy(tmp_path):
    python(MODEL, tmp_path)
    train_tokenizer(toy.tokenizer_text(0, 300), tmp_path / "HF_DIR", vocab_size=400)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    data = {"demos": toy.generate_sft, "pairs": toy.generate_preferences}
    data |= dict.fromkeys(("prompts", "held_out"), toy.generate_prompts)
    for name, generate in data.items():
        write_jsonl(tmp_path / f"{name}.jsonl", generate(0, 32))
    commands = [
        ["init", "--hf-path", "HF_DIR", "--data", "demos.jsonl", "--output", "mine.yaml"],
        ["sft", "--config", "mine.yaml", *TINY],
        *(readme_command(job) for job in ("reward", "ppo", "evaluate")),
    ]
    python(COMMANDS, tmp_path, json.dumps(commands))
    results = json.loads((tmp_path / "runs/my/eval/evaluation.json").read_text())
    assert "eval/score_mean" in results
    runs = tmp_path / "runs" / "my"
    assert (runs / "sft" / "report.html").is_file()
    assert json.loads((runs / "ppo" / "hf" / "config.json").read_text())["num_hidden_layers"] == 2
