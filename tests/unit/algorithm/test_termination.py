import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.termination import (
    entropy,
    fixed_ngram,
    ngrams_of_lengths,
    perplexity,
    post_process,
    probability,
    random_ngram,
    sentence,
    whole_response,
)
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses

FORMS = ("token", "prefix", "segment")


def mask_of(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def flags(text):
    """'x..x' -> start flags."""
    return torch.tensor([[char == "x" for char in row] for row in text.split()])


def test_fixed_ngrams():
    mask = mask_of(7, 4, 0)
    assert torch.equal(fixed_ngram(mask, n=3), flags("x..x..x x..x... ......."))
    assert torch.equal(fixed_ngram(mask, n=1), mask)
    assert torch.equal(fixed_ngram(mask, n=1000), whole_response(mask))
    assert torch.equal(whole_response(mask), flags("x...... x...... ......."))


def test_sentences_start_after_the_token_that_ends_one():
    mask, ends = mask_of(7, 4), flags("..x...x .x.x...")
    assert torch.equal(sentence(mask, ends), flags("x..x... x.x...."))


def test_eos_stays_in_the_last_sentence():
    mask, ends = mask_of(4, 4), flags(".xx. .xx.")
    ends_with_eos = torch.tensor([True, False])
    assert torch.equal(sentence(mask, ends, ends_with_eos=ends_with_eos), flags("x.x. x.xx"))
    only_eos = sentence(mask_of(1), flags("."), ends_with_eos=torch.tensor([True]))
    assert torch.equal(only_eos, flags("x"))


def test_prescribed_lengths_leave_the_rest_to_one_action():
    lengths = torch.tensor([[2, 1, 3], [4, 9, 9], [1, 1, 1]])
    starts = ngrams_of_lengths(mask_of(8, 5, 3), lengths)
    assert torch.equal(starts, flags("x.xx..x. x...x... xxx....."))


@pytest.mark.parametrize("mode", ["list", "cycle"])
def test_random_ngrams_use_every_length_as_often_as_the_list_says(mode):
    lengths, repeats = (2, 3, 5), 2
    mask = mask_of(*[50] * 40)
    keys = fold(7, 0, torch.arange(40))
    starts = random_ngram(mask, lengths=lengths, repeats=repeats, mode=mode, keys=keys)
    orders = set()
    for row in starts.tolist():
        found = lengths_of(row)
        assert sorted(found[:6]) == [2, 2, 3, 3, 5, 5]
        orders.add(tuple(found[:6]))
        if mode == "list":
            assert found[6:] == [30]
        else:
            assert sorted(found[6:12]) == [2, 2, 3, 3, 5, 5]
            assert sum(found[12:]) == 10
    assert len(orders) > 15  # of 90


def test_random_ngrams_of_a_sample_do_not_depend_on_its_batch():
    keys, mask = fold(7, 3, torch.arange(6)), mask_of(30, 20, 30, 9, 1, 30)
    options = {"lengths": (1, 2, 4), "repeats": 1, "mode": "cycle"}
    together = random_ngram(mask, keys=keys, **options)
    alone = random_ngram(mask[[3]], keys=keys[[3]], **options)
    assert torch.equal(together[[3]], alone)
    narrow = random_ngram(mask[[3], :9], keys=keys[[3]], **options)
    assert torch.equal(narrow, alone[:, :9])
    other_step = random_ngram(mask, keys=fold(7, 4, torch.arange(6)), **options)
    assert not torch.equal(other_step, together)


def test_perplexity_forms_on_worked_numbers():
    surprise = torch.tensor([[2.0, 1.0, 1.2, 4.0, 2.0, 2.5, 9.0]])
    mask = mask_of(7, 6)[1:]

    def found(form, **options):
        return perplexity(mask, -surprise, form=form, **options)

    assert torch.equal(found("token"), flags("x.xx.x."))
    assert torch.equal(found("prefix"), flags("x..x.x."))  # means 2, 1.5, 1.4, 2.05, 2.04
    assert torch.equal(found("segment"), flags("x..x..."))  # then 4, mean(4, 2) = 3 > 2.5
    assert torch.equal(found("token", compat="ma_rlhf"), flags("xxx.x.."))


@given(responses(), st.integers(0, 100))
def test_perplexity_forms_agree_with_loops(rows, seed):
    _, mask = masks(rows)
    if not mask.numel():
        return
    ref_logprobs = noise(seed, *mask.shape)
    found = {form: perplexity(mask, ref_logprobs, form=form) for form in FORMS}
    for row, flags_of_row in enumerate(rows):
        u = (-ref_logprobs[row, : len(flags_of_row)]).tolist()
        token = [t == 0 or u[t] > u[t - 1] for t in range(len(u))]
        prefix = [t == 0 or u[t] > sum(u[:t]) / t for t in range(len(u))]
        segment, current = [], []
        for value in u:
            start = not current or value > sum(current) / len(current)
            current = [value] if start else [*current, value]
            segment.append(start)
        for form, expected in (("token", token), ("prefix", prefix), ("segment", segment)):
            assert found[form][row, : len(u)].tolist() == expected
            assert not found[form][row, len(u) :].any()


def test_an_unlikely_token_starts_an_action():
    probabilities = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.9, 0.95, 0.15], [0.1, 0.2] + [0.05] * 5])
    found = probability(mask_of(7, 3), probabilities.log(), below=0.2)
    assert torch.equal(found, flags("x..x..x x.x...."))
    assert torch.equal(probability(mask_of(7, 3), probabilities.log(), below=1.0), mask_of(7, 3))


def test_every_second_unlikely_token_starts_an_action_from_the_first_one_on():
    """SPO's example: cuts before tokens 1, 3 and 5, of which an interval of 2 leaves two."""
    probabilities = torch.tensor([[0.95, 0.3, 0.99, 0.6, 0.97, 0.2, 0.92], [0.3] * 5 + [0.1] * 2])
    mask = mask_of(7, 5)
    found = [probability(mask, probabilities.log(), below=0.9, every=every) for every in (1, 2, 3)]
    assert torch.equal(found[0], flags("xx.x.x. xxxxx.."))
    assert torch.equal(found[1], flags("xx...x. x.x.x.."))
    assert torch.equal(found[2], flags("xx..... x..x..."))


def test_tokens_of_high_entropy_end_an_action():
    entropies = torch.tensor(
        [[0.1, 2, 0.3, 1.5, 0.2, 0.4, 0.05, 0.6, 0.7, 0.3], [1, 1, 1, 1, 9, 9, 9, 9, 9, 9]]
    )
    found = entropy(mask_of(10, 4), entropies, share=0.3)
    # Ends at 1, 3, 8 and, of the second response, at the first two of four equal tokens.
    assert torch.equal(found, flags("x.x.x....x xxx......."))


@given(responses(max_tokens=20), st.sampled_from([0.07, 0.3, 0.5, 1.0]), st.integers(0, 100))
def test_the_entropy_rule_agrees_with_sorting(rows, share, seed):
    _, mask = masks(rows)
    assume(mask.any())
    entropies = noise(seed, *mask.shape).abs()
    found = entropy(mask, entropies, share=share)
    for row, flags_of_row in enumerate(rows):
        length = len(flags_of_row)
        own = entropies[row, :length].tolist()
        ends = sorted(range(length), key=lambda t: -own[t])[: -(-length * int(100 * share) // 100)]
        expected = [t for t in range(length) if t == 0 or t - 1 in ends]
        assert found[row].nonzero()[:, 0].tolist() == expected


def test_short_actions_join_the_previous_one():
    starts, mask = flags("x.xx...x. xx......."), mask_of(9, 2)
    found = post_process(starts, mask, min_length=2)
    assert torch.equal(found, flags("x..x...x. x........"))
    assert torch.equal(post_process(starts, mask, min_length=5), flags("x........ x........"))


def test_long_actions_are_split():
    starts, mask = flags("x.......x x..xx...."), mask_of(9, 7)
    assert torch.equal(post_process(starts, mask, max_length=3), flags("x..x..x.x x..xx...."))


def test_eos_can_be_an_action_of_its_own():
    starts, mask = flags("x.... x...."), mask_of(5, 4)
    eos = torch.tensor([True, False])
    assert torch.equal(post_process(starts, mask, ends_with_eos=eos), starts)
    found = post_process(starts, mask, eos="own", ends_with_eos=eos)
    assert torch.equal(found, flags("x...x x...."))


@given(responses(max_tokens=20), st.integers(1, 4), st.integers(0, 4))
def test_post_processing_agrees_with_loops(rows, min_length, extra):
    starts, mask = masks(rows)
    if not mask.numel():
        return
    max_length = min_length + extra
    found = post_process(starts, mask, min_length=min_length, max_length=max_length)
    for row, flags_of_row in enumerate(rows):
        merged = []
        for length in lengths_of(flags_of_row):
            if merged and length < min_length:
                merged[-1] += length
            else:
                merged.append(length)
        expected = []
        for length in merged:
            expected += [max_length] * (length // max_length)
            expected += [length % max_length] if length % max_length else []
        assert lengths_of(found[row, : len(flags_of_row)].tolist()) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fixed_ngram(m, n=0), r"^macro\.n=0: must be at least 1\."),
        (
            lambda m: random_ngram(m, lengths=(2, 0), repeats=1, mode="list", keys=torch.zeros(1)),
            r"^macro\.lengths=\[2, 0\]: must list lengths of at least 1 token\.",
        ),
        (
            lambda m: random_ngram(m, lengths=(), repeats=1, mode="list", keys=torch.zeros(1)),
            r"^macro\.lengths=\[\]: must list",
        ),
        (
            lambda m: random_ngram(m, lengths=(2,), repeats=0, mode="list", keys=torch.zeros(1)),
            r"^macro\.repeats=0: must be at least 1\.",
        ),
        (lambda m: post_process(m, m, min_length=0), r"^macro\.min_length=0: must be at least 1\."),
        (
            lambda m: post_process(m, m, min_length=4, max_length=3),
            r"^macro\.max_length=3: must be at least macro\.min_length=4\.",
        ),
    ],
)
def test_bad_parameters_name_their_key(call, message):
    with pytest.raises(ValueError, match=message):
        call(mask_of(3))
