import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.macro_actions import MacroActions, value_weights
from marlhf_mega.algorithm.termination import fixed_ngram
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses, weights_of

MASK_7_4 = torch.arange(7) < torch.tensor([[7], [4]])


def test_worked_batch_of_two():
    actions = MacroActions.from_starts(fixed_ngram(MASK_7_4, n=3), MASK_7_4)
    assert actions.ids.tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, -1, -1, -1]]
    assert actions.num_macro_actions.tolist() == [3, 2]
    assert actions.lengths.tolist() == [[3, 3, 1], [3, 1, 0]]
    assert actions.offsets()[MASK_7_4].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0]
    assert actions.pack().ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("n", "length", "lengths"),
    [
        (3, 7, [3, 3, 0, 1]),  # a start on the last token: an empty action before it
        (4, 7, [4, 2, 1]),
        (1, 3, [1, 1, 0, 1]),
        (5, 1, [0, 1]),
        (5, 0, []),
    ],
)
def test_compat_makes_the_last_token_an_action_of_its_own(n, length, lengths):
    mask = torch.arange(7).unsqueeze(0) < length
    actions = MacroActions.from_starts(fixed_ngram(mask, n=n), mask, compat="ma_rlhf")
    assert actions.num_macro_actions.item() == len(lengths)
    assert actions.lengths[0].tolist() == lengths


def test_worked_value_weights():
    mask = torch.ones(1, 3, dtype=torch.bool)
    actions = MacroActions.from_starts(fixed_ngram(mask, n=3), mask)

    def weights(rule):
        return value_weights(actions, rule, dtype=torch.float64)[0].tolist()

    assert weights("equal") == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert weights("position") == pytest.approx([0.1818, 0.2727, 0.5455], abs=5e-5)
    assert weights("position_repo") == pytest.approx([0.5455, 0.2727, 0.1818], abs=5e-5)
    assert weights("unit") == [0.0, 0.0, 1.0]
    assert weights("first") == [1.0, 0.0, 0.0]


@given(responses(), st.sampled_from(["equal", "unit", "first", "position", "position_repo"]))
def test_weights_pool_and_spread_agree_with_loops_padded_and_packed(rows, rule):
    starts, mask = masks(rows)
    if not mask.numel():
        return
    actions = MacroActions.from_starts(starts, mask)
    tokens = noise(1, *mask.shape)
    weights = value_weights(actions, rule, dtype=torch.float64)
    pooled = actions.pool(tokens)
    for row, flags in enumerate(rows):
        lengths = lengths_of(flags)
        assert actions.lengths[row, : len(lengths)].tolist() == lengths
        expected = [w for length in lengths for w in weights_of(rule, length)]
        assert weights[row, : len(flags)].tolist() == pytest.approx(expected)
        blocks = tokens[row, : len(flags)].split(lengths)
        sums = [block.sum().item() for block in blocks]
        assert pooled[row, : len(lengths)].tolist() == pytest.approx(sums)
        again = [total for total, length in zip(sums, lengths, strict=True) for _ in range(length)]
        assert actions.spread(pooled)[row, : len(flags)].tolist() == pytest.approx(again)
    assert not weights[~mask].any()
    assert not actions.spread(pooled)[~mask].any()
    packed = actions.pack()
    assert torch.equal(packed.pool(tokens[mask]), pooled)
    assert torch.equal(packed.spread(pooled), actions.spread(pooled)[mask])
    assert torch.equal(value_weights(packed, rule, dtype=torch.float64), weights[mask])


def test_pool_and_spread_have_the_right_gradients():
    actions = MacroActions.from_starts(fixed_ngram(MASK_7_4, n=3), MASK_7_4)
    tokens, macro = noise(1, 2, 7).requires_grad_(), noise(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(actions.pool, tokens)
    assert torch.autograd.gradcheck(actions.spread, macro)


def test_padding_may_hold_nan_when_pooling():
    actions = MacroActions.from_starts(fixed_ngram(MASK_7_4, n=3), MASK_7_4)
    tokens = torch.where(MASK_7_4, 1.0, torch.nan)
    assert actions.pool(tokens).tolist() == [[3.0, 3.0, 1.0], [3.0, 1.0, 0.0]]


@given(responses())
def test_every_token_can_be_an_action_of_its_own(rows):
    starts, mask = masks(rows)
    assume(mask.any())
    actions, expected = (MacroActions.from_starts(each, mask) for each in (starts, mask))
    for found, wanted in (
        (actions.per_token(), expected),
        (actions.pack().per_token(), expected.pack()),
    ):
        for name in ("ids", "num_macro_actions", "lengths", "slots", "response_mask"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_a_response_must_start_with_an_action():
    starts = torch.tensor([[False, True, False], [True, False, False]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    with pytest.raises(ValueError, match="starts") as caught:
        MacroActions.from_starts(starts, mask)
    assert str(caught.value) == (
        "starts: must be True on the first token of every response; it is not in rows [0]. Use a "
        "rule of termination, or set starts[:, 0]."
    )
    nothing = torch.zeros(2, 3, dtype=torch.bool)  # responses without tokens need no start
    assert MacroActions.from_starts(nothing, nothing).num_macro_actions.tolist() == [0, 0]
