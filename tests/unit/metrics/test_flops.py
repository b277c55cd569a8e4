import pytest

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.metrics.flops import forward_flops, peak_flops, training_flops

DENSE = ModelConfig(
    num_layers=3, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=16
)


def forward(model: ModelConfig, lengths: list[int], output_size: int = 0) -> float:
    return forward_flops(model, lengths, output_size=output_size, output_tokens=sum(lengths))


def test_dense_layer_by_hand():
    # q 8x8, k and v 8x4 each, out 8x8, gate up down 3 * 8x16: 576 weights; one token sees itself
    # through 4 heads of width 2: 2 * 8 for the score and 2 * 8 for the value.
    assert forward(DENSE, [1]) == 3 * (2 * 576 + 32)


def test_the_head_counts_only_the_tokens_it_is_applied_to():
    with_head = forward_flops(DENSE, [10], output_size=100, output_tokens=4)
    assert with_head - forward(DENSE, [10]) == 4 * 2 * 8 * 100


@pytest.mark.parametrize(("window", "every"), [(None, 1), (4, 1), (4, 2), (50, 1)])
def test_attention_counts_the_pairs_of_the_actual_lengths(window, every):
    model = DENSE.model_copy(update={"sliding_window": window, "sliding_window_every": every})
    lengths = [1, 3, 11]
    pairs = 0
    for layer in range(3):
        slides = window is not None and layer % every == 0
        for length in lengths:
            for query in range(length):
                pairs += sum(1 for key in range(query + 1) if not slides or query - key < window)
    matrices = sum(lengths) * 3 * 2 * 576
    assert forward(model, lengths) == matrices + 4 * 8 * pairs


def test_experts_count_the_router_the_chosen_and_the_shared_one():
    model = DENSE.model_copy(
        update={
            "num_experts": 6,
            "experts_per_token": 2,
            "expert_ffn_hidden_size": 5,
            "shared_expert_ffn_hidden_size": 7,
        }
    )
    router, chosen, shared = 8 * 6, 2 * 3 * 8 * 5, 3 * 8 * 7 + 8
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    assert forward(model, [1]) == 3 * (2 * (attention + router + chosen + shared) + 32)


def test_a_7b_model_needs_about_two_operations_per_weight_and_token():
    llama = ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008
    )
    weights = 6.74e9 - 32000 * 4096  # the embedding is looked up, not multiplied
    forward_short = forward(llama, [2], output_size=32000)
    assert forward_short / 2 == pytest.approx(2 * weights, rel=1e-3)


def test_training_is_three_forwards():
    assert training_flops(ModelConfig(), 7.0) == 21.0
    assert training_flops(ModelConfig(lora={"rank": 1}), 7.0) == 14.0


def test_peaks_by_device_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("some processor") is None
