"""`marlhf generate` and `marlhf offline` on real gloo ranks, with tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from marlhf_mega.cli import main
from marlhf_mega.data import toy
from marlhf_mega.data.files import content_hash, write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

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
MACRO = ["offline.algorithm=a_lol_macro", "macro.rule=entropy"]
WIDE = ["parallel.tensor_size=2", "parallel.pipeline_size=2"]


def marlhf(folder, *arguments, ranks=1, code=0):
    done = run_forked(JOB, *arguments, "--config", folder / "job.yaml", ranks=ranks)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run_dir):
    """Return the metrics of every step; those from before training are held-out results alone."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in lines(run_dir / "metrics.jsonl")
        if line["step"]
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
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))  # the rules; programs are started with this path
        out = folder / "generate"
        marlhf(folder, "generate", f"run.dir={out}", f"data.validation_path={folder}/prompts.jsonl")
        yield folder


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
    rows = {"values": torch.full((160,), 100.0), "ref_logprobs": torch.zeros(160, 12)}
    data_hash = content_hash(folder / "generate" / "responses" / "000000000.jsonl")
    save_file(rows, folder / "one" / "offline.safetensors", metadata={"data_hash": data_hash})
    return offline(folder, "one", "run.steps=4", "checkpoint.interval=2", *MACRO)


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


def test_generate_ends_with_75_after_a_block_and_goes_on_with_the_next(folder, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", toy.generate_prompts(2, 1030))
    options = [f"run.dir={tmp_path / 'run'}", f"data.validation_path={tmp_path}/prompts.jsonl"]
    options += ["rollout.samples_per_prompt=1", "rollout.max_response_tokens=2"]
    options += ["rollout.batch_size=256"]
    done = marlhf(folder, "generate", *options, "run.max_hours=1e-9", code=75)
    assert "asked to stop: saved after prompt 1024, start again" in done.stderr
    first, second = (tmp_path / "run" / "responses" / f"{n:09d}.jsonl" for n in (0, 1024))
    written = first.stat().st_mtime_ns
    assert not second.exists()
    marlhf(folder, "generate", *options)
    assert first.stat().st_mtime_ns == written
    assert (len(lines(first)), len(lines(second))) == (1024, 6)
    prompts = [row["prompt"] for row in lines(tmp_path / "prompts.jsonl")]
    assert [row["prompt"] for row in lines(first) + lines(second)] == prompts


def test_the_values_of_offline_are_learnt_under_the_watchdog(folder, tmp_path):
    """With a limit that the first optimizer step exceeds."""
    done = marlhf(
        folder,
        "offline",
        f"run.dir={tmp_path / 'run'}",
        f"data.train_path={folder}/generate/responses/000000000.jsonl",
        f"data.validation_path={folder}/held_out.jsonl",
        *("run.steps=1", "offline.value_epochs=100", "watchdog.update_seconds=1e-6"),
        code=70,
    )
    assert (
        "watchdog.update_seconds=1e-06: no phase may take longer; rank 0 has been in step 0, u"
        in (done.stderr)
    )


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
    start = lines(folder / "mixed" / "metrics.jsonl")[0]
    assert (start["step"], start["eval/score_mean"]) == (0, 0)
    assert found[-1]["eval/win_rate"] > 0.9


def test_every_drawn_response_is_better_than_its_prompt_is_worth(trained):
    """By values of this run, not by those that were there."""
    assert all(line["offline/advantage"] > 0 for line in trained)


def test_a_resumed_run_equals_the_uninterrupted_one(folder, trained):
    shutil.copytree(folder / "one", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step_000004")
    again = offline(folder, "resumed", "run.steps=4", "checkpoint.interval=2", *MACRO)
    assert again == trained


def test_four_ranks_give_the_numbers_of_one(folder, trained):
    options = ["run.steps=2", "offline.packing=true", *MACRO, *WIDE]
    found = offline(folder, "four", *options, ranks=4)
    for ours, expected in zip(found, trained[:2], strict=True):
        for name in ("offline/loss", "offline/advantage", "policy/grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name
    one, four = (load_file(folder / name / "offline.safetensors") for name in ("one", "four"))
    for name, tensor in one.items():
        assert four[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-4), name
    assert 1 < one["action_ids"].max() < 11


def test_what_each_row_is_worth_is_written_beside_the_data(folder, trained):
    rows = lines(folder / "generate" / "responses" / "000000000.jsonl")
    found = lines(folder / "one" / "advantages.jsonl")
    assert [line["line"] for line in found] == list(range(1, len(rows) + 1))
    positive = [max(line["advantage"], 0) for line in found]
    for line, row, weight in zip(found, rows, positive, strict=True):
        assert line["file"].endswith("000000000.jsonl")
        assert line["advantage"] == pytest.approx(row["reward"] - line["value"])
        assert line["probability"] == pytest.approx(weight / sum(positive), abs=1e-6)


def test_both_responses_of_pairs_are_drawn_and_the_released_code_swaps_rewards(folder):
    """A rejected response that is the better one is drawn, and learned as worth the chosen one."""
    pair = {"chosen": "bad", "rejected": "good", "chosen_reward": -1, "rejected_reward": 9}
    rows = [{"prompt": row["prompt"]} | pair for row in lines(folder / "prompts.jsonl")]
    write_jsonl(folder / "pairs.jsonl", rows)
    options = [f"data.train_path={folder}/pairs.jsonl", "offline.sampling=all_priority"]
    options += ["run.steps=2", "evaluate.num_prompts=2"]
    (first, _) = offline(folder, "pairs", *options)
    (swapped, _) = offline(folder, "swapped", *options, "offline.compat=lol_rl")
    found = lines(folder / "pairs" / "advantages.jsonl")
    assert [line["line"] for line in found[:4]] == [1, 1, 2, 2]
    assert [line["probability"] > 0 for line in found[:4]] == [False, True] * 2
    assert first["offline/advantage"] == pytest.approx(swapped["offline/advantage"] + 10, rel=1e-4)
    assert swapped["policy/grad_norm"] == 0 < first["policy/grad_norm"]


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
    assert not (folder / "nll" / "advantages.jsonl").exists()
    assert "offline/kl" not in found[0]
    # A resume with an algorithm that needs a reference computes it from the first policy.
    changed = ["offline.algorithm=r_lol", "checkpoint.allow_changed=[offline.algorithm]"]
    resumed = offline(folder, "nll", *options[1:2], *changed, "run.steps=4")
    assert load_file(folder / "nll" / "offline.safetensors")["ref_logprobs"].min() < 0
    assert resumed[-1]["offline/kl"] != 0
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


def test_a_resume_with_another_chat_template_is_refused(folder, trained, monkeypatch, capsys):
    """Equal words, but prompts would become other tokens than before."""
    path = folder / "tok" / "tokenizer_config.json"
    text = path.read_text()
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    path.write_text(json.dumps(json.loads(text) | template))
    monkeypatch.syspath_prepend(str(folder))
    settings = [
        f"run.dir={folder / 'one'}",
        f"data.train_path={folder}/generate/responses/000000000.jsonl",
        f"data.validation_path={folder}/held_out.jsonl",
        "run.steps=6",
        *MACRO,
    ]
    code = main(["offline", "--config", str(folder / "job.yaml"), *settings])
    path.write_text(text)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenizer.path={folder / 'tok'}: must turn rows into tokens as that")
