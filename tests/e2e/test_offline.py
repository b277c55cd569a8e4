"""`marlhf generate` and `marlhf offline` on real gloo ranks, with tiny models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from marlhf_mega.data import toy
from marlhf_mega.data.files import content_hash, write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer

RULE = "letters:share_of_e"
SETTINGS = {
    "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
    "data": {"max_prompt_tokens": 48, "max_response_tokens": 12},
    "rollout": {"max_response_tokens": 12, "samples_per_prompt": 4, "batch_size": 16},
    "policy": {"lr": 3e-3},
    "critic": {"lr": 1e-3},
    "offline": {"batch_size": 8, "microbatch_size": 2, "value_epochs": 2},
    "evaluate": {"num_prompts": 16, "batch_size": 16},
    "reward": {"source": RULE},
    "logging": {"tensorboard": False},
}
WIDE = ["parallel.tensor_size=2", "parallel.pipeline_size=2"]


def marlhf(folder, *arguments, ranks=1, code=0):
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, "-m", "marlhf_mega", *map(str, arguments), "--config", folder / "job.yaml"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def paths(folder):
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run_dir):
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold 40 prompts, a random policy's scored answers to them, and 24 held-out prompts."""
    folder = tmp_path_factory.mktemp("offline")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 40))
    write_jsonl(folder / "held_out.jsonl", toy.generate_prompts(1, 24))
    (folder / "letters.py").write_text(
        "def share_of_e(prompt, response):\n    return response.count('e') / max(1, len(response))\n"
        "def is_good(prompt, response):\n    return float(response == 'good')\n"
    )
    settings = SETTINGS | {"tokenizer": {"path": str(folder / "tok")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    out = folder / "generate"
    marlhf(folder, "generate", f"run.dir={out}", f"data.validation_path={folder}/prompts.jsonl")
    return folder


def offline(folder, name, *options, ranks=1):
    marlhf(
        folder,
        "offline",
        f"run.dir={folder / name}",
        f"data.train_path={folder}/generate/responses/000000000.jsonl",
        f"data.validation_path={folder}/held_out.jsonl",
        *options,
        ranks=ranks,
    )
    return numbers(folder / name)


@pytest.fixture(scope="module")
def trained(folder):
    """Train where a start that never reached a checkpoint has left values that nothing beats."""
    (folder / "one").mkdir()
    rows = {"values": torch.full((160, 1), 100.0), "ref_logprobs": torch.zeros(160, 12)}
    data_hash = content_hash(folder / "generate" / "responses" / "000000000.jsonl")
    save_file(rows, folder / "one" / "offline.safetensors", metadata={"data_hash": data_hash})
    return offline(folder, "one", "run.steps=4", "checkpoint.interval=2")


def test_generate_answers_every_prompt_and_scores_the_answers(folder):
    rows = lines(folder / "generate" / "responses" / "000000000.jsonl")
    prompts = lines(folder / "prompts.jsonl")
    assert [row["prompt"] for row in rows] == [p["prompt"] for p in prompts for _ in range(4)]
    for row in rows:
        expected = row["response"].count("e") / max(1, len(row["response"]))
        assert row["reward"] == pytest.approx(expected)
    assert len({row["response"] for row in rows}) > 40


def test_generate_gives_the_same_answers_on_another_layout_and_after_an_interruption(folder):
    again = folder / "wide"
    options = [f"run.dir={again}", f"data.validation_path={folder}/prompts.jsonl"]
    marlhf(folder, "generate", *options, *WIDE, ranks=4)
    block = "responses/000000000.jsonl"
    assert [r["response"] for r in lines(again / block)] == [
        r["response"] for r in lines(folder / "generate" / block)
    ]


def test_answers_of_other_settings_or_prompts_are_not_added_to(folder):
    again = folder / "again"
    shutil.copytree(folder / "generate", again)
    options = [f"run.dir={again}", f"data.validation_path={folder}/prompts.jsonl"]
    done = marlhf(folder, "generate", *options, "rollout.temperature=0.5", code=2)
    message = "rollout.temperature=0.5: must be as in the answers that are there, 1.0"
    assert message in done.stderr
    done = marlhf(
        folder, "generate", *options, f"data.validation_path={folder}/held_out.jsonl", code=2
    )
    assert "held_out.jsonl: must hold the prompts of the answers that are there" in done.stderr


def test_the_policy_answers_held_out_prompts_as_the_rare_better_responses_do(folder):
    prompts = [row["prompt"] for row in lines(folder / "prompts.jsonl")]
    answers = [("good", 1.0), ("bad", 0.0), ("bad", 0.0), ("bad", 0.0)]
    rows = [{"prompt": p, "response": r, "reward": x} for p in prompts for r, x in answers]
    write_jsonl(folder / "mixed.jsonl", rows)
    train = f"data.train_path={folder}/mixed.jsonl"
    options = ["run.steps=40", "reward.source=letters:is_good", "evaluate.temperature=0"]
    found = offline(folder, "mixed", train, *options)
    assert found[0]["offline/kl"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["eval/score_mean"] > 0.9


def test_every_drawn_response_is_better_than_its_prompt_is_worth(trained):
    """By values of this run, not by those that were there."""
    assert all(line["offline/advantage"] > 0 for line in trained)


def test_a_resumed_run_equals_the_uninterrupted_one(folder, trained):
    shutil.copytree(folder / "one", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step_000004")
    again = offline(folder, "resumed", "run.steps=4", "checkpoint.interval=2")
    assert again == trained


def test_four_ranks_give_the_numbers_of_one(folder, trained):
    found = offline(folder, "four", "run.steps=2", "offline.packing=true", *WIDE, ranks=4)
    for ours, expected in zip(found, trained[:2], strict=True):
        for name in ("offline/loss", "offline/advantage", "policy/grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name
    one, four = (load_file(folder / name / "offline.safetensors") for name in ("one", "four"))
    for name, tensor in one.items():
        assert four[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-4), name


def test_plain_likelihood_is_that_of_sft(folder, trained):
    """Both see all rows in the same order; sft divides by tokens, offline by responses.

    Padded or packed makes no difference.
    """
    options = ["offline.algorithm=nll", "offline.sampling=all", "run.steps=3"]
    # A run with other settings was killed here before its first checkpoint.
    (folder / "nll").mkdir()
    shutil.copy(folder / "one" / "offline.safetensors", folder / "nll")
    found = offline(folder, "nll", *options)
    assert not load_file(folder / "nll" / "offline.safetensors")["values"].any()
    train = f"data.train_path={folder}/generate/responses/000000000.jsonl"
    sizes = ["sft.batch_size=8", "sft.microbatch_size=2", "sft.packing=true", "run.steps=1"]
    marlhf(folder, "sft", f"run.dir={folder / 'sft'}", train, *sizes)
    sft = numbers(folder / "sft")
    ratio = found[0]["offline/loss"] / sft[0]["sft/loss"]
    # The mean number of tokens of 8 responses of at most 12.
    assert 1 < ratio <= 12
    assert ratio * 8 == pytest.approx(round(ratio * 8), abs=1e-3)


def test_responses_that_are_all_worse_than_expected_are_refused(folder):
    rows = [{"prompt": "a", "response": "b", "reward": -100.0}] * 8
    write_jsonl(folder / "worse.jsonl", rows)
    done = marlhf(
        folder,
        "offline",
        f"run.dir={folder / 'worse'}",
        f"data.train_path={folder}/worse.jsonl",
        f"data.validation_path={folder}/held_out.jsonl",
        code=1,
    )
    assert "offline.sampling=good_priority: must find a response with a positive" in done.stderr
