"""What marlhf_mega/README.md says to add is complete: with it, and nothing else, a run starts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "marlhf_mega/README.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def apply(diff, root):
    """Add the lines of a diff where the lines around them are, which must be one place."""
    for part in filter(None, re.split(r"^--- ", diff, flags=re.MULTILINE)):
        name, *lines = part.splitlines()
        path = root / name
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        assert path.read_text().count(f"\n{old}") == 1, (name, old)
        new = "".join(f"{line[1:]}\n" for line in lines)
        path.write_text(path.read_text().replace(f"\n{old}", f"\n{new}"))


@pytest.mark.parametrize("diff", DIFFS)
def test_an_addition_has_fewer_than_thirty_lines(diff):
    assert 0 < diff.count("\n") < 30


def test_the_additions_of_the_readme_run(tmp_path):
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "marlhf_mega", tmp_path / "marlhf_mega", ignore=skipped)
    for diff in DIFFS:
        apply(diff, tmp_path)
    train_tokenizer(toy.tokenizer_text(0, 300), tmp_path / "tok", vocab_size=400)
    write_jsonl(tmp_path / "prompts.jsonl", toy.generate_prompts(0, 8))
    (tmp_path / "varied.py").write_text(
        "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 7)\n"
    )
    settings = {
        "run": {"dir": str(tmp_path / "run"), "steps": 2},
        "model": {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
        "tokenizer": {"path": str(tmp_path / "tok")},
        "data": {"train_path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"batch_size": 4, "max_response_tokens": 8},
        "ppo": {"estimator": "whole_return", "minibatch_size": 4},
        "reward": {"source": str(tmp_path / "varied.py:reward"), "shaping": "squash"},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "samples_interval": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "marlhf_mega", "ppo", "--config", "job.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["policy/grad_norm"] > 0 for line in lines] == [True, True]
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["shaped"] == pytest.approx(math.tanh(sample["score"]))
