"""Chips of a run."""

import pytest

from marlhf_mega.report.facts import stage_facts
from marlhf_mega.report.run import Stage

CONFIG = {
    "run": {"seed": 7},
    "model": {"num_layers": 4, "hidden_size": 64},
    "layout": "1 ranks: TP1 x PP1 x DP1 (gloo, cpu)",
    "precision": {"dtype": "auto"},
    "dtype": "float32",
    "policy": {"lr": 1e-5},
    "reward_model": {"lr": 2e-5, "batch_size": 16},
    "sft": {"batch_size": 8},
    "offline": {"batch_size": 32, "algorithm": "a_lol"},
    "rollout": {"batch_size": 64},
    "macro": {"rule": "fixed_ngram", "n": 5},
    "ppo": {"kl_coef": 0.05},
    "versions": {"torch": "2.13.0"},
    "git_revision": "0123456789abcdef",
}


@pytest.mark.parametrize(
    ("curve", "settings"),
    [
        ("sft/loss", {"batch": "8", "learning rate": "1e-5"}),
        ("reward/loss", {"batch": "16", "learning rate": "2e-5"}),
        ("offline/loss", {"batch": "32", "learning rate": "1e-5", "algorithm": "a_lol"}),
        (
            "rollout/score_mean",
            {
                "batch": "64",
                "learning rate": "1e-5",
                "macro actions": "fixed_ngram, n = 5",
                "KL coefficient": "0.05",
            },
        ),
    ],
)
def test_a_job_shows_its_own_settings(curve, settings):
    stage = Stage("run", CONFIG, "", {curve: [(1, 1.0)]})
    assert dict(stage_facts(stage)) == {
        "model": "4 layers x 64",
        "layout": "1 ranks: TP1 x PP1 x DP1 (gloo, cpu)",
        "dtype": "float32",
        **settings,
        "seed": "7",
        "torch": "2.13.0",
        "revision": "0123456789ab",
    }


def test_only_the_rule_that_has_it_shows_its_length():
    config = CONFIG | {"macro": {"rule": "sentence", "n": 5}}
    found = dict(stage_facts(Stage("run", config, "", {"rollout/score_mean": [(1, 1.0)]})))
    assert found["macro actions"] == "sentence"


def test_a_run_without_a_configuration_has_no_chips():
    assert stage_facts(Stage("run", {}, "", {"rollout/score_mean": [(1, 1.0)]})) == []
    assert stage_facts(Stage("run", {}, "", {})) == []
