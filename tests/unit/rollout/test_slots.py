"""Which response sits in which cache slot."""

from collections import deque
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.rollout import slots
from marlhf_mega.rollout.slots import Response, SlotGroup
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.work import Decode, Prefill

EOS = 0
STOP = StopRule(frozenset({EOS}))


def group_of(responses, num_slots):
    return SlotGroup(num_slots, deque(responses), torch.device("cpu"))


def test_samples_of_one_prompt_read_it_once():
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9], [5, 6]]
    group = group_of([Response(i, prompt, 4) for i, prompt in enumerate(prompts)], 4)
    work = group.next_work()
    assert work.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert work.rows.tolist() == [0, 0, 1, 1]
    assert work.lengths.tolist() == [3, 3, 2, 2]
    assert [r.prompt for r in group.waiting] == [[5, 6]]


def next_token(sequence):
    """A model's answer, which depends on the whole sequence and its length."""
    return (sum(i * token for i, token in enumerate(sequence, start=3)) + len(sequence)) % 5


def answer(prompt, max_tokens):
    """The tokens of a response that grows alone."""
    tokens = []
    while len(tokens) < max_tokens and EOS not in tokens:
        tokens.append(next_token(prompt + tokens))
    return tokens


def sampled(tokens):
    """Tokens with log-probs that name them."""
    logprobs = [-float(token) for token in tokens]
    return torch.tensor([tokens, logprobs, logprobs], dtype=torch.float64)


def decode(group):
    """Run a group to its end on a cache of token ids; yield the slots of every pass."""
    cache = [None] * group.num_slots
    while (work := group.next_work()) is not None:
        if isinstance(work, Prefill):
            used = range(work.first_slot, work.first_slot + len(work.rows))
            for slot, row, length in zip(used, work.rows, work.lengths, strict=True):
                cache[slot] = work.tokens[row, :length].tolist()
        else:
            used = range(len(work.tokens))
            for slot, token, position in zip(used, work.tokens, work.positions, strict=True):
                assert len(cache[slot]) == position < work.longest
                cache[slot].append(token.item())
        yield work, used
        tokens = [next_token(cache[slot]) for slot in used]
        for source, target in group.record(sampled(tokens), None, stop=STOP):
            cache[target] = list(cache[source])


CASES = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 6)), max_size=12
)


@given(CASES, st.integers(1, 5), st.sampled_from([1, 7, 1 << 14]))
def test_every_response_is_the_one_that_grows_alone(cases, num_slots, prefill_tokens):
    cases.sort(key=lambda case: -len(case[0]))  # as the generator gives them
    responses = [Response(i, prompt, most) for i, (prompt, most) in enumerate(cases)]
    with patch.object(slots, "PREFILL_TOKENS", prefill_tokens):
        for work, used in decode(group_of(responses, num_slots)):
            assert used[-1] < num_slots
            if isinstance(work, Prefill) and len(work.tokens) > 1:
                assert work.tokens.numel() <= prefill_tokens
    for response, (prompt, most) in zip(responses, cases, strict=True):
        assert response.tokens == answer(prompt, most)
        assert response.logprobs == [-token for token in response.tokens]
        assert response.finished == (response.tokens[-1] == EOS)


@pytest.mark.parametrize(("num_ended", "kind"), [(1, Decode), (2, Prefill)])
def test_new_prompts_wait_until_an_eighth_of_the_slots_is_free(num_ended, kind):
    responses = [Response(i, [1], 1 if i < num_ended else 9) for i in range(20)]
    group = group_of(responses, 16)
    group.next_work()
    group.record(sampled([1] * 16), None, stop=STOP)
    assert isinstance(group.next_work(), kind)
