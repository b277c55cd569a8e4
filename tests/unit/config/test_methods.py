"""Contradictions between methods and other keys: every message, and what is accepted."""

from typing import get_args

import pytest

from marlhf_mega.algorithm.choices import (
    Combination,
    Estimator,
    Objective,
    PreferenceLoss,
    SampleFilter,
    Shaping,
)
from marlhf_mega.config.methods import method_problems, online_problems, preference_problems
from marlhf_mega.config.schema import Config

PAIRS = {
    "estimator": "dr_grpo",
    "objective": "p3o",
    "aggregation": "seq_mean_token_sum",
    "microbatch_size": 2,
}


def problems(*, data_size=1, **sections):
    return list(method_problems(Config.model_validate(sections), data_size))


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_estimator_and_objective_has_a_configuration(estimator, objective):
    ppo = {"estimator": estimator, "objective": objective}
    rollout = {"samples_per_prompt": 2}
    if objective == "p3o":
        ppo["aggregation"] = "seq_mean_token_sum"
    found = problems(ppo=ppo, rollout=rollout)
    if estimator == "brain":
        assert [line.partition(":")[0] for line in found if "for ppo.estimator=brain" in line] == [
            *([] if objective == "pg" else [f"ppo.objective={objective}"]),
            *([] if objective == "p3o" else ["ppo.aggregation=token_mean"]),
        ]
    elif objective == "p3o" and estimator != "dr_grpo":
        assert f"ppo.estimator={estimator}: must be dr_grpo for ppo.objective=p3o" in found[0]
    else:
        assert found == []


@pytest.mark.parametrize(
    ("estimator", "whitens"),
    [("gae", True), ("sae", True), ("reinforce_pp", True), ("reinforce_pp_baseline", True)]
    + [(name, False) for name in ("rloo", "grpo", "dr_grpo", "remax", "brain")],
)
def test_advantages_are_whitened_where_the_paper_does(estimator, whitens):
    config = Config.model_validate({"ppo": {"estimator": estimator}})
    assert config.ppo.whiten_advantages is whitens
    asked = {"estimator": estimator, "whiten_advantages": not whitens}
    assert Config.model_validate({"ppo": asked}).ppo.whiten_advantages is not whitens


@pytest.mark.parametrize(
    ("estimator", "sections", "key"),
    [
        ("sae", {"macro": {"reward": "mean"}}, "macro.reward=mean"),
        ("sae", {"macro": {"lambda_unit": "per_token"}}, "macro.lambda_unit=per_token"),
        ("rloo", {"critic": {"lr": 2e-5}}, "critic.lr=2e-05"),
        ("remax", {"critic": {"init": "policy"}}, "critic.init=policy"),
        ("grpo", {"ppo": {"gae_lambda": 1.0}}, "ppo.gae_lambda=1"),
        ("grpo", {"ppo": {"gae_lambda_critic": 1.0}}, "ppo.gae_lambda_critic=1"),
        ("grpo", {"ppo": {"gae_lambda_alpha": 0.05}}, "ppo.gae_lambda_alpha=0.05"),
        ("reinforce_pp", {"ppo": {"value_clip_range": None}}, "ppo.value_clip_range=null"),
        ("reinforce_pp", {"ppo": {"critic_only_steps": 3}}, "ppo.critic_only_steps=3"),
        ("dr_grpo", {"macro": {"value_target": "macro"}}, "macro.value_target=macro"),
        ("dr_grpo", {"macro": {"value": "first"}}, "macro.value=first"),
        ("reinforce_pp_baseline", {"ppo": {"gamma": 0.9}}, "ppo.gamma=0.9"),
        ("rloo", {"macro": {"discount": "per_token"}}, "macro.discount=per_token"),
    ],
)
def test_keys_that_an_estimator_does_not_read_are_refused(estimator, sections, key):
    ppo = {"estimator": estimator} | sections.get("ppo", {})
    (line,) = problems(**sections | {"ppo": ppo}, rollout={"samples_per_prompt": 2})
    assert line.startswith(f"{key}: ppo.estimator={estimator} does not use it; its default is ")
    assert line.endswith(". Remove it, or change ppo.estimator.")


def test_what_the_returns_to_go_read_is_accepted():
    macro = {"reward": "mean", "value": "first", "discount": "per_token"}
    assert problems(ppo={"estimator": "reinforce_pp", "gamma": 0.9}, macro=macro) == []


@pytest.mark.parametrize(
    ("objective", "sections", "key"),
    [
        ("cispo", {"ppo": {"dual_clip": 3.0}}, "ppo.dual_clip=3"),
        ("pg", {"ppo": {"clip_range": 0.1}}, "ppo.clip_range=0.1"),
        ("pg", {"macro": {"ratio": "macro"}}, "macro.ratio=macro"),
    ],
)
def test_keys_that_an_objective_does_not_read_are_refused(objective, sections, key):
    ppo = {"objective": objective} | sections.get("ppo", {})
    (line,) = problems(**sections | {"ppo": ppo})
    assert line.startswith(f"{key}: ppo.objective={objective} does not use it; its default is ")


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"])
def test_groups_need_two_samples(estimator):
    assert problems(ppo={"estimator": estimator}) == [
        f"rollout.samples_per_prompt=1: must be at least 2 for ppo.estimator={estimator}, which "
        "compares the responses to a prompt. Raise it, or use another ppo.estimator."
    ]


def test_the_posterior_of_a_reward_weights_likelihoods_by_its_temperature():
    ppo = {"estimator": "brain", "objective": "pg", "aggregation": "seq_mean_token_sum"}
    rollout = {"samples_per_prompt": 4}
    assert problems(ppo=ppo, rollout=rollout) == []
    assert problems(ppo=ppo | {"kl_coef": 0}, rollout=rollout) == [
        "ppo.kl_coef=0: must be above 0 for ppo.estimator=brain, whose temperature it is. Set it, "
        "or use another ppo.estimator."
    ]
    assert problems(ppo=ppo, rollout=rollout | {"top_p": 0.9}) == [
        "rollout.top_p=0.9: must be 1 for ppo.estimator=brain, which weights the likelihood of "
        "whole responses. Change it, or use another ppo.estimator."
    ]


def test_greedy_responses_are_generated_by_the_ranks_that_train():
    for estimator, what in (("remax", "greedy responses"), ("vine", "continuations")):
        assert problems(ppo={"estimator": estimator}, rollout={"ranks": 2}) == [
            f"rollout.ranks=2: ppo.estimator={estimator} also needs {what}, which the ranks that "
            "train generate. Set it to 0, or use another ppo.estimator."
        ]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"ppo": {"aggregation": "token_mean"}}, "ppo.aggregation=token_mean: must be seq_mean_to"),
        ({"ppo": {"whiten_advantages": True}}, "ppo.whiten_advantages=true: must be false for"),
        ({"ppo": {"kl_estimator": "abs"}}, "ppo.kl_estimator=abs: must be k1 for ppo.objective=p3"),
        ({"ppo": {"kl_target": 6}}, "ppo.kl_target=6: must be null for ppo.objective=p3o, which"),
        ({"ppo": {"microbatch_tokens": 900}}, "ppo.microbatch_tokens=900: must be null for ppo.o"),
        ({"ppo": {"tis_cap": 2}}, "ppo.tis_cap=2: must be null for ppo.objective=p3o, which le"),
        ({"ppo": {"sampler_mask": "token"}}, "ppo.sampler_mask=token: must be null for ppo.objec"),
        ({"rollout": {"samples_per_prompt": 4}}, "rollout.samples_per_prompt=4: must be 2 for pp"),
        ({"ppo": {"microbatch_size": 3}}, "ppo.microbatch_size=3: must be a multiple of 2 for pp"),
        ({"ppo": {"minibatch_size": 2}}, "ppo.minibatch_size=2: must be a multiple of 4 for ppo."),
        ({"ppo": {"clip_range_high": 0.3}}, "ppo.clip_range_high=0.3: ppo.objective=p3o does not"),
    ],
)
def test_p3o_needs_pairs(sections, line):
    rollout = {"samples_per_prompt": 2} | sections.get("rollout", {})
    assert problems(ppo=PAIRS, rollout={"samples_per_prompt": 2}, data_size=2) == []
    ppo = PAIRS | sections.get("ppo", {})
    (found,) = problems(ppo=ppo, rollout=rollout, data_size=2)
    assert found.startswith(line)


@pytest.mark.parametrize("key", ["tis_cap=2", "sampler_mask=sequence"])
def test_the_samplers_log_probs_cannot_be_compared_with_themselves(key):
    name, value = key.split("=")
    assert problems(ppo={"old_logprobs": "sampler", name: value}) == [
        f"ppo.{key}: compares the trainer's log-probs with the sampler's; "
        "ppo.old_logprobs=sampler leaves only the latter. Set ppo.old_logprobs=trainer, or "
        f"ppo.{name}=null."
    ]


def test_bounds_need_a_mask_and_a_rule_of_entropies_needs_them():
    assert problems(ppo={"sampler_bounds": [0.4, 2.0]}) == [
        "ppo.sampler_bounds=[0.4,2]: needs ppo.sampler_mask, which is not set. Set it to token, "
        "macro or sequence, or remove the bounds."
    ]
    assert problems(ppo={"sampler_bounds": [0.4, 2.0], "sampler_mask": "macro"}) == []
    assert problems(ppo={"old_logprobs": "sampler"}, macro={"rule": "entropy"}) == [
        "macro.rule=entropy: needs entropies, which the sampler does not give; "
        "ppo.old_logprobs=sampler. Set ppo.old_logprobs=trainer, or use another rule."
    ]
    assert problems(ppo={"old_logprobs": "sampler"}, macro={"rule": "probability"}) == []


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({}, "reward.shaping=[par] or [center_reference], not []"),
        (
            {"reward": {"shaping": ["par", "overlong"]}},
            "reward.shaping=[par] or [center_reference], not [par,overlong]",
        ),
        (
            {"reward": {"shaping": "par", "normalize": "running"}},
            "reward.normalize=none, not running",
        ),
        (
            {"reward": {"shaping": "par", "missing_eos": "replace"}},
            "reward.missing_eos=none, not replace",
        ),
    ],
)
def test_a_reward_that_shrinks_is_not_negative(sections, needed):
    assert problems(reward=sections.get("reward", {}) | {"kl_max": 5}) == [
        f"reward.kl_max=5: shrinks the reward, so none may be negative; needs {needed}. Change "
        "that key, or remove it."
    ]


def test_only_responses_with_a_divergence_have_a_reward_that_shrinks():
    reward = {"shaping": "center_reference", "kl_max": 5}
    assert problems(reward=reward) == []
    assert Config.model_validate({"reward": reward, "ppo": {"kl_coef": 0}}).has_reference
    for estimator, others in (("remax", "greedy responses"), ("vine", "continuations")):
        assert problems(ppo={"estimator": estimator}, reward=reward) == [
            f"reward.kl_max=5: scales the reward by a divergence that {others} of ppo.estimator="
            f"{estimator} do not have. Use another ppo.estimator, or remove it."
        ]


@pytest.mark.parametrize("name", get_args(Shaping))
def test_every_shaping_has_a_configuration(name):
    assert problems(reward={"shaping": name, "length_coef": 0.1}) == []


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (
            {"shaping": ["overlong", "z_score", "overlong"]},
            "reward.shaping=[overlong,z_score,overlong]: must name each function once. Remove one.",
        ),
        (
            {"shaping": ["overlong", "par"]},
            "reward.shaping=[overlong,par]: par compares raw scores with those of references, so "
            "it must come first, and alone of its kind. Change the order, or remove one.",
        ),
        (
            {"shaping": ["par", "center_reference"]},
            "reward.shaping=[par,center_reference]: center_reference compares raw scores with "
            "those of references, so it must come first, and alone of its kind. Change the order, "
            "or remove one.",
        ),
        (
            {"shaping": "z_score", "normalize": "running_scale"},
            "reward.normalize=running_scale: z_score of reward.shaping already normalises, by the "
            "batch instead of by all scores so far. Remove one of the two.",
        ),
        (
            {"shaping": "length_penalty"},
            "reward.length_coef=0: length_penalty of reward.shaping subtracts nothing. Set it to "
            "the penalty of a token, or remove length_penalty.",
        ),
        (
            {"shaping": "overlong", "overlong_buffer": 65},
            "reward.overlong_buffer=65: must not exceed rollout.max_response_tokens=64, before "
            "which it lies. Lower it.",
        ),
    ],
)
def test_shaping_that_contradicts_itself_is_refused(reward, line):
    assert problems(reward=reward) == [line]


PAIR = ["a:b", "c:d"]
JUDGE = {"constraints": {"source": "a:b", "threshold": 0.5}}


@pytest.mark.parametrize("rule", get_args(Combination))
def test_every_combination_has_a_configuration(rule):
    source = [{"source": name} for name in PAIR]
    reward = {"source": source, "combine": rule} | JUDGE
    assert problems(reward=reward | {"shaping": ["z_score", "overlong"]}) == []
    alone = problems(reward={"source": "a:b", "combine": rule})
    assert alone == (
        []
        if rule == "sum"
        else [
            f"reward.combine={rule}: needs two sources or more; reward.source has 1. Add one, or "
            "remove reward.combine."
        ]
    )


@pytest.mark.parametrize(
    ("sections", "shown"),
    [
        ({"reward": {"shaping": ["par", "z_score"]}}, "reward.shaping=[par,z_score]"),
        ({"ppo": {"estimator": "remax"}}, "ppo.estimator=remax"),
        ({"ppo": {"estimator": "vine"}}, "ppo.estimator=vine"),
        (
            {"rollout": {"filter": "dynamic", "samples_per_prompt": 2}},
            "rollout.filter=dynamic",
        ),
    ],
)
def test_scores_of_two_groups_are_not_compared(sections, shown):
    reward = {"source": [{"source": name} for name in PAIR], "combine": "maxmin"}
    assert problems(**sections | {"reward": reward | sections.get("reward", {})}) == [
        f"reward.combine=maxmin: takes one source for each batch; {shown} would compare it with "
        "another batch, and so another source. Change one of them."
    ]


@pytest.mark.parametrize(
    ("estimator", "others"), [("remax", "a greedy response"), ("vine", "continuations")]
)
def test_what_a_response_is_compared_with_has_no_dense_reward(estimator, others):
    reward = {"dense": {"source": "dpo", "kind": "rto"}}
    assert problems(reward=reward, ppo={"estimator": estimator}) == [
        f"ppo.estimator={estimator}: compares with the score of {others}, without a part in "
        "reward.dense. Use another ppo.estimator, or remove reward.dense."
    ]
    assert problems(reward=reward) == []


def test_pairs_cannot_keep_a_violation_from_becoming_likelier():
    assert problems(ppo=PAIRS, rollout={"samples_per_prompt": 2}, reward=JUDGE) == [
        "ppo.objective=p3o: learns from the difference of two responses, so one that violates "
        "reward.constraints could become likelier. Use another ppo.objective."
    ]


def test_one_lambda_for_the_policy():
    assert problems(ppo={"gae_lambda": 0.9, "gae_lambda_alpha": 0.05}) == [
        "ppo.gae_lambda=0.9: is replaced by the lambda of ppo.gae_lambda_alpha=0.05. Remove one "
        "of the two."
    ]
    assert problems(ppo={"gae_lambda_critic": 1.0, "gae_lambda_alpha": 0.05}) == []


MASKED = {"mask_interval": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    ("sections", "other"),
    [
        ({"rollout": {"ranks": 2}}, "rollout.ranks=2"),
        ({"rollout": {"pipeline_size": 1}, "parallel": {"pipeline_size": 2}}, "a rollout layout"),
        ({"model": {"lora": {"rank": 8}}}, "model.lora.rank=8"),
        ({"precision": {"fp8": "hybrid", "dtype": "bfloat16"}}, "precision.fp8=hybrid"),
    ],
)
def test_a_mask_policy_is_a_second_model_where_the_policy_trains(sections, other):
    (line,) = problems(**sections | {"rollout": MASKED | sections.get("rollout", {})})
    assert line.startswith(
        "rollout.mask_interval=5: the mask policy is a whole second model where the policy "
        f"trains, in its number format; it does not go with {other}"
    )
    assert line.endswith(". Remove one of them.")


def test_a_mask_needs_top_p_and_nothing_else_filters():
    assert problems(rollout=MASKED) == []
    for keys, shown in (
        ({"top_p": 1.0}, "1, rollout.top_k=0"),
        ({"top_k": 9}, "0.9, rollout.top_k=9"),
    ):
        assert problems(rollout=MASKED | keys) == [
            "rollout.mask_interval=5: the mask is the older policy's top_p, without top_k; "
            f"rollout.top_p={shown}. Use rollout.top_p=0.9 and rollout.top_k=0, or remove it."
        ]
    assert problems(rollout={"mask_min_tokens": 50}) == [
        "rollout.mask_min_tokens=50: needs rollout.mask_interval, which is not set. Set it, or "
        "remove this key."
    ]


@pytest.mark.parametrize("name", get_args(SampleFilter))
def test_every_filter_has_a_configuration(name):
    assert problems(rollout={"filter": name, "samples_per_prompt": 2}) == []
    alone = problems(rollout={"filter": name, "samples_per_prompt": 1})
    assert alone == (
        []
        if name == "pf_ppo"
        else [
            f"rollout.samples_per_prompt=1: must be at least 2 for rollout.filter={name}, which "
            "compares the responses to a prompt. Raise it, or remove the filter."
        ]
    )


@pytest.mark.parametrize("name", get_args(SampleFilter))
def test_what_compares_groups_needs_a_filter_that_keeps_them(name):
    rollout = {"filter": name, "samples_per_prompt": 4}
    refused = [
        f"rollout.filter={name}: does not keep the responses to a prompt together, which "
        "ppo.estimator=grpo compares. Use another filter or ppo.estimator."
    ]
    found = problems(ppo={"estimator": "grpo"}, rollout=rollout)
    assert found == (refused if name in ("pf_ppo", "best_of_n") else [])


def test_new_prompts_are_not_asked_for_a_step_ahead():
    rollout = {"filter": "dynamic", "samples_per_prompt": 2, "ranks": 1, "staleness": 1}
    assert problems(rollout=rollout) == [
        "rollout.filter=dynamic: asks for new prompts after scores are known; with "
        "rollout.staleness=1 the next step's samples are generated by then. Set "
        "rollout.staleness=0, or use another filter."
    ]
    assert problems(rollout=rollout | {"filter": "best_worst"}) == []


@pytest.mark.parametrize("loss", get_args(PreferenceLoss))
def test_every_preference_loss_stands_alone(loss):
    assert list(preference_problems(Config.model_validate({"preference": {"loss": loss}}))) == []


@pytest.mark.parametrize(
    ("loss", "key", "value"),
    [
        ("dpo", "refuel_eta", 2),
        ("ipo", "label_smoothing", 0.1),
        ("cpl", "reference", "runs/other"),
        ("dpo", "num_responses", 3),
        ("pro", "margin", "weight"),
        ("cpl", "bfpo_shift", 0.25),
        ("xpo", "cpl_bias", 0.25),
        ("bfpo", "label_smoothing", 0.1),
        ("refuel", "beta", 0.5),
        ("refuel", "margin", "weight"),
        ("refuel", "length_normalize", True),
        ("ipo", "mixture", 0.5),
        ("nash_md", "length_normalize", True),
        ("nash_md", "reference", "runs/other"),
        ("ipo_md", "nll_coef", 0.1),
    ],
)
def test_keys_that_a_preference_loss_does_not_read_are_refused(loss, key, value):
    config = Config.model_validate({"preference": {"loss": loss, key: value}})
    (line,) = preference_problems(config)
    shown = str(value).lower()
    assert line.startswith(f"preference.{key}={shown}: preference.loss={loss} does not use it;")


def test_actions_of_cpl_do_not_depend_on_a_model():
    macro = {"rule": "entropy"}
    config = Config.model_validate({"preference": {"loss": "cpl", "gamma": 0.9}, "macro": macro})
    assert list(preference_problems(config)) == [
        "macro.rule=entropy: reads what models say of a rollout; preference.loss=cpl has none. Use "
        "another rule, or preference.gamma=1."
    ]
    config = Config.model_validate({"preference": {"loss": "cpl"}, "macro": macro})
    assert list(preference_problems(config)) == []


def test_ipo_has_no_offset():
    config = Config.model_validate({"preference": {"loss": "ipo", "margin": "offset"}})
    assert list(preference_problems(config)) == [
        "preference.margin=offset: preference.loss=ipo has no offset. Use none or weight, or "
        "preference.loss=dpo."
    ]


def online(**sections):
    sections["preference"] = {"loss": "ipo_md"} | sections.get("preference", {})
    base = {"reward": {"source": "a:b"}}
    return list(online_problems(Config.model_validate(base | sections)))


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p=0.9: preference.loss=ipo_md learns from all"),
        ({"rollout": {"mask_interval": 5}}, "rollout.mask_interval=5: preference.loss=ipo_md lea"),
        ({"rollout": {"top_k": 5}}, "rollout.top_k=5: preference.loss=ipo_md learns from all tok"),
        ({"rollout": {"tensor_size": 1}}, "rollout.tensor_size=1: preference.loss=ipo_md generat"),
        (
            {"rollout": {"samples_per_prompt": 2}},
            "rollout.samples_per_prompt=2: preference.loss=ipo_md draws two responses to each",
        ),
        (
            {"rollout": {"filter": "pf_ppo"}},
            "rollout.filter=pf_ppo: preference.loss=ipo_md learns from all pairs. Remove it.",
        ),
        (
            {"reward": {"source": "a:b", "clip": 5}},
            "reward.clip=5: preference.loss=ipo_md compares raw scores. Remove it.",
        ),
        (
            {"reward": {"source": "a:b", "shaping": "z_score"}},
            "reward.shaping=[z_score]: preference.loss=ipo_md compares raw scores. Remove it.",
        ),
        ({"rollout": {"temperature": 0}}, "rollout.temperature=0: preference.loss=ipo_md needs "),
        ({"reward": {}}, "reward.source: preference.loss=ipo_md has its pairs judged; it is not "),
        (
            {"model": {"lora": {"rank": 8}}},
            "preference.mixture=0.125: the reference generates beside the policy, as a whole "
            "second model in its number format, not with model.lora.rank=8. Set it to 0.",
        ),
    ],
)
def test_pairs_of_the_policy_are_plain_samples_with_raw_scores(sections, line):
    (found,) = online(**sections)
    assert found.startswith(line)
    assert online() == []


def test_without_a_mixture_adapters_may_learn_from_pairs_of_the_policy():
    model = {"lora": {"rank": 8}}
    assert online(model=model, preference={"loss": "nash_md", "mixture": 0}) == []
