"""A first configuration loads, fits, and is made for its model and data."""

import json
from pathlib import Path

import pytest

from marlhf_mega.cli import main
from marlhf_mega.commands.init import fitting_values, shipped
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.plan.gpus import Gpu, find_gpu
from marlhf_mega.plan.plan import Cluster

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 400,
}
JOBS = ["sft", "reward", "ppo", "offline"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder without weights, and data of every job."""
    folder = tmp_path_factory.mktemp("init")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "hf", vocab_size=400)
    (folder / "hf" / "config.json").write_text(json.dumps(LLAMA))
    pairs = toy.generate_preferences(0, 16)
    answers = [{"prompt": p["prompt"], "response": p["chosen"], "reward": 1.0} for p in pairs]
    rows = {"sft": toy.generate_sft(0, 16), "reward": pairs, "offline": answers}
    rows["ppo"] = toy.generate_prompts(0, 16)
    for job, found in rows.items():
        write_jsonl(folder / f"{job}.jsonl", found)
    return folder


def init(files, data, *options):
    return main(["init", "--hf-path", str(files / "hf"), "--data", str(data), *options])


@pytest.mark.parametrize("job", JOBS)
def test_the_job_is_that_of_the_data_and_passes_its_check(
    files, tmp_path, job, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init(files, files / f"{job}.jsonl") == 0
    text = (tmp_path / f"{job}.yaml").read_text()
    assert f"marlhf {job} --config {job}.yaml\n" in capsys.readouterr().out
    values = [line for line in text.splitlines() if line.startswith("  ")]
    assert all("  # " in line for line in values)
    assert len(values) >= 10
    rule = ["reward.source=marlhf_mega.data.toy:gold_reward"] if job in ("ppo", "offline") else []
    held_out = [f"data.validation_path={files / 'ppo.jsonl'}"] if job == "offline" else []
    assert main([job, "--config", f"{job}.yaml", "--check", *rule, *held_out]) == 0


def test_a_file_is_not_replaced(files, tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    assert init(files, files / "sft.jsonl", "--job", "ppo", "--output", str(target)) == 0
    assert target.read_text().startswith("# ppo of ")
    assert init(files, files / "sft.jsonl", "--output", str(target)) == 2
    assert capsys.readouterr().err == (
        f"--output={target}: must be a new file; there is one. Remove it, or give another name.\n"
    )


def test_limits_are_those_of_the_data_and_the_model(files, tmp_path):
    """Characters are tokens of at least one character; the toy's prompts have below 128 tokens."""
    words = {"prompt": "zq " * 200, "response": "zq"}
    write_jsonl(tmp_path / "long.jsonl", [words])
    keys, _ = fitting_values("sft", files / "hf", str(tmp_path / "long.jsonl"), cluster("A100", 1))
    assert (keys["data.max_prompt_tokens"], keys["data.long_prompts"]) == (96, "truncate")
    assert keys["data.max_response_tokens"] == 8
    keys, _ = fitting_values("ppo", files / "hf", str(files / "ppo.jsonl"), cluster("A100", 1))
    assert "data.long_prompts" not in keys
    assert keys["data.max_prompt_tokens"] + keys["rollout.max_response_tokens"] == 128


def cluster(name, count):
    return Cluster(nodes=1, gpus_per_node=count, gpu=find_gpu(name))


def test_a_model_that_needs_several_gpus_gets_a_layout(files, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for file in (files / "hf").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    large = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    large |= {"intermediate_size": 14336, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(LLAMA | large))
    small, _ = fitting_values("sft", files / "hf", str(files / "sft.jsonl"), cluster("A100", 8))
    assert not [key for key in small if key.startswith(("parallel", "memory"))]
    keys, plan = fitting_values("sft", folder, str(files / "sft.jsonl"), cluster("A100-40", 8))
    assert plan.fits
    assert keys["parallel.tensor_size"] > 1
    one = Gpu(name="tiny", memory=4 * GIB, flops=1e12, bandwidth=1e12, link=1e9, has_fp8=False)
    with pytest.raises(ConfigError, match="sft can train on 1 x tiny; no layout fits"):
        fitting_values(
            "sft", folder, str(files / "sft.jsonl"), Cluster(nodes=1, gpus_per_node=1, gpu=one)
        )


def test_pairs_are_for_preference_if_asked(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init(files, files / "reward.jsonl", "--job", "preference") == 0
    assert main(["preference", "--config", "preference.yaml", "--check"]) == 0


@pytest.mark.parametrize("job", [*JOBS, "preference"])
def test_the_shipped_small_configurations_are_current(job):
    path = Path(__file__).parents[3] / "configs" / f"hf_small_{job}.yaml"
    assert path.read_text() == shipped(job)
    assert load_config(path, ["model.init=random"]).run.dir == Path(f"runs/my/{job}")
