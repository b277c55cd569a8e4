"""Models that do not fit are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.lora import LoraConfig
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


def lora_run(path, base="sft", rank=4, **lora):
    adapters = LoraConfig.model_validate({"rank": rank} | lora)
    return replace(origin(path), lora=adapters, base=base and origin(base))


SHARED = {
    "model": {"num_layers": 4, "lora": {"rank": 4}},
    "critic": {"share_base": True},
    "reward": {"source": "rm", "share_base": True},
}


def check_shared(monkeypatch, rewards, keys=(), start="sft"):
    monkeypatch.setattr(origins, "policy_origin", lambda *_: start and origin(start))
    monkeypatch.setattr(origins, "reward_origins", lambda *_: rewards)
    config = with_keys(Config.model_validate(SHARED), dict(keys))
    origins.check_origins(config, "ppo", None, 8)


def test_models_share_the_base_that_all_began_from(monkeypatch, tmp_path):
    check_shared(monkeypatch, [lora_run("rm")])
    check_shared(monkeypatch, [lora_run("rm", base=None)], start=None)
    # A link and a path with detours are the same folder.
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    names = f"{tmp_path}/x/../sft", f"{tmp_path}/link"
    check_shared(monkeypatch, [lora_run("rm", base=names[0])], start=names[1])
    # A critic with new adapters does not care what those of the reward model are like.
    check_shared(monkeypatch, [lora_run("rm", rank=8)], keys={"critic.init": "policy"})


@pytest.mark.parametrize(
    ("reward", "keys", "line"),
    [
        (
            origin("rm"),
            {},
            "reward.source=rm: must be adapters on the policy's base, with reward.share_base=true; "
            "all its weights are its own. Train it with model.lora.rank, or set reward.share_base "
            "to false.",
        ),
        (
            lora_run("rm", base="/pretrained"),
            {"reward.share_base": False},
            "critic.init=rm: must be adapters on the policy's base, with critic.share_base=true; "
            "they are on /pretrained, and the policy begins from /sft. Begin both from the same "
            "model, or set critic.share_base to false.",
        ),
        (
            lora_run("rm", base=None),
            {"critic.init": "policy"},
            "reward.source=rm: must be adapters on the policy's base, with reward.share_base=true; "
            "they are on random weights, and the policy begins from /sft. Begin both from the same "
            "model, or set reward.share_base to false.",
        ),
        (
            lora_run("rm", base="/sft", rank=8),
            {},
            "model.lora.rank=4: must be that of rm, 8, whose adapters the critic goes on from with "
            "critic.share_base=true. Set it, or use critic.init=policy.",
        ),
        (
            lora_run("rm", base="/sft", targets=["q_proj", "o_proj"]),
            {},
            "model.lora.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]: must be "
            "that of rm, [q_proj,o_proj], whose adapters the critic goes on from with "
            "critic.share_base=true. Set it, or use critic.init=policy.",
        ),
        (
            lora_run("rm", base="/sft", alpha=4),
            {},
            "model.lora.alpha=8: must be that of rm, 4, whose adapters the critic goes on from "
            "with critic.share_base=true. Set it, or use critic.init=policy.",
        ),
    ],
)
def test_a_model_on_another_base_is_refused(monkeypatch, reward, keys, line):
    with pytest.raises(ValueError, match="must be") as caught:
        check_shared(monkeypatch, [reward], keys, start="/sft")
    assert str(caught.value) == line
