"""Models that do not fit are refused."""

from pathlib import Path

import pytest

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import Origin
from marlhf_mega.config.schema import Config
from marlhf_mega.train import origins


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
            "model.num_layers=6. Change one of them to make the product 1, 2, 3 or 6.",
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
        origins, "reward_origins", lambda *_: [origin("rm", **shapes["reward.source=rm"])]
    )
    monkeypatch.setattr(
        origins, "origin_of", lambda *_, **__: origin("vf", **shapes["critic.init=vf"])
    )
    config = Config.model_validate(
        {
            "model": {"num_layers": 4},
            "parallel": {"tensor_size": 2, "pipeline_size": 4},
            "critic": {"init": "vf"},
            "reward": {"source": "rm"},
        }
    )
    with pytest.raises(ConfigError) as caught:
        origins.check_origins(config, "ppo", None, 8)
    assert str(caught.value) == f"{key}: {message}"
    if key.startswith("critic"):
        origins.check_origins(config, "evaluate", None, 8)


@pytest.mark.parametrize(
    ("reward", "roles", "line"),
    [
        (
            {"source": {"source": "rm", "template": "{response}?", "answers": ["Yes", "No"]}},
            {"reward"},
            "reward.source=rm: must be a language model, for its log-probs; it is a reward model. "
            "Use another model.",
        ),
        (
            {"source": "a:b", "constraints": {"source": "rm", "threshold": 0}},
            {"policy"},
            "reward.constraints=rm: must be a reward model; it is a language model. Train one from "
            "it with `marlhf reward`.",
        ),
    ],
)
def test_a_judge_is_a_model_of_its_kind(monkeypatch, reward, roles, line):
    monkeypatch.setattr(origins, "origin_of", lambda path, *_, **__: origin(path))
    monkeypatch.setattr(origins, "roles_of", lambda *_, **__: roles)
    with pytest.raises(ValueError, match="must be a") as caught:
        origins.reward_origins(Config.model_validate({"reward": reward}), None)
    assert str(caught.value) == line


def test_the_critic_starts_from_the_first_source_that_is_a_reward_model(monkeypatch):
    """Neither from a language model that answers, nor from a constraint."""
    monkeypatch.setattr(origins, "policy_origin", lambda *_: origin("policy"))
    asked = {"source": "lm", "template": "{response}?", "answers": ["Yes", "No"]}
    rewards = [origin(path) for path in ("lm", "rm", "judge")]
    judge = {"source": "judge", "threshold": 0}
    for source, start in (([asked, {"source": "rm"}], "rm"), ([asked], "policy")):
        reward = {"source": source, "constraints": judge}
        config = Config.model_validate({"reward": reward})
        found = origins.critic_origin(config, None, rewards)
        assert found is not None
        assert found.path == Path(start)
