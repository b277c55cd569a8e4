"""`marlhf reward` on real gloo ranks: labels that move, and what is read of held-out pairs."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.metrics.pairs import JudgedPair, calibration_error
from tests.distributed.ranks import JOB, run_forked

SETTINGS = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
    "data": {"max_prompt_tokens": 48, "max_response_tokens": 40},
    "reward_model": {"batch_size": 4, "microbatch_size": 2, "lr": 1e-2},
    "logging": {"tensorboard": False},
}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run_dir):
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold 12 training pairs and two files of held-out pairs."""
    folder = tmp_path_factory.mktemp("reward")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "train.jsonl", toy.generate_preferences(0, 12))
    write_jsonl(folder / "easy.jsonl", toy.generate_preferences(1, 9))
    write_jsonl(folder / "hard.jsonl", toy.generate_preferences(2, 6))
    settings = SETTINGS | {"tokenizer": {"path": str(folder / "tok")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    return folder


def reward(folder, name, *options, ranks=1):
    done = run_forked(
        JOB,
        "reward",
        *("--config", folder / "job.yaml"),
        f"run.dir={folder / name}",
        f"data.train_path={folder}/train.jsonl",
        f"data.validation_path=[{folder}/easy.jsonl,{folder}/hard.jsonl]",
        *options,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder / name


SMOOTHING = ("run.epochs=3", "reward_model.label_update=0.5", "checkpoint.interval=3")


@pytest.fixture(scope="module")
def smoothed(folder):
    """Train for three epochs of three steps, with a checkpoint at the end of each."""
    return reward(folder, "smoothed", *SMOOTHING, "checkpoint.keep=3")


def labels(run, step):
    state = json.loads((run / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())
    return state["state"]["labels"]


def test_labels_move_after_every_epoch_but_the_last(smoothed):
    first, second, third = (labels(smoothed, step) for step in (3, 6, 9))
    assert [each["epoch"] for each in (first, second, third)] == [0, 1, 2]
    assert first["chosen_probability"] == [1.0] * 12
    assert all(0.5 < p < 1 for p in second["chosen_probability"])
    assert all(0.25 < p < 1 for p in third["chosen_probability"])
    moved = zip(second["chosen_probability"], third["chosen_probability"], strict=True)
    assert all(now != then for then, now in moved)


def test_held_out_pairs_are_judged_by_file_by_confidence_and_by_length(folder, smoothed):
    last = numbers(smoothed)[-1]
    pairs = [JudgedPair(**line) for line in lines(smoothed / "held_out_pairs.jsonl")]
    assert [pair.source for pair in pairs] == ["easy"] * 9 + ["hard"] * 6
    for name in ("easy", "hard"):
        own = [pair.lead > 0 for pair in pairs if pair.source == name]
        assert last[f"eval/accuracy/{name}"] == pytest.approx(statistics.fmean(own))
    scores = [s for p in pairs for s in (p.chosen_score, p.rejected_score)]
    tokens = [n for p in pairs for n in (p.chosen_tokens, p.rejected_tokens)]
    expected = statistics.correlation(scores, tokens)
    assert last["eval/length_correlation"] == pytest.approx(expected, abs=1e-9)
    assert last["eval/calibration_error"] == calibration_error(pairs)
    page = (smoothed / "report.html").read_text()
    assert "Held-out pairs" in page
    assert "accuracy, easy" in page
    tokenizer = Tokenizer.load(folder / "tok")
    row = lines(folder / "easy.jsonl")[2]
    whole = len(tokenizer.encode(row["chosen"])) + 1
    assert pairs[2].chosen_tokens == min(whole, SETTINGS["data"]["max_response_tokens"])


def test_a_run_resumed_between_epochs_has_the_same_labels(folder, smoothed):
    """The checkpoint is from before the labels move: bit for bit the same afterwards."""
    resumed = folder / "resumed"
    shutil.copytree(smoothed, resumed)
    for step in (6, 9):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:06d}")
    (resumed / "checkpoints" / "latest").write_text("step_000003\n")
    reward(folder, "resumed", *SMOOTHING)
    assert numbers(resumed) == numbers(smoothed)
    assert labels(resumed, 9) == labels(smoothed, 9)


def test_labels_do_not_depend_on_the_layout(folder, smoothed):
    wide = reward(folder, "wide", *SMOOTHING, "parallel.tensor_size=2", ranks=4)
    found, expected = (labels(run, 9)["chosen_probability"] for run in (wide, smoothed))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) > 6
    for name, value in numbers(smoothed)[-1].items():
        if name.startswith("eval/"):
            assert numbers(wide)[-1][name] == pytest.approx(value, abs=1e-3), name


def test_users_are_judged_by_what_they_prefer(folder):
    """Two users who want the opposite of each other; a run resumes bit for bit."""
    for name in ("train", "easy", "hard"):
        rows = lines(folder / f"{name}.jsonl")
        for row in rows[1::2]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        of_users = [row | {"annotator": i % 2} for i, row in enumerate(rows)]
        write_jsonl(folder / f"{name}_users.jsonl", of_users)
    options = (
        *("run.steps=4", "checkpoint.interval=2", "checkpoint.export_hf=false"),
        *("reward_model.latent_size=8", "reward_model.latent_context=3"),
        *("data.fields.user=annotator", f"data.train_path={folder}/train_users.jsonl"),
        f"data.validation_path=[{folder}/easy_users.jsonl,{folder}/hard_users.jsonl]",
    )
    users = reward(folder, "users", *options)
    metrics = numbers(users)
    assert [line["reward/latent_kl"] > 0 for line in metrics[1:]] == [True] * 4
    assert metrics[4]["eval/loss"] != metrics[0]["eval/loss"]
    resumed = folder / "users_resumed"
    shutil.copytree(users, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    (resumed / "checkpoints" / "latest").write_text("step_000002\n")
    reward(folder, "users_resumed", *options)
    assert numbers(resumed) == metrics


def test_the_head_without_the_length_is_the_reward(folder):
    """A run with two heads resumes bit for bit; the run and its export give the same scores."""
    options = ("run.steps=4", "reward_model.length_coef=1", "checkpoint.interval=2")
    odin = reward(folder, "odin", *options)
    metrics = numbers(odin)
    assert abs(metrics[4]["reward/length_head_correlation"]) <= 1
    assert metrics[4]["reward/head_overlap"] != metrics[1]["reward/head_overlap"]
    resumed = folder / "odin_resumed"
    shutil.copytree(odin, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    (resumed / "checkpoints" / "latest").write_text("step_000002\n")
    reward(folder, "odin_resumed", *options)
    assert numbers(resumed) == metrics
    scores = []
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(3, 4))
    for source in (odin, odin / "hf"):
        out = folder / f"answers_{source.name}"
        done = run_forked(
            JOB,
            "generate",
            *("--config", folder / "job.yaml", f"run.dir={out}", f"reward.source={source}"),
            f"data.validation_path={folder}/prompts.jsonl",
            "rollout.max_response_tokens=8",
            ranks=1,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        scores.append([row["reward"] for row in lines(out / "responses" / "000000000.jsonl")])
    assert scores[0] == scores[1]
    assert len(set(scores[0])) == 4
