"""What `marlhf quickstart` decides itself, and what it refuses before its first job."""

import pytest

from marlhf_mega.cli import main
from marlhf_mega.commands.quickstart import JOBS, _stage, quickstart_inputs
from marlhf_mega.config.schema import Config


def test_quickstart_refuses_what_it_decides_itself(capsys):
    assert main(["quickstart", "data.train_path=x"]) == 2
    assert capsys.readouterr().err.startswith("data: quickstart makes its own data")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.batch_size=100", "ppo.minibatch_size=64: must divide rollout.batch_size=100."),
        ("rollout.max_response_tokens=60", "rollout.max_response_tokens: with data.max_prompt"),
        ("evaluate.gold=no:at_all", "evaluate.gold=no:at_all: must name a function"),
        ("critic.init=/nowhere", "critic.init=/nowhere: must be a run directory or a Hugging"),
        ("rollout.cuda_graphs=true", "rollout.cuda_graphs=true: needs a CUDA device"),
        ("run.dir=/dev/null/run", "run.dir=/dev/null/run: must be a writable folder"),
    ],
)
def test_the_quickstart_refuses_at_once_what_its_last_job_would(capsys, override, line):
    assert main(["quickstart", override]) == 2
    assert capsys.readouterr().err.startswith(line)


def test_the_quickstart_parks_idle_models_in_ppo_only(tmp_path):
    memory = {"offload_idle": True, "offload_optimizer": True}
    user = Config.model_validate({"run": {"dir": tmp_path}, "memory": memory})
    config = quickstart_inputs(user, 1).config
    parks = {job: _stage(config, job).memory.offload_idle for job in JOBS}
    assert parks == {"sft": False, "reward": False, "ppo": True}


def test_the_quickstart_sets_no_critic_where_there_is_none(tmp_path):
    sections = {"ppo": {"estimator": "grpo"}, "rollout": {"samples_per_prompt": 4}}
    user = Config.model_validate({"run": {"dir": tmp_path}, **sections})
    assert quickstart_inputs(user, 1).config.critic == Config().critic


def test_the_quickstart_runs_all_jobs_on_the_same_ranks(capsys):
    assert main(["quickstart", "rollout.ranks=1"]) == 2
    assert capsys.readouterr().err.startswith("rollout.ranks=1: quickstart runs all its jobs on")
