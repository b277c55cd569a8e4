"""Values that a configuration derives from its keys."""

import pytest
from pydantic import ValidationError

from marlhf_mega.config.schema import Config, WatchdogConfig

LIMITS = WatchdogConfig(seconds=60, update_seconds=5)


def test_a_phase_without_a_limit_of_its_own_has_the_common_one():
    assert LIMITS.limit_of("update") == ("watchdog.update_seconds", 5)
    assert LIMITS.limit_of("rollout") == ("watchdog.seconds", 60)
    assert LIMITS.limit_of("between phases") == ("watchdog.seconds", 60)


def test_collectives_wait_longer_than_the_longest_phase():
    assert LIMITS.collective_seconds == 1860
    assert WatchdogConfig(rollout_seconds=7200).collective_seconds == 7260
    no_limit = WatchdogConfig(seconds=None, rollout_seconds=7200)
    assert no_limit.collective_seconds > 365 * 24 * 3600


def test_a_preset_sets_its_keys_and_a_dumped_configuration_is_the_same():
    config = Config.model_validate({"macro": {"compat": "ma_rlhf"}, "ppo": {"epochs": 2}})
    assert (config.macro.reward, config.ppo.whiten_advantages) == ("mean", False)
    assert config.ppo.epochs == 2
    assert Config.model_validate(config.model_dump()) == config
    plain = Config()
    assert (plain.macro.reward, plain.ppo.whiten_advantages) == ("sum", True)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"macro": {"reward": "sum"}}, "macro.reward=sum: must be mean"),
        ({"ppo": {"whiten_advantages": True}}, "ppo.whiten_advantages=true: must be false"),
    ],
)
def test_a_key_that_a_preset_decides_is_refused_where_it_differs(sections, line):
    macro = {"compat": "ma_rlhf"} | sections.pop("macro", {})
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"macro": macro} | sections)
    assert (
        f"{line} with macro.compat=ma_rlhf, which reproduces the released code. "
        "Remove one of the two."
    ) in str(caught.value)


def test_two_ways_to_say_the_warm_up_are_refused():
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"critic": {"warmup_steps": 3, "warmup_ratio": 0.1}})
    assert (
        "critic.warmup_ratio=0.1: replaces warmup_steps, which is 3. Remove one of the two."
    ) in str(caught.value)


def test_start_up_has_no_less_time_than_a_save():
    """It may read a checkpoint."""
    assert LIMITS.limit_of("start-up") == ("watchdog.seconds", 60)
    longer = WatchdogConfig(seconds=60, checkpoint_seconds=90)
    assert longer.limit_of("start-up") == ("watchdog.checkpoint_seconds", 90)
    shorter = WatchdogConfig(seconds=60, checkpoint_seconds=30)
    assert shorter.limit_of("start-up") == ("watchdog.seconds", 60)
    assert WatchdogConfig(seconds=None, checkpoint_seconds=30).limit_of("start-up")[1] is None


@pytest.mark.parametrize(
    "term",
    [{"source": "a:b"}, {"source": "http://host/x"}, {"source": "rm", "template": "{response}"}],
)
def test_only_a_model_rewards_tokens(term):
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"reward": {"dense": term | {"kind": "sentence"}}})
    assert (
        f"reward.dense={term['source']}: must be a model, without a template, since it rewards "
        "tokens. Give the directory of one." in str(caught.value)
    )


def test_the_log_ratio_of_a_dpo_model_needs_the_reference():
    ppo = {"kl_coef": 0.0, "estimator": "grpo"}
    for kind, needs in (("rto", True), ("clause", False)):
        reward = {"dense": {"source": "m", "kind": kind}}
        assert Config.model_validate({"ppo": ppo, "reward": reward}).has_reference is needs
