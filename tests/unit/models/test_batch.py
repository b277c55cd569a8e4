"""Where prompt, response and padding lie in a batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.models.batch import SequenceBatch

CPU = torch.device("cpu")


def create(prompts, responses, multiple=1, **options):
    return SequenceBatch.create(prompts, responses, multiple=multiple, device=CPU, **options)


def test_a_batch_worked_by_hand():
    batch = create([[5, 6, 7], [8]], [[11], [12, 13, 14]], multiple=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 11], [8, 12, 13, 14]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.response_lengths.tolist() == [1, 3]
    assert batch.num_columns == 3
    assert batch.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert list(zip(batch.grid_rows.tolist(), batch.grid_columns.tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert batch.token_columns.tolist() == [3, 1, 2, 3]
    assert batch.response_tokens.tolist() == [11, 12, 13, 14]


def test_a_packed_batch_worked_by_hand():
    batch = create([[5, 6, 7], [8]], [[11], [12, 13, 14]], multiple=6, packed=True)
    assert batch.tokens.tolist() == [[5, 6, 7, 11, 8, 12, 13, 14, 0, 0, 0, 0]]
    assert batch.lengths == (4, 4)
    assert batch.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.grid_rows.tolist() == [0, 1, 1, 1]
    assert batch.token_rows.tolist() == [0, 0, 0, 0]
    assert batch.token_columns.tolist() == [3, 5, 6, 7]
    assert batch.response_tokens.tolist() == [11, 12, 13, 14]
    assert batch.to_grid(batch.response_tokens).tolist() == [[11, 0, 0], [12, 13, 14]]


def test_packed_sequences_are_padded_one_by_one_with_context_parallelism():
    batch = create([[5, 6, 7], [8]], [[11, 12], [13]], multiple=6, packed=True, context_multiple=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 11, 12, 0, 0, 0, 8, 13, 0, 0]]
    assert batch.lengths == (8, 4)
    assert batch.token_columns.tolist() == [3, 4, 9]
    assert batch.response_tokens.tolist() == [11, 12, 13]


def test_a_grid_of_some_tokens():
    batch = create([[5], [8]], [[11, 12], [13]])
    grid = batch.to_grid(torch.tensor([1.0, 2.0]), torch.tensor([2, 0]))
    assert grid.tolist() == [[2.0, 0.0], [1.0, 0.0]]


def test_the_length_is_rounded_up_to_the_multiple():
    assert create([[1, 2, 3]], [[4, 5]], multiple=4).tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert create([[1, 2, 3]], [[4]], multiple=4).tokens.shape == (1, 4)


def test_a_filler_sequence_has_no_response():
    for packed in (False, True):
        batch = create([[0], [3, 4]], [[], [5]], packed=packed)
        assert batch.response_mask.tolist() == [[False], [True]]
        assert batch.response_tokens.tolist() == [5]


def test_a_batch_of_fillers_keeps_one_column():
    batch = create([[0]], [[]])
    assert batch.response_mask.shape == (1, 1)
    assert batch.to_grid(torch.zeros(0)).tolist() == [[0.0]]


def test_values_and_their_gradients_are_laid_out_as_a_grid():
    batch = create([[5, 6, 7], [8]], [[11], [12, 13]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = batch.to_grid(values)
    assert grid.tolist() == [[1, 0], [2, 3]]
    (grid * torch.tensor([[1.0, 9.0], [10.0, 100.0]])).sum().backward()
    assert values.grad.tolist() == [1, 10, 100]


ids = st.integers(1, 99)


@given(
    rows=st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=6)),
        min_size=1,
        max_size=5,
    ),
    multiple=st.integers(1, 5),
    packed=st.booleans(),
)
def test_every_response_is_found_again(rows, multiple, packed):
    prompts, responses = zip(*rows, strict=True)
    batch = create(prompts, responses, multiple, packed=packed)
    assert batch.tokens.shape[1] % multiple == 0
    assert batch.response_tokens.tolist() == [token for r in responses for token in r]
    grid = batch.to_grid(batch.response_tokens)
    for row, response in zip(grid.tolist(), responses, strict=True):
        assert row == response + [0] * (batch.num_columns - len(response))
    assert batch.response_mask.sum(1).tolist() == list(map(len, responses))
