"""Keys that change nothing are described with what decides it; all others are not."""

import pytest

from marlhf_mega.config.checks import READ_SECTIONS
from marlhf_mega.config.schema import Config
from marlhf_mega.config.unread import _NEEDS, unread_keys


def described(job, **sections):
    return unread_keys(Config.model_validate(sections), job, {})


@pytest.mark.parametrize("job", READ_SECTIONS)
def test_defaults_are_never_described(job):
    assert described(job) == []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"macro": {"rule": "sentence", "n": 8}}, "macro.n=8 with macro.rule=sentence"),
        ({"macro": {"lengths": [2, 4]}}, "macro.lengths=[2,4] with macro.rule=fixed_ngram"),
        ({"macro": {"discount": "per_token"}}, "macro.discount=per_token with ppo.gamma=1.0"),
        (
            {"ppo": {"microbatch_size": 4, "microbatch_tokens": 4096}},
            "ppo.microbatch_size=4 with ppo.microbatch_tokens=4096",
        ),
        ({"ppo": {"kl_horizon": 5}}, "ppo.kl_horizon=5 with ppo.kl_target=null"),
        ({"critic": {"min_lr": 1e-6}}, "critic.min_lr=1e-06 with critic.lr_schedule=constant"),
        ({"precision": {"fp8_frozen": True}}, "precision.fp8_frozen=true with precision.fp8=off"),
        ({"rollout": {"filter_power": 1}}, "rollout.filter_power=1.0 with rollout.filter=null"),
        (
            {"rollout": {"filter": "pf_ppo", "filter_tries": 2}},
            "rollout.filter_tries=2 with rollout.filter=pf_ppo",
        ),
        ({"reward": {"robust_weight": 0}}, "reward.robust_weight=0.0 with reward.combine=sum"),
        ({"reward": {"par_scale": 2}}, "reward.par_scale=2.0 with reward.shaping=[]"),
        (
            {"reward": {"shaping": "overlong", "length_limit": 9, "overlong_factor": 2}},
            "reward.length_limit=9 with reward.shaping=[overlong]",
        ),
        (
            {"reward": {"shaping": "z_score", "reference_field": "response"}},
            "reward.reference_field=response with reward.shaping=[z_score]",
        ),
    ],
)
def test_a_key_that_nobody_reads_is_described(sections, line):
    assert described("ppo", **sections) == [line]


@pytest.mark.parametrize(
    "sections",
    [
        {"macro": {"n": 8}},
        {"macro": {"rule": "random_ngram", "lengths": [2, 4], "repeats": 2}},
        {"ppo": {"gamma": 0.99}, "macro": {"discount": "per_token"}},
        {"policy": {"lr_schedule": "cosine", "min_lr": 1e-6}},
        # The files that come with the project and those of `init` say "if it is set".
        {"evaluate": {"interval": 10}},
    ],
)
def test_a_key_that_is_read_is_not_described(sections):
    assert described("ppo", **sections) == []


def test_sections_of_other_jobs_may_be_in_a_shared_file():
    shared = {"macro": {"rule": "sentence", "n": 8}, "offline": {"kl_coef": 0.1}}
    assert described("sft", **shared) == []
    assert described("reward", **shared) == []
    assert described("offline", **shared) == ["offline.kl_coef=0.1 with offline.algorithm=a_lol"]
    macro = {"macro": shared["macro"], "offline": {"algorithm": "a_lol_macro"}}
    assert described("offline", **macro) == ["macro.n=8 with macro.rule=sentence"]


def test_a_warm_up_as_long_as_the_run_never_lets_the_learning_rate_be():
    config = Config.model_validate(
        {"policy": {"lr": 1e-3, "warmup_steps": 20}, "critic": {"warmup_steps": 19}}
    )
    steps = {"policy": 20, "critic": 20}
    assert unread_keys(config, "ppo", steps) == [
        "policy.lr=0.001 with a warm-up of 20 steps, of 20 in the run"
    ]
    assert unread_keys(config, "ppo", {"policy": 21, "critic": 21}) == []


def test_the_keys_exist():
    for keys in _NEEDS.items():
        for key in (keys[0], keys[1][0]):
            section, name = key.split(".")
            assert name in type(getattr(Config(), section)).model_fields, key


def test_only_evaluate_compares_with_another_policy():
    other = {"evaluate": {"against": "runs/sft"}}
    assert described("ppo", **other) == ["evaluate.against=runs/sft in ppo"]
    assert described("evaluate", **other) == []
