"""Wrong usage: one line, exit code 2, nothing started and nothing written."""

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from marlhf_mega import cli
from marlhf_mega.cli import main
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.jobs import PreparedJob
from marlhf_mega.resilience.preemption import EarlyEndError

ROOT = Path(__file__).parents[2]
GOLD = ("reward.source=marlhf_mega.data.toy:gold_reward",)


def test_an_unknown_key_names_the_nearest(refusal):
    assert refusal("ppo", "ppo.epoch=2") == "ppo.epoch: unknown key. Did you mean ppo.epochs?"


def test_an_unknown_key_names_its_twins_in_other_sections(refusal):
    twins = "policy.lr or critic.lr or reward_model.lr"
    assert refusal("ppo", "ppo.lr=1") == f"ppo.lr: unknown key. Did you mean {twins}?"
    assert (
        refusal("ppo", "epochs=2") == "epochs: unknown key. Did you mean run.epochs or ppo.epochs?"
    )


def test_lengths_of_macro_actions_that_leave_none_are_refused(refusal):
    assert refusal("ppo", "macro.min_length=9", "macro.max_length=3") == (
        "macro.max_length=3: must be at least macro.min_length=9. Raise it, or lower "
        "macro.min_length."
    )


def test_a_check_is_for_as_many_ranks_as_asked(job_files, tmp_path, capsys):
    arguments = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train_path={job_files / 'sft.jsonl'}"]
    arguments += [f"tokenizer.path={job_files / 'tok'}", "parallel.tensor_size=2", "--check"]
    assert main(arguments) == 2
    assert "the number of ranks; it is 1" in capsys.readouterr().err
    assert main([*arguments, "--world-size", "2"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--world-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("--world-size=0: must be above 0.")
    assert main([*arguments[:-1], "--world-size", "2"]) == 2
    assert capsys.readouterr().err.startswith("--world-size=2: needs --dry-run or --check; ")
    assert not (tmp_path / "run").exists()


def test_a_wrong_value_is_shown(refusal):
    assert refusal("ppo", "ppo.epochs=many").startswith("ppo.epochs=many: input should be")


def test_an_override_needs_an_equals_sign(refusal):
    line = "ppo.epochs: an override must be key=value. Write for example run.seed=1."
    assert refusal("ppo", "ppo.epochs") == line


@pytest.mark.parametrize("name", ["my.yaml", "folder/other.yml"])
def test_a_file_without_its_option_is_recognised(refusal, name):
    line = f"{name}: an override must be key=value. Did you mean --config {name}?"
    assert refusal("ppo", name) == line


def test_a_file_that_is_there_is_recognised_by_any_name(refusal, tmp_path):
    file = tmp_path / "settings"
    file.touch()
    assert refusal("ppo", str(file)).endswith(f"Did you mean --config {file}?")


def test_settings_may_stand_before_and_after_options(capsys):
    assert main(["ppo", "ppo.gamma=0.5", "--print-config", "ppo.gae_lambda=0.25"]) == 0
    shown = capsys.readouterr().out
    assert "  gamma: 0.5\n" in shown
    assert "  gae_lambda: 0.25\n" in shown


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ppo", "--nope", "ppo.gamma=0.5"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


def test_the_tensor_size_must_divide_the_heads(refusal):
    line = refusal("sft", "parallel.tensor_size=3", "model.ffn_hidden_size=384", world_size=3)
    assert "must divide model.num_attention_heads=4. Use 1, 2 or 4." in line.replace("\n", " ")


def test_the_pipeline_size_must_divide_the_layers(refusal):
    line = refusal("sft", "parallel.pipeline_size=4", world_size=4)
    assert "must divide model.num_layers=2" in line


def test_the_layout_must_divide_the_world(refusal):
    line = refusal("sft", "parallel.tensor_size=2", world_size=3)
    assert line == (
        "parallel: tensor_size * pipeline_size * context_size = 2 must divide the number of ranks; "
        "it is 3. Start a multiple of 2 ranks."
    )


def test_virtual_stages_need_a_pipeline(refusal):
    assert "needs parallel.pipeline_size > 1" in refusal("sft", "parallel.virtual_pipeline_size=2")


def test_experts_need_a_model_that_has_them(refusal):
    line = refusal("sft", "parallel.expert_size=2", world_size=2)
    assert line == "parallel.expert_size=2: the model has no experts. Set it to 1."


def test_a_batch_must_be_a_multiple_of_the_data_parallel_size(refusal):
    line = refusal("sft", "sft.batch_size=9", world_size=2)
    assert line == (
        "sft.batch_size=9: must be a multiple of the data-parallel size 2. Use 8 or 10."
    )


def test_minibatches_must_divide_the_rollout(refusal):
    line = refusal("ppo", "rollout.batch_size=12", "ppo.minibatch_size=8")
    assert line.startswith("ppo.minibatch_size=8: must divide rollout.batch_size=12. Use 1, 2")


def test_an_interleaved_pipeline_needs_enough_sequences(refusal):
    line = refusal(
        "sft",
        "parallel.pipeline_size=2",
        "parallel.virtual_pipeline_size=2",
        "model.num_layers=4",
        "sft.batch_size=1",
        world_size=2,
    )
    assert "an interleaved pipeline of 2 stages needs at least 2" in line


def test_prompt_and_response_must_fit_the_positions(refusal):
    line = refusal("ppo", "rollout.max_response_tokens=2000")
    assert "rollout.max_response_tokens" in line
    assert "model.max_positions=2048; the sum is 2512" in line


def test_ppo_needs_random_samples(refusal):
    assert "ppo needs random samples" in refusal("ppo", "rollout.temperature=0")


def test_weights_of_the_sampler_need_both_log_probs(refusal):
    assert refusal("ppo", "ppo.tis_cap=2", "ppo.old_logprobs=sampler") == (
        "ppo.tis_cap=2: compares the trainer's log-probs with the sampler's; "
        "ppo.old_logprobs=sampler leaves only the latter. Set ppo.old_logprobs=trainer, or "
        "ppo.tis_cap=null."
    )


def test_ppo_needs_a_reward(refusal):
    assert refusal("ppo", "reward.source=[]").startswith("reward.source: ppo needs a reward;")


def test_a_run_directory_with_a_file_in_its_way(refusal, job_files):
    """Together with whatever else is wrong; `refusal` sees to it that nothing is written."""
    file = job_files / "sft.jsonl"
    for command in ("sft", "reward", "ppo", "evaluate", "generate"):
        assert refusal(command, f"run.dir={file / 'run'}") == (
            f"run.dir={file / 'run'}: must be a writable folder; {file} is not a folder. Use "
            "another folder."
        )


def test_a_config_file_that_is_not_there(refusal):
    assert refusal("sft", "--config", "/no.yaml").startswith("--config=/no.yaml: no such file.")


@pytest.mark.parametrize(
    ("text", "reason"), [("a: [", "not valid YAML"), ("- 1\n", "must be a mapping of sections")]
)
def test_a_config_file_that_is_no_mapping(refusal, tmp_path, text, reason):
    (tmp_path / "c.yaml").write_text(text)
    assert reason in refusal("sft", "--config", str(tmp_path / "c.yaml"))


def test_the_resolved_configuration_can_be_shown(capsys):
    assert main(["ppo", "--print-config", "macro.rule=sentence"]) == 0
    out = capsys.readouterr().out
    assert "rule: sentence" in out
    assert "gae_lambda: 0.95" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    expected = {"report": "RUN", "init": "--hf-path"}.get(command, "key=value")
    assert expected in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"marlhf {version('marlhf-mega')}\n"


@pytest.mark.parametrize(
    "arguments",
    [["plan", "--check"], ["doctor", "--check"], ["sft", "--check", "--dry-run"]],
)
def test_options_that_would_be_ignored_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "--check" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def sft(job_files, tmp_path):
    """Return the arguments of an sft job that can start."""
    return [
        *("sft", f"run.dir={tmp_path / 'run'}", f"data.train_path={job_files / 'sft.jsonl'}"),
        *(f"tokenizer.path={job_files / 'tok'}", "sft.batch_size=4", "sft.microbatch_size=2"),
    ]


def test_check_starts_nothing_and_ends_with_one_line(sft, job_files, tmp_path, capsys):
    assert main([*sft, "parallel.tensor_size=2", "--check", "--world-size", "4"]) == 0
    tokenizer = Tokenizer.load(job_files / "tok")
    rows = [json.loads(line) for line in (job_files / "sft.jsonl").read_text().splitlines()]
    # One end token each; prompts of plain text have nothing in front.
    tokens = [
        len(tokenizer.encode(row["prompt"])) + len(tokenizer.encode(row["response"])) + 1
        for row in rows
    ]
    assert capsys.readouterr().out == (
        "ok: sft on TP2 x PP1 x DP2 (4 ranks); 16 rows, 0 held out; 4 steps of 4 rows; "
        f"{sum(tokens):,} tokens, longest {max(tokens)}\n"
    )
    assert not (tmp_path / "run").exists()
    assert main([*sft, "data.train_path=/nowhere.jsonl", "--check"]) == 2


def test_a_check_shows_the_configuration_if_asked(sft, capsys):
    assert main([*sft, "--check", "--print-config"]) == 0
    *tree, last = capsys.readouterr().out.splitlines()
    assert "  batch_size: 4" in tree
    assert last.startswith("ok: sft on TP1 x PP1 x DP1 (1 rank); ")


@pytest.mark.parametrize(
    ("command", "data", "more", "said"),
    [
        (
            "reward",
            "pairs",
            ["reward_model.batch_size=8"],
            "; 16 rows, 16 held out; 2 steps of 8 rows; ",
        ),
        (
            "preference",
            "pairs",
            ["preference.batch_size=8"],
            "; 16 rows, 16 held out; 2 steps of 8 rows; ",
        ),
        (
            "ppo",
            "prompts",
            [
                *("rollout.batch_size=8", "ppo.minibatch_size=8", "rollout.samples_per_prompt=2"),
                *("rollout.ranks=1", "--world-size", "2", *GOLD),
            ],
            "TP1 x PP1 x DP1 (2 ranks, 1 of them generate); 16 rows, 16 held out; 4 steps of 4 rows;",
        ),
        (
            "offline",
            "offline",
            ["offline.batch_size=4", *GOLD],
            "; one pass in steps of 4 rows; ",
        ),
        ("evaluate", "prompts", [], "ok: evaluate on TP1 x PP1 x DP1 (1 rank); 16 rows; "),
    ],
)
def test_every_job_says_what_it_would_do(job_files, tmp_path, capsys, command, data, more, said):
    write_jsonl(
        job_files / "offline.jsonl",
        [row | {"reward": 1.0} for row in toy.generate_sft(0, 16)],
    )
    held_out = "prompts" if command == "offline" else data
    paths = [
        f"data.train_path={job_files / data}.jsonl",
        f"data.validation_path={job_files / held_out}.jsonl",
        f"tokenizer.path={job_files / 'tok'}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert main([command, *paths, *more, "--check"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line
    assert re.search(r"; [\d,]+ (prompt )?tokens, longest \d+$", line)


def test_a_check_warns_of_keys_without_effect(sft, caplog):
    assert main([*sft, "policy.min_lr=1e-6", "policy.warmup_steps=4", "--check"]) == 0
    assert caplog.messages == [
        "without effect: policy.min_lr=1e-06 with policy.lr_schedule=constant; "
        "policy.lr=1e-05 with a warm-up of 4 steps, of 4 in the run"
    ]


TOOLS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tools").glob("**/*.py")
    if "ArgumentParser(" in path.read_text() and "__main__" in path.read_text()
)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / tool).parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: {Path(tool).name}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\b", shown, re.MULTILINE) for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (None, 0),
        (EarlyEndError(75, "pre-empted"), 75),
        (EarlyEndError(76, "no progress"), 76),
        (ConfigError("ppo.epochs=3: must be as in the checkpoint, 2."), 2),
    ],
)
def test_codes_that_all_ranks_end_with_are_left_for_the_launcher(
    tmp_path, monkeypatch, capsys, end, code
):
    def work(mesh, watchdog):
        if end is not None:
            raise end

    file = tmp_path / "code"
    file.touch()
    config = Config.model_validate({"run": {"dir": tmp_path / "run"}})
    job = PreparedJob(config=config, work=work, num_rollout_ranks=0, saves=False)
    monkeypatch.setattr(cli, "_prepare", lambda options: job)
    assert main(["sft"]) == code
    assert capsys.readouterr().err == (f"{end}\n" if code == 2 else "")
    monkeypatch.setenv("MARLHF_EXIT_CODE_FILE", str(file))
    assert main(["sft"]) == 0
    assert file.read_text() == (f"{code}\n" if code else "")


def test_a_job_that_fails_amid_collectives_ends_with_1(tmp_path):
    """Ending Python around gloo's threads would abort this process nearly every time."""
    file = tmp_path / "code"
    file.touch()
    program = """
import torch
import torch.distributed as dist
from marlhf_mega import cli
from marlhf_mega.config.schema import Config
from marlhf_mega.jobs import PreparedJob

def fail(mesh, watchdog):
    for _ in range(10_000):
        dist.broadcast(torch.ones(20_000), 0, async_op=True)
    raise OSError("the reason")

cli._prepare = lambda options: PreparedJob(
    config=Config.model_validate({"run": {"dir": "RUN_DIR"}}), work=fail, num_rollout_ranks=0, saves=False)
cli.main(["sft"])
""".replace("RUN_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | {"MARLHF_EXIT_CODE_FILE": str(file)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert file.read_text() == ""  # the launcher is to start it again
    assert "rank 0 failed: the reason\n" in done.stderr
    assert "Traceback" in done.stderr
