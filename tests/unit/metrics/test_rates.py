"""PhaseWork of the phases by hand-counted operations, and its rates."""

import pytest

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics import rates
from marlhf_mega.metrics.rates import PhaseWork, ppo_work, training_work
from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=16,
    vocab_size=10,
)
# q 8x8, k and v 8x4 each, out 8x8, gate, up, down 3 * 8x16: 576 weights, two operations each.
TOKEN = 2 * 576
# One query and one key: 8 products for the score, 8 for the value.
PAIR = 2 * (8 + 8)
# Prompt 1 + response 2, prompt 2 + response 2: 7 tokens, 1+2+3 and 1+2+3+4 pairs.
PROMPTS, RESPONSES = [1, 2], [2, 2]
BODY = 7 * TOKEN + 16 * PAIR
VOCAB_HEAD, SCALAR_HEAD = 4 * 2 * 8 * 10, 4 * 2 * 8


def test_training_is_three_forwards_with_the_head_on_responses_only():
    work = training_work(MODEL, PROMPTS, RESPONSES, output_size=10)
    assert work == PhaseWork(tokens=7, flops=3 * (BODY + VOCAB_HEAD))


def test_phases_of_ppo_by_hand():
    rewards = [*(f"runs/reward_{number}" for number in range(3)), "module:function"]
    settings = {"ppo": {"epochs": 2}, "reward": {"source": [{"source": s} for s in rewards]}}
    config = Config.model_validate(settings).model_copy(update={"model": MODEL})
    work = ppo_work(config, PROMPTS, RESPONSES)
    # Each sequence's last token is never fed back: 5 tokens, 1+2 and 1+2+3 pairs.
    assert work["rollout"] == PhaseWork(tokens=4, flops=5 * TOKEN + 9 * PAIR + VOCAB_HEAD)
    # Policy and reference; critic and three reward models.
    experience = 2 * (BODY + VOCAB_HEAD) + 4 * (BODY + SCALAR_HEAD)
    assert work["experience"] == PhaseWork(tokens=7, flops=experience)
    assert work["policy"] == PhaseWork(tokens=14, flops=2 * 3 * (BODY + VOCAB_HEAD))
    assert work["critic"] == PhaseWork(tokens=14, flops=2 * 3 * (BODY + SCALAR_HEAD))
    # A filter has drawn both sequences and left the second; rewards are scored in the rollout.
    kept = ppo_work(config, [2], [2], generated=(PROMPTS, RESPONSES))
    assert kept["rollout"] == work["rollout"]
    head = (2 * VOCAB_HEAD + SCALAR_HEAD) / 2
    assert kept["experience"].flops == 3 * (4 * TOKEN + 10 * PAIR) + head
    grouped = config.ppo.model_copy(update={"estimator": "grpo"})
    alone = ppo_work(config.model_copy(update={"ppo": grouped}), PROMPTS, RESPONSES)
    assert work["experience"].flops - alone["experience"].flops == BODY + SCALAR_HEAD
    assert "critic" not in alone
    free = config.model_copy(update={"ppo": config.ppo.model_copy(update={"kl_coef": 0.0})})
    less = ppo_work(free, PROMPTS, RESPONSES)
    assert work["experience"].flops - less["experience"].flops == BODY + VOCAB_HEAD


def reduced(*replicas):
    """Add up what several replicas did."""
    sums = MetricSums(total=rates.declared(["critic"]), mean=["other"])
    for work in replicas:
        rates.add(sums, {"critic": work})
    sums.add_means({"other": 6.0}, count=2)
    return reduce_metrics(sums, lambda v: v, lambda v: v)


def test_rates_are_of_all_replicas_and_per_device():
    metrics = reduced(PhaseWork(tokens=10, flops=6e12), PhaseWork(tokens=30, flops=2e12))
    found = rates.rates(metrics, {"critic": 2.0}, num_devices=4, device_name="cpu")
    # 40 tokens and 8e12 operations in 2 seconds on 4 devices; nobody knows a CPU's peak.
    assert found == {"perf/tokens_per_second_critic": 20.0, "perf/tflops_critic": 1.0}
    assert metrics == {"other": 3.0}


def test_mfu_where_the_peak_is_known():
    metrics = reduced(PhaseWork(tokens=10, flops=989e12))
    name = "NVIDIA H100 80GB HBM3"
    found = rates.rates(metrics, {"critic": 4.0}, num_devices=1, device_name=name)
    assert found["perf/mfu_critic"] == pytest.approx(0.25)


def test_a_phase_that_did_not_run_has_no_rate():
    metrics = reduced(PhaseWork(tokens=10, flops=1.0))
    assert rates.rates(metrics, {"critic": 0.0}, num_devices=1, device_name="cpu") == {}
    assert metrics == {"other": 3.0}
