"""Sequences cut into microbatches: each comes once, whole, and the layout gets its number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import make_batches, prompt_batches
from tests.unit.models.meshes import mesh

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=9)
LIMITS = st.sampled_from(
    [
        MicrobatchLimit(sequences=1),
        MicrobatchLimit(sequences=4),
        MicrobatchLimit(sequences=1, tokens=40),
        MicrobatchLimit(sequences=1, tokens=40, packed=True),
    ]
)


def sequences(lengths):
    prompts = [[100 + i] * prompt for i, (prompt, _) in enumerate(lengths)]
    responses = [[200 + i] * response for i, (_, response) in enumerate(lengths)]
    return prompts, responses


@given(LENGTHS, LIMITS, st.sampled_from([1, 2, 3]))
def test_every_response_comes_once_and_fillers_count_nowhere(lengths, limit, stages):
    prompts, responses = sequences(lengths)
    batches = make_batches(prompts, responses, limit=limit, mesh=mesh(stages))
    assert batches.response_lengths == [response for _, response in lengths]
    assert len(batches.microbatches) % stages == 0
    seen = []
    for microbatch in batches.microbatches:
        indices = microbatch.indices.tolist()
        assert len(indices) > 0
        if limit.tokens is None:
            assert len(indices) <= limit.sequences
        ids = microbatch.batch.response_tokens.tolist()
        wanted = [token for i in indices if i < len(lengths) for token in responses[i]]
        assert sorted(ids) == sorted(wanted)
        seen += indices
    real, fillers = ([i for i in seen if (i < len(lengths)) is wanted] for wanted in (True, False))
    assert sorted(real) == list(range(len(lengths)))
    assert not fillers or len(lengths) < len(batches.microbatches)


@pytest.mark.parametrize("limit", LIMITS.elements)
def test_a_prompt_alone_has_a_column_for_each_of_its_tokens(limit):
    prompts = [[5, 6], [7], [8, 9, 10]]
    batches = prompt_batches(prompts, limit=limit, mesh=mesh(1))
    assert batches.response_lengths == [2, 1, 3]
    found = {}
    for part in batches.microbatches:
        grid = part.batch.to_grid(part.batch.response_tokens[:, None].float())
        for i, row in zip(part.indices.tolist(), grid[..., 0].tolist(), strict=True):
            found[i] = [int(token) for token in row if token]
    assert [found[i] for i in range(3)] == prompts
