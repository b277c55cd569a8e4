"""How many optimizer steps the schedules are made for, by hand; models that do not fit."""

from pathlib import Path

import pytest

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import Origin
from marlhf_mega.config.schema import Config
from marlhf_mega.train import build
from marlhf_mega.train.build import optimizer_steps


@pytest.mark.parametrize(("resting", "policy"), [(0, 60), (4, 36), (20, 0)])
def test_the_policy_takes_no_steps_while_the_critic_warms_up(resting, policy):
    config = Config.model_validate(
        {
            "rollout": {"batch_size": 24},
            "ppo": {"epochs": 2, "minibatch_size": 8},
            "critic": {"warmup_ppo_steps": resting},
        }
    )
    # 10 PPO steps of 2 epochs of 3 minibatches.
    assert optimizer_steps(config, 10) == {"policy": policy, "critic": 60}


def origin(path, **shape):
    model = ModelConfig.model_validate({"num_layers": 4} | shape)
    return Origin(path=Path(path), is_run=True, model=model, tokenizer_fingerprint=None)


@pytest.mark.parametrize(
    ("key", "theirs", "message"),
    [
        (
            "reward.source=rm",
            {"num_layers": 6},
            "parallel.pipeline_size=4 times virtual_pipeline_size=1: must divide "
            "model.num_layers=6. Use a product among 1, 2, 3 or 6.",
        ),
        (
            "critic.init=vf",
            {"num_attention_heads": 1},
            "parallel.tensor_size=2: must divide model.num_attention_heads=1. Use 1.",
        ),
    ],
)
def test_a_model_of_another_shape_must_fit_the_layout_too(monkeypatch, key, theirs, message):
    """Layers that no stage takes would be left out without a word."""
    shapes = {"reward.source=rm": {}, "critic.init=vf": {}} | {key: theirs}
    monkeypatch.setattr(
        build, "reward_origins", lambda *_: [origin("rm", **shapes["reward.source=rm"])]
    )
    monkeypatch.setattr(
        build, "origin_of", lambda *_, **__: origin("vf", **shapes["critic.init=vf"])
    )
    config = Config.model_validate(
        {
            "model": {"num_layers": 4},
            "parallel": {"tensor_size": 2, "pipeline_size": 4},
            "critic": {"init": "vf"},
        }
    )
    with pytest.raises(ConfigError) as caught:
        build.check_scalar_models(config, None, 8, critic=True)
    assert str(caught.value) == f"{key}: {message}"
    if key.startswith("critic"):
        build.check_scalar_models(config, None, 8, critic=False)
