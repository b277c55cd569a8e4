"""The recipes as a user starts them, with a tiny model; their steps are forked by this process."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.init_std=0.2",
    "data.max_prompt_tokens=64",
    "checkpoint.export_hf=false",
    "logging.tensorboard=false",
]
ANSWERS = ["rollout.samples_per_prompt=4", "rollout.batch_size=8", "rollout.max_response_tokens=8"]
STEPS = {"sft": "sft.batch_size=4", "preference": "preference.batch_size=4"}
SAMPLES = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with prompts, a reward and a policy of one step."""
    folder = tmp_path_factory.mktemp("recipes")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 8))
    demos = [{**row, "response": "a note"} for row in toy.generate_prompts(1, 8)]
    write_jsonl(folder / "demos.jsonl", demos)
    (folder / "reward.py").write_text(
        "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 101)\n"
    )
    options = [f"tokenizer.path={folder / 'tok'}", f"data.train_path={folder / 'demos.jsonl'}"]
    done = run_forked(JOB, "sft", *TINY, *options, f"run.dir={folder / 'sft'}", "run.steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Steps:
    """Runs the steps that a recipe asks for, over two pipes, until one that it does not allow."""

    def __init__(self, folder):
        self.folder, self.calls, self.allowed, self.said = folder, [], 99, []
        for name in ("asked", "answered"):
            os.mkfifo(folder / name)
        self.program = folder / "marlhf"
        self.program.write_text(
            "#!/usr/bin/env bash\n"
            f"printf '%s\\n' \"$@\" >{folder}/asked\n"
            f"read -r code <{folder}/answered\n"
            'exit "$code"\n'
        )
        self.program.chmod(0o755)

    def serve(self):
        while arguments := (self.folder / "asked").read_text().splitlines():
            self.calls.append(arguments)
            code = 75
            if len(self.calls) <= self.allowed:
                done = run_forked(JOB, *arguments)
                code = done.returncode
                self.said.append(done.stdout[-2000:] + done.stderr[-2000:])
            (self.folder / "answered").write_text(f"{code}\n")

    def end(self):
        (self.folder / "asked").write_text("")


@pytest.fixture
def recipe(files, tmp_path):
    """Return what runs a recipe in a folder, and the steps that it has taken."""

    def run(name, *options, allowed=99):
        steps.calls, steps.allowed = [], allowed
        server = threading.Thread(target=steps.serve, daemon=True)
        server.start()
        places = ["--policy", files / "sft", "--prompts", files / "prompts.jsonl"]
        keys = [*TINY, *ANSWERS, *STEPS.values(), "run.steps=1", f"tokenizer.path={files / 'tok'}"]
        reward = f"reward.source={files / 'reward.py'}:reward"
        done = subprocess.run(
            ["bash", RECIPES / name, *places, "--dir", tmp_path / "out", *options, *keys, reward],
            env=os.environ | {"MARLHF": str(steps.program), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        steps.end()
        server.join(timeout=300)
        return done, steps

    steps = Steps(tmp_path)
    return run


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answers(folder):
    """Return the answers to every prompt of a round."""
    rows = [row for path in sorted(folder.glob("answers/responses/*.jsonl")) for row in lines(path)]
    assert len(rows) == 8 * SAMPLES
    return [rows[start : start + SAMPLES] for start in range(0, len(rows), SAMPLES)]


def reward(row):
    return row["reward"]


def keys(call):
    return dict(part.split("=", 1) for part in call[1:])


def check(done, steps, names):
    assert done.returncode == 0, done.stderr[-3000:] + "".join(steps.said)
    assert [call[0] for call in steps.calls] == names


def test_raft_trains_on_the_best_answers_and_a_stopped_one_continues(recipe, tmp_path):
    out = tmp_path / "out"
    stopped, steps = recipe("raft.sh", "--rounds", "2", allowed=3)
    assert stopped.returncode == 75
    assert [call[0] for call in steps.calls] == ["generate", "sft"] * 2
    demos = out / "round_2" / "demos.jsonl"
    before = demos.stat().st_mtime_ns
    # The first round's training is complete, and says so; the second's answers are there.
    check(*recipe("raft.sh", "--rounds", "2"), ["sft", "sft"])
    assert demos.stat().st_mtime_ns == before
    assert "already complete" in steps.said[-2]
    for number in (1, 2):
        folder = out / f"round_{number}"
        best = [max(group, key=reward) for group in answers(folder)]
        assert [row["response"] for row in lines(folder / "demos.jsonl")] == [
            row["response"] for row in best
        ]
    first, second = (keys(call) for call in steps.calls)
    assert second["model.init"] == first["run.dir"] == str(out / "round_1" / "policy")
    assert (out / "policy").readlink() == Path("round_2/policy")
    assert (out / "policy" / "checkpoints" / "latest").is_file()


def test_rest_improves_on_better_and_better_parts(recipe, files, tmp_path):
    done, steps = recipe("rest.sh", "--rounds", "1", "--thresholds", "50%,60")
    check(done, steps, ["generate", "sft", "sft"])
    folder = tmp_path / "out" / "round_1"
    rows = [row for group in answers(folder) for row in group]
    # Texts that an answer has in common with another of its prompt count once.
    different = {(row["prompt"], row["response"]): row["reward"] for row in rows}
    scores = sorted(different.values())
    for number, least in ((1, scores[len(scores) // 2]), (2, 60)):
        demos = lines(folder / f"demos_{number}.jsonl")
        kept = {(row["prompt"], row["response"]) for row in demos}
        assert kept == {text for text, score in different.items() if score >= least}
    assert [keys(call)["model.init"] for call in steps.calls] == [
        str(files / "sft"),
        str(files / "sft"),
        str(folder / "policy_1"),
    ]
    assert (tmp_path / "out" / "policy").readlink() == Path("round_1/policy_2")


def test_iterative_dpo_prefers_the_best_answers_to_the_worst(recipe, files, tmp_path):
    done, steps = recipe("iterative_dpo.sh", "--rounds", "2")
    check(done, steps, ["generate", "preference"] * 2)
    for number in (1, 2):
        folder = tmp_path / "out" / f"round_{number}"
        groups = [group for group in answers(folder) if len({*map(reward, group)}) > 1]
        expected = [
            (max(group, key=reward)["response"], min(group, key=reward)["response"])
            for group in groups
        ]
        pairs = lines(folder / "pairs.jsonl")
        assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == expected
    learned = [keys(call) for call in steps.calls[1::2]]
    assert {call["preference.reference"] for call in learned} == {str(files / "sft")}
    assert learned[1]["model.init"] == learned[0]["run.dir"]
    # Every round draws other answers.
    assert [keys(call)["run.seed"] for call in steps.calls[::2]] == ["1", "2"]


@pytest.mark.parametrize("name", ["raft.sh", "rest.sh", "iterative_dpo.sh"])
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--policy", "p"], "{name}: needs --policy, --prompts and --dir. See --help."),
        (["--rounds"], "--rounds: needs a value. See --help."),
        (["--round", "3"], "--round: unknown option. See --help."),
        (
            ["--policy", "p", "--prompts", "none.jsonl", "--dir", "d"],
            "--prompts=none.jsonl: no such file. Give a file of prompts.",
        ),
        (
            ["--policy", "p", "--prompts", "x", "--dir", "d", "--rounds", "0"],
            "--rounds=0: must be a number from 1. See --help.",
        ),
    ],
)
def test_wrong_usage_is_refused_in_a_line(name, options, line):
    done = subprocess.run(
        ["bash", RECIPES / name, *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, line.format(name=name) + "\n")


@pytest.mark.parametrize("name", ["raft.sh", "rest.sh", "iterative_dpo.sh"])
def test_a_dry_run_shows_the_commands_and_writes_nothing(name, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.touch()
    places = ["--policy", "runs/sft", "--prompts", prompts, "--dir", tmp_path / "out"]
    done = subprocess.run(
        ["bash", RECIPES / name, *places, "--ranks-per-node", "8", "--dry-run", "--config", "F"],
        capture_output=True,
        text=True,
        check=True,
    )
    jobs = [line for line in done.stdout.splitlines() if "launch/torchrun.sh" in line]
    assert len(jobs) == {"raft.sh": 6, "rest.sh": 12, "iterative_dpo.sh": 6}[name]
    assert all(" --ranks-per-node 8 " in line and " --config F " in line for line in jobs)
    assert list(tmp_path.iterdir()) == [prompts]
