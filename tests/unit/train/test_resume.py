"""Which settings may change between a checkpoint and the run that goes on from it."""

import pytest

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.train.resume import check_settings, settings_of

SAVED = settings_of(Config())


def changed(**sections):
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"seed": 7}}, "run.seed=7: must be as in the checkpoint, 1234"),
        ({"macro": {"n": 3}}, "macro.n=3: must be as in the checkpoint, 5"),
        ({"ppo": {"clip_range": 0.1}}, "ppo.clip_range=0.1: must be as in the checkpoint, 0.2"),
        ({"policy": {"lr": 2e-5}}, "policy.lr=2e-05: must be as in the checkpoint, 1e-05"),
    ],
)
def test_a_setting_that_matters_is_refused_by_name_with_both_values(sections, message):
    with pytest.raises(ConfigError, match="must be as in the checkpoint") as caught:
        check_settings(SAVED, changed(**sections), "ppo")
    assert str(caught.value) == (
        f"{message}. Set it back, name it in checkpoint.allow_changed, or use another run.dir."
    )


def test_answers_of_other_settings_are_refused_but_not_for_the_batch_size():
    check_settings(SAVED, changed(rollout={"batch_size": 8}, policy={"lr": 1.0}), "generate")
    with pytest.raises(ConfigError, match="rollout.top_k=7: must be as in the answers that are"):
        check_settings(SAVED, changed(rollout={"top_k": 7, "batch_size": 8}), "generate")


def test_how_it_is_computed_may_change():
    config = changed(
        run={"steps": 9, "dir": "elsewhere", "name": "other"},
        parallel={"tensor_size": 2},
        data={"train_path": "moved.jsonl"},
        rollout={"pipeline_size": 1, "slots": 4},
        ppo={"microbatch_size": 1},
        evaluate={"interval": 3},
        checkpoint={"interval": 3},
        logging={"samples": 0},
    )
    check_settings(SAVED, config, "ppo")


def test_settings_of_other_jobs_do_not_matter():
    check_settings(SAVED, changed(macro={"n": 3}), "sft")


@pytest.mark.parametrize("allowed", ["policy.lr", "policy"])
def test_a_change_that_is_allowed_by_name_is_made(allowed):
    config = changed(policy={"lr": 1.0}, checkpoint={"allow_changed": [allowed]})
    check_settings(SAVED, config, "ppo")
