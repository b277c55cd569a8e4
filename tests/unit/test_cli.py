"""Wrong usage: one line, exit code 2, nothing started and nothing written."""

import json
import os
import subprocess
import sys

import pytest

from marlhf_mega import cli
from marlhf_mega.cli import run
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.train.quickstart import JOBS, _stage, quickstart_inputs
from marlhf_mega.train.resume import settings_of
from marlhf_mega.train.stop import EarlyEndError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    train_tokenizer(toy.tokenizer_text(1, 300), folder / "other_tok", vocab_size=390)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 16))
    write_jsonl(folder / "pairs.jsonl", toy.generate_preferences(0, 16))
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 16))
    return folder


@pytest.fixture
def call(files, tmp_path, capsys, monkeypatch):
    """Run a command that must be refused; return its line on stderr."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run_dir = tmp_path / "run"

    def refuse(command, *overrides, world_size=1, num_lines=1):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        data = {"sft": "sft", "reward": "pairs"}.get(command, "prompts")
        defaults = [
            f"run.dir={run_dir}",
            f"tokenizer.path={files / 'tok'}",
            f"data.train_path={files / data}.jsonl",
            f"data.validation_path={files / data}.jsonl",
        ]
        if command == "ppo":
            defaults.append("reward.source=marlhf_mega.data.toy:gold_reward")
        assert run([command, *defaults, *overrides]) == 2
        assert not run_dir.exists()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == num_lines, captured.err
        return captured.err.strip()

    return refuse


def test_an_unknown_key_names_the_nearest(call):
    assert call("ppo", "ppo.epoch=2") == "ppo.epoch: unknown key. Did you mean ppo.epochs?"


def test_an_unknown_key_names_its_twins_in_other_sections(call):
    twins = "policy.lr or critic.lr or reward_model.lr"
    assert call("ppo", "ppo.lr=1") == f"ppo.lr: unknown key. Did you mean {twins}?"
    assert call("ppo", "epochs=2") == "epochs: unknown key. Did you mean ppo.epochs?"


def test_lengths_of_macro_actions_that_leave_none_are_refused(call):
    assert call("ppo", "macro.min_length=9", "macro.max_length=3") == (
        "macro.max_length=3: must be at least macro.min_length=9. Raise it, or lower "
        "macro.min_length."
    )


def test_a_check_is_for_as_many_ranks_as_asked(files, tmp_path, capsys):
    arguments = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train_path={files / 'sft.jsonl'}"]
    arguments += [f"tokenizer.path={files / 'tok'}", "parallel.tensor_size=2", "--check"]
    assert run(arguments) == 2
    assert "the number of ranks; it is 1" in capsys.readouterr().err
    assert run([*arguments, "--world-size", "2"]) == 0
    capsys.readouterr()
    assert run([*arguments, "--world-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("--world-size=0: must be above 0.")
    assert run([*arguments[:-1], "--world-size", "2"]) == 2
    assert capsys.readouterr().err.startswith("--world-size=2: is for --dry-run and --check; ")
    assert not (tmp_path / "run").exists()


def test_a_wrong_value_is_shown(call):
    assert call("ppo", "ppo.epochs=many").startswith("ppo.epochs=many: input should be")


def test_an_override_needs_an_equals_sign(call):
    line = "ppo.epochs: an override is key=value. Write for example run.seed=1."
    assert call("ppo", "ppo.epochs") == line


def test_settings_may_stand_before_and_after_options(capsys):
    assert run(["ppo", "ppo.gamma=0.5", "--print-config", "ppo.gae_lambda=0.25"]) == 0
    shown = capsys.readouterr().out
    assert "  gamma: 0.5\n" in shown
    assert "  gae_lambda: 0.25\n" in shown


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["ppo", "--nope", "ppo.gamma=0.5"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


def test_the_tensor_size_must_divide_the_heads(call):
    line = call("sft", "parallel.tensor_size=3", "model.ffn_hidden_size=384", world_size=3)
    assert "must divide model.num_attention_heads=4. Use 1, 2 or 4." in line.replace("\n", " ")


def test_the_pipeline_size_must_divide_the_layers(call):
    line = call("sft", "parallel.pipeline_size=4", world_size=4)
    assert "must divide model.num_layers=2" in line


def test_the_layout_must_divide_the_world(call):
    line = call("sft", "parallel.tensor_size=2", world_size=3)
    assert line == (
        "parallel: tensor_size * pipeline_size * context_size = 2 must divide the number of ranks; "
        "it is 3. Start a multiple of 2 ranks."
    )


def test_virtual_stages_need_a_pipeline(call):
    assert "needs parallel.pipeline_size > 1" in call("sft", "parallel.virtual_pipeline_size=2")


def test_experts_need_a_model_that_has_them(call):
    line = call("sft", "parallel.expert_size=2", world_size=2)
    assert line == "parallel.expert_size=2: the model has no experts. Set it to 1."


def test_a_model_that_could_not_be_exported_is_refused_before_it_is_trained(call):
    line, what = call("sft", "model.qkv_bias=true", num_lines=2).splitlines()
    assert line == (
        "model.qkv_bias=True: model.architecture=llama of Hugging Face always has False. Change "
        "one of them."
    )
    assert what.startswith("checkpoint.export_hf=true: writes such a folder at the end of the run.")


def test_fp8_says_what_is_missing(call):
    line = call("sft", "precision.fp8=hybrid")
    assert line.startswith("precision.fp8=hybrid: cannot be used here; there is no CUDA device")


def test_cuda_graphs_need_a_gpu(call):
    line = call("ppo", "rollout.cuda_graphs=true")
    assert line == "rollout.cuda_graphs=true: needs a CUDA device; there is none. Set it to false."


def test_a_batch_must_be_a_multiple_of_the_data_parallel_size(call):
    line = call("sft", "sft.batch_size=9", world_size=2)
    assert line == (
        "sft.batch_size=9: must be a multiple of the data-parallel size 2. Use 8 or 10."
    )


def test_minibatches_must_divide_the_rollout(call):
    line = call("ppo", "rollout.batch_size=12", "ppo.minibatch_size=8")
    assert line.startswith("ppo.minibatch_size=8: must divide rollout.batch_size=12. Use 1, 2")


def test_an_interleaved_pipeline_needs_enough_sequences(call):
    line = call(
        "sft",
        "parallel.pipeline_size=2",
        "parallel.virtual_pipeline_size=2",
        "model.num_layers=4",
        "sft.batch_size=1",
        world_size=2,
    )
    assert "an interleaved pipeline of 2 stages needs at least 2" in line


def test_prompt_and_response_must_fit_the_positions(call):
    line = call("ppo", "rollout.max_response_tokens=2000")
    assert "rollout.max_response_tokens" in line
    assert "model.max_positions=2048; the sum is 2512" in line


def test_ppo_needs_random_samples(call):
    assert "ppo needs random samples" in call("ppo", "rollout.temperature=0")


def test_weights_of_the_sampler_need_both_log_probs(call):
    assert call("ppo", "ppo.sampler_cap=2", "ppo.old_logprobs=sampler") == (
        "ppo.sampler_cap=2.0: needs the trainer's log-probs beside the sampler's. Set "
        "ppo.old_logprobs=trainer, or ppo.sampler_cap=null."
    )


def test_ppo_needs_a_reward(call):
    assert call("ppo", "reward.source=[]").startswith("reward.source: ppo needs a reward.")


def test_a_run_directory_with_a_file_in_its_way(call, files):
    """Together with whatever else is wrong; `call` sees to it that nothing is written."""
    file = files / "sft.jsonl"
    for command in ("sft", "reward", "ppo", "evaluate", "generate"):
        assert call(command, f"run.dir={file / 'run'}") == (
            f"run.dir={file / 'run'}: must be a folder that can be written to; {file} is not a "
            "folder. Use another folder."
        )


def test_a_path_that_the_system_refuses(call):
    name = "x" * 300 + ".jsonl"
    line = f"{name}: cannot be used; File name too long. Mend it or use another path."
    assert call("sft", f"data.train_path={name}") == line


def test_a_missing_data_file(call):
    line = "data.train_path=/nowhere.jsonl: no such file. Give a .jsonl or .parquet file."
    assert call("sft", "data.train_path=/nowhere.jsonl") == line


def test_an_empty_data_file(call, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    line = call("sft", f"data.train_path={tmp_path / 'empty.jsonl'}")
    assert line.endswith("must hold at least one row; the file is empty. Add rows.")


@pytest.mark.parametrize(
    ("text", "reason"), [("{oops\n", ":2: "), ('{"prompt": "a"}\n', ":2: response: ")]
)
def test_a_bad_row_is_named_by_file_and_line(call, tmp_path, text, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + text)
    assert f"{path}{reason}" in call("sft", f"data.train_path={path}")


def test_a_prompt_longer_than_the_limit(call):
    line = call("sft", "data.max_prompt_tokens=4")
    assert line.startswith("data.max_prompt_tokens=4: must hold every prompt; row 1 of ")


def test_a_reward_function_that_cannot_be_imported(call):
    line = call("ppo", "reward.source=marlhf_mega.data.toy:silver")
    assert line.startswith("reward.source=marlhf_mega.data.toy:silver: must name a function")


@pytest.mark.parametrize("command", ["ppo", "evaluate"])
def test_a_gold_rule_that_cannot_be_imported(call, command):
    assert call(command, "evaluate.gold=no.module:at_all").startswith("evaluate.gold=no.module")


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_rule_that_cannot_be_imported_is_refused_without_training_too(call, command):
    line = call(command, "reward.source=no.module:at_all")
    assert line.startswith("reward.source=no.module:at_all: must name a function")


def test_a_parser_that_cannot_be_imported(call):
    line = call("ppo", "macro.rule=parsing", "macro.parser=nothing:here")
    assert line.startswith("macro.parser=nothing:here: must be `rules`, `python`")


def test_a_vocabulary_smaller_than_the_tokenizer(call):
    line = call("sft", "model.vocab_size=100")
    assert line.startswith("model.vocab_size=100: must hold the tokenizer's 400 tokens.")


def test_no_tokenizer(call):
    assert call("sft", "tokenizer.path=null").startswith("tokenizer.path: must be set unless")


def test_a_tokenizer_that_is_not_there(call):
    assert call("sft", "tokenizer.path=/nowhere").startswith("tokenizer.path=/nowhere: must exist")


@pytest.mark.parametrize("key", ["model.init", "reward.source", "critic.init"])
def test_a_model_that_is_not_there(call, key):
    line = call("ppo", f"{key}=/nowhere")
    assert line.startswith(f"{key}=/nowhere: must be a run directory or a Hugging Face folder")


def _run_folder(path, tokenizer_fingerprint):
    (path / "checkpoints" / "step_000001").mkdir(parents=True)
    model = {"num_layers": 2, "vocab_size": 400}
    config = {"model": model, "tokenizer_fingerprint": tokenizer_fingerprint}
    (path / "config.yaml").write_text(json.dumps(config))
    return path


def test_a_run_that_is_given_as_a_hugging_face_folder(call, tmp_path):
    """Its weights would not be loaded, and nothing would say so."""
    folder = _run_folder(tmp_path / "sft", "x")
    assert call("sft", f"model.hf_path={folder}") == (
        f"model.hf_path={folder}: must be a Hugging Face folder; it is a run directory. Set "
        f"model.init={folder} instead."
    )


def test_a_run_without_a_checkpoint(call, tmp_path):
    folder = _run_folder(tmp_path / "rm", "x")
    (folder / "checkpoints" / "step_000001").rmdir()
    assert "the run has no checkpoint" in call("ppo", f"reward.source={folder}")


def test_a_reward_model_with_another_tokenizer(call, tmp_path):
    folder = _run_folder(tmp_path / "rm", "another")
    line = call("ppo", f"reward.source={folder}")
    assert "must have been trained with the tokenizer of this run" in line


def test_a_config_file_that_is_not_there(call):
    assert call("sft", "--config", "/no.yaml").startswith("--config=/no.yaml: no such file.")


@pytest.mark.parametrize(
    ("text", "reason"), [("a: [", "not valid YAML"), ("- 1\n", "must be a mapping of sections")]
)
def test_a_config_file_that_is_no_mapping(call, tmp_path, text, reason):
    (tmp_path / "c.yaml").write_text(text)
    assert reason in call("sft", "--config", str(tmp_path / "c.yaml"))


def test_the_resolved_configuration_can_be_shown(capsys):
    assert run(["ppo", "--print-config", "macro.rule=sentence"]) == 0
    out = capsys.readouterr().out
    assert "rule: sentence" in out
    assert "gae_lambda: 0.95" in out


@pytest.mark.parametrize("command", ["quickstart", "sft", "reward", "ppo", "evaluate"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert stop.value.code == 0
    assert "key=value" in capsys.readouterr().out


def test_quickstart_refuses_what_it_decides_itself(capsys):
    assert run(["quickstart", "data.train_path=x"]) == 2
    assert capsys.readouterr().err.startswith("data: quickstart makes its own data")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.batch_size=100", "ppo.minibatch_size=64: must divide rollout.batch_size=100."),
        ("rollout.max_response_tokens=60", "rollout.max_response_tokens: with data.max_prompt"),
        ("evaluate.gold=no:at_all", "evaluate.gold=no:at_all: must name a function"),
        ("critic.init=/nowhere", "critic.init=/nowhere: must be a run directory or a Hugging"),
        ("rollout.cuda_graphs=true", "rollout.cuda_graphs=true: needs a CUDA device"),
        ("run.dir=/dev/null/run", "run.dir=/dev/null/run: must be a folder that can be written"),
    ],
)
def test_the_quickstart_refuses_at_once_what_its_last_job_would(capsys, override, line):
    assert run(["quickstart", override]) == 2
    assert capsys.readouterr().err.startswith(line)


def test_the_quickstart_parks_idle_models_in_ppo_only(tmp_path):
    memory = {"offload_idle": True, "offload_optimizer": True}
    user = Config.model_validate({"run": {"dir": tmp_path}, "memory": memory})
    config = quickstart_inputs(user, 1).config
    parks = {job: _stage(config, job).memory.offload_idle for job in JOBS}
    assert parks == {"sft": False, "reward": False, "ppo": True}


def test_the_quickstart_runs_all_jobs_on_the_same_ranks(capsys):
    assert run(["quickstart", "rollout.ranks=1"]) == 2
    assert capsys.readouterr().err.startswith("rollout.ranks=1: quickstart runs all its jobs on")


@pytest.mark.parametrize(
    "arguments",
    [["plan", "--check"], ["doctor", "--check"], ["sft", "--check", "--dry-run"]],
)
def test_options_that_would_be_ignored_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    assert "--check" in capsys.readouterr().err.splitlines()[-1]


def test_check_starts_nothing_and_shows_what_was_checked(files, tmp_path, capsys):
    arguments = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train_path={files / 'sft.jsonl'}"]
    arguments += [f"tokenizer.path={files / 'tok'}", "model.vocab_size=400", "--check"]
    assert run(arguments) == 0
    assert "vocab_size: 400" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert run([*arguments[:-1], "data.train_path=/nowhere.jsonl", "--check"]) == 2


def test_a_check_knows_the_answers_that_are_there(files, tmp_path, capsys):
    noted = {"config": settings_of(Config()), "data_hash": "another"}
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "settings.json").write_text(json.dumps(noted))
    arguments = ["generate", f"run.dir={tmp_path}", f"data.validation_path={files}/prompts.jsonl"]
    arguments += [f"tokenizer.path={files / 'tok'}", "--check"]
    allowed = "checkpoint.allow_changed=[model,data,tokenizer]"
    assert run([*arguments, "rollout.top_k=7", allowed]) == 2
    assert capsys.readouterr().err.startswith("rollout.top_k=7: must be as in the answers that are")
    assert run([*arguments, allowed]) == 2
    assert "the prompts of the answers that are there, sha256 another; " in capsys.readouterr().err
    assert run([*arguments, "checkpoint.resume=never"]) == 0


def test_held_out_responses_without_a_score_are_counted_in_a_warning(files, tmp_path, caplog):
    """Also where none is left, so that no mean is shown."""
    arguments = ["evaluate", f"run.dir={tmp_path}", f"data.validation_path={files}/prompts.jsonl"]
    arguments += [f"tokenizer.path={files / 'tok'}", "evaluate.gold=json:dumps"]
    assert run([*arguments, "evaluate.num_prompts=2", "rollout.max_response_tokens=4"]) == 0
    assert "2 of 2 held-out responses have no gold score: " in caplog.text
    assert "TypeError" in caplog.text


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
    def work(mesh):
        if end is not None:
            raise end

    file = tmp_path / "code"
    file.touch()
    assert cli._on_mesh(Config(), work, 0) == code
    assert capsys.readouterr().err == (f"{end}\n" if code == 2 else "")
    monkeypatch.setenv("MARLHF_EXIT_CODE_FILE", str(file))
    assert cli._on_mesh(Config(), work, 0) == 0
    assert file.read_text() == (f"{code}\n" if code else "")


def test_a_job_that_fails_amid_collectives_ends_with_1(tmp_path):
    """Ending Python around gloo's threads would abort this process nearly every time."""
    file = tmp_path / "code"
    file.touch()
    program = """
import torch
import torch.distributed as dist
from marlhf_mega import cli

def fail(mesh):
    for _ in range(10_000):
        dist.broadcast(torch.ones(20_000), 0, async_op=True)
    raise OSError("the reason")

cli._prepare = lambda command, config, ranks: lambda: cli._on_mesh(config, fail, 0)
cli.main(["sft"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | {"MARLHF_EXIT_CODE_FILE": str(file)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert file.read_text() == ""  # the launcher is to start it again
    assert "rank 0 failed: the reason\n" in done.stderr
    assert "Traceback" in done.stderr
