import pytest

from marlhf_mega.metrics.glossary import METRICS, lookup, order
from marlhf_mega.metrics.ppo import EXPERIENCE_MAXIMA, EXPERIENCE_MEANS, UPDATE_MEANS


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("eval/gold_mean", "gold reward"),
        ("eval/kl", "KL from the reference (nats)"),
        ("eval/response_tokens", "response length (tokens)"),
        ("perf/tokens_per_second_policy", "throughput, policy (tokens/s)"),
        ("perf/rollout_peak_memory_gib", "peak memory, rollout (GiB)"),
        ("perf/peak_memory_gib", "peak memory (GiB)"),
        ("policy/skipped_fraction", "skipped steps (%)"),
        ("time/step_seconds", "step (s)"),
        ("rollout/logprob_gap_max", "sampler-trainer gap max (nats)"),
        ("mine/so_far_unknown", "so far unknown"),
        ("bare", "bare"),
    ],
)
def test_names_become_words_with_units(name, title):
    assert lookup(name).title == title


@pytest.mark.parametrize("names", [EXPERIENCE_MEANS, UPDATE_MEANS, EXPERIENCE_MAXIMA])
def test_what_a_step_declares_is_explained_in_a_sentence(names):
    for name in names:
        metric = lookup(name)
        assert metric.about.endswith(".")
        assert "`" not in metric.about


def test_what_was_listed_is_explained():
    unexplained = {name for name, metric in METRICS.items() if not metric.about}
    assert unexplained == {"*", "*_mean", "*_gib", "*_seconds", "*_tokens", "*_fraction"}


def test_shares_are_shown_as_per_cent():
    accuracy = lookup("eval/accuracy")
    assert accuracy.text(0.8965) == "89.65 %"
    assert accuracy.with_error(0.8964, 0.0134) == "89.6 ± 1.3"
    assert accuracy.change(0.5, 0.8965) == "+39.6"


def test_a_value_without_a_standard_error_stands_alone():
    assert lookup("eval/kl").with_error(8.652852, 0.0) == "8.653"
    assert lookup("eval/kl").text(None) == "- nats"


def test_listed_metrics_come_in_the_order_of_the_list():
    names = ["unknown", "eval/kl", "eval/gold_mean", "also/unknown"]
    assert sorted(names, key=order) == ["eval/gold_mean", "eval/kl", "also/unknown", "unknown"]
