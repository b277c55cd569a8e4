from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.config.load import ConfigError
from marlhf_mega.data.stream import SampleStream, SourcePart, WeightedStream, epoch_size

SETTINGS = {
    "parts": [SourcePart(10)],
    "batch_size": 4,
    "seed": 3,
    "shuffle": True,
    "data_hash": "a" * 64,
}


def take(stream: SampleStream, count: int) -> list[int]:
    return torch.cat([stream.next_batch() for _ in range(count)]).tolist()


@given(
    num_samples=st.integers(1, 20),
    batch_size=st.integers(1, 45),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_every_epoch_visits_every_sample_once(
    num_samples: int, batch_size: int, seed: int, shuffle: bool
) -> None:
    stream = SampleStream(
        [SourcePart(num_samples)], batch_size=batch_size, seed=seed, shuffle=shuffle, data_hash=""
    )
    drawn = take(stream, num_samples)  # exactly batch_size epochs
    for epoch in range(batch_size):
        visited = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(visited) == list(range(num_samples))
    assert (stream.epoch, stream.offset) == (batch_size, 0)


@given(first=st.integers(1, 7), second=st.integers(1, 7))
def test_the_order_does_not_depend_on_the_batch_size(first: int, second: int) -> None:
    streams = [SampleStream(**SETTINGS | {"batch_size": size}) for size in (first, second)]
    drawn = [take(stream, 10) for stream in streams]
    shortest = min(map(len, drawn))
    assert drawn[0][:shortest] == drawn[1][:shortest]


def test_orders_differ_between_epochs_and_seeds_and_are_fixed() -> None:
    drawn = take(SampleStream(**SETTINGS | {"batch_size": 10}), 2)
    assert drawn[:10] != drawn[10:]
    assert drawn[:10] != take(SampleStream(**SETTINGS | {"seed": 4, "batch_size": 10}), 1)
    # Swapping seed and epoch must not give the same order.
    assert take(SampleStream(**SETTINGS | {"seed": 0, "batch_size": 10}), 2)[10:] != take(
        SampleStream(**SETTINGS | {"seed": 1, "batch_size": 10}), 1
    )
    # Written down, so that a new version of a library cannot change a resumed run unnoticed.
    assert drawn == [9, 6, 0, 2, 1, 4, 7, 5, 3, 8, 4, 1, 2, 8, 5, 0, 7, 9, 6, 3]


def test_a_batch_of_another_size_takes_the_next_samples() -> None:
    stream, whole = (SampleStream(**SETTINGS) for _ in range(2))
    drawn = [stream.next_batch(), stream.next_batch(3), stream.next_batch(), stream.next_batch(1)]
    assert torch.cat(drawn).tolist() == take(whole, 3)
    assert stream.num_consumed == 12


def test_without_shuffling_samples_come_in_file_order() -> None:
    stream = SampleStream(**SETTINGS | {"shuffle": False})
    assert take(stream, 3) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert (stream.epoch, stream.offset, stream.num_consumed) == (1, 2, 12)


@given(before=st.integers(0, 12), batch_size=st.integers(1, 12))
def test_a_resumed_stream_continues_with_the_next_sample(before: int, batch_size: int) -> None:
    whole = SampleStream(**SETTINGS)
    take_before = [whole.next_batch() for _ in range(before)]
    state = whole.state_dict()
    assert state["num_consumed"] == 4 * len(take_before)
    resumed = SampleStream(**SETTINGS | {"batch_size": batch_size})
    resumed.load_state_dict(state)
    rest = take(whole, 12)
    found = take(resumed, 12)
    shortest = min(len(rest), len(found))
    assert rest[:shortest] == found[:shortest]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_hash": "b" * 64},
            f"data.data_hash={'b' * 64}: must be as in the checkpoint, "
            f"{'a' * 64}; the data file changed",
        ),
        (
            {"parts": [SourcePart(11)]},
            "data.num_samples=11: must be as in the checkpoint, 10; the number",
        ),
        ({"seed": 4}, "data.seed=4: must be as in the checkpoint, 3; the order"),
        ({"shuffle": False}, "data.shuffle=False: must be as in the checkpoint, True; the order"),
    ],
)
def test_a_state_of_other_data_is_refused(changes: dict[str, object], message: str) -> None:
    state = SampleStream(**SETTINGS).state_dict()
    with pytest.raises(ConfigError, match=message):
        SampleStream(**SETTINGS | changes).load_state_dict(state)


def test_a_state_that_contradicts_itself_is_refused() -> None:
    stream = SampleStream(**SETTINGS)
    with pytest.raises(RuntimeError, match=r"data.num_consumed=5: must be .* = 12; the checkpoint"):
        stream.load_state_dict(stream.state_dict() | {"epoch": 1, "offset": 2, "num_consumed": 5})


MIXTURE = [SourcePart(4), SourcePart(10, 0.3), SourcePart(2, 2.0), SourcePart(3, 0.1)]


def test_an_epoch_of_a_mixture_visits_each_part_as_often_as_its_weight_says() -> None:
    size = 4 + 3 + 4 + 1
    assert epoch_size(MIXTURE) == size
    stream = SampleStream(**SETTINGS | {"parts": MIXTURE, "batch_size": size})
    epochs = [take(stream, 1) for _ in range(10)]
    for drawn in epochs:
        assert sorted(i for i in drawn if i < 4) == [0, 1, 2, 3]
        assert sorted(i for i in drawn if 14 <= i < 16) == [14, 14, 15, 15]
    # Of a part with a fraction every sample is visited before any is again.
    for first, size in ((4, 10), (16, 3)):
        visits = [i for drawn in epochs for i in drawn if first <= i < first + size]
        assert Counter(visits[: len(visits) // size * size]) == dict.fromkeys(
            range(first, first + size), len(visits) // size
        )
    assert epochs[0] != epochs[1]


def test_draws_of_a_mixture_depend_on_seed_and_number_alone() -> None:
    """Written down: a function of (seed, draw) in every version, at every batch size."""
    settings = SETTINGS | {"parts": [SourcePart(3), SourcePart(4, 0.5)]}
    whole = take(SampleStream(**settings | {"batch_size": 1}), 15)
    assert whole == [5, 2, 1, 4, 0, 1, 3, 0, 2, 6, 3, 0, 1, 2, 6]
    resumed = SampleStream(**settings | {"batch_size": 5})
    first = SampleStream(**settings | {"batch_size": 5})
    first.next_batch()
    resumed.load_state_dict(first.state_dict())
    assert take(resumed, 2) == whole[5:]


def test_an_unshuffled_mixture_takes_its_parts_in_order() -> None:
    stream = SampleStream(
        **SETTINGS | {"parts": [SourcePart(2), SourcePart(3, 0.67)], "shuffle": False}
    )
    assert take(stream, 3) == [0, 1, 2, 3, 0, 1, 4, 2, 0, 1, 3, 4]


def weighted(probabilities, **changes):
    options = {"batch_size": 5, "seed": 3, "data_hash": "h"} | changes
    return WeightedStream(torch.tensor(probabilities), **options)


def test_weighted_draws_come_as_often_as_they_should():
    draws = weighted([0.1, 0.0, 0.6, 0.3, 0.0], batch_size=20000).next_batch()
    shares = torch.bincount(draws, minlength=5) / len(draws)
    assert shares.tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3, 0.0], abs=0.015)
    assert shares[1] == shares[4] == 0


def test_weighted_draws_do_not_depend_on_batches_or_on_a_restart():
    probabilities = [0.25, 0.25, 0.5]
    whole = weighted(probabilities, batch_size=20).next_batch()
    stream = weighted(probabilities)
    first = stream.next_batch()
    again = weighted(probabilities)
    again.load_state_dict(stream.state_dict())
    rest = [again.next_batch() for _ in range(3)]
    assert torch.equal(torch.cat([first, *rest]), whole)
    assert not torch.equal(weighted(probabilities, batch_size=20, seed=4).next_batch(), whole)


def test_weighted_draws_from_other_data_are_refused():
    state = weighted([0.5, 0.5]).state_dict()
    with pytest.raises(ConfigError, match="data.data_hash=other: must be as in the checkpoint, h"):
        weighted([0.5, 0.5], data_hash="other").load_state_dict(state)
