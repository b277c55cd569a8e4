"""What a prompt is worth, by loops over heads and tokens."""

import math

import pytest
import torch

from marlhf_mega.models.prompt_value import PromptValue

CPU = torch.device("cpu")


def by_loops(values, states):
    """The value of one prompt, [tokens, hidden]; one head and one token at a time."""
    attention = values.attention
    hidden = states.shape[1]
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    size = hidden // attention.num_heads
    joined = []
    for head in range(attention.num_heads):
        rows = slice(head * size, (head + 1) * size)
        query, key, value = (
            (lambda x, w=w[rows], b=b[rows]: w @ x + b)
            for w, b in zip(weights, biases, strict=True)
        )
        asked = query(values.query)
        odds = [math.exp(asked @ key(state) / math.sqrt(size)) for state in states]
        found = sum(o * value(state) for o, state in zip(odds, states, strict=True))
        joined.append(found / sum(odds))
    state = attention.out_proj.weight @ torch.cat(joined) + attention.out_proj.bias
    logit = float(values.output.weight[0] @ state + values.output.bias)
    return values.low + (values.high - values.low) / (1 + math.exp(-logit))


@pytest.mark.parametrize("hidden", [16, 12])
def test_a_value_is_the_bounded_attention_over_the_prompts_tokens(hidden):
    values = PromptValue(hidden, low=-2.0, high=3.0, seed=0, device=CPU)
    assert values.attention.num_heads == {16: 8, 12: 4}[hidden]
    lengths = [1, 4, 3]
    states = torch.randn(3, 4, hidden, generator=torch.Generator().manual_seed(1)) * 3
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = values(states, mask)
        expected = [by_loops(values, row[:n]) for row, n in zip(states, lengths, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_equal_seeds_give_equal_weights_and_leave_the_global_draws_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (
        PromptValue(8, low=0.0, high=1.0, seed=seed, device=CPU).state_dict() for seed in (1, 1, 2)
    )
    assert torch.get_rng_state().equal(before)
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["query"].equal(other["query"])
