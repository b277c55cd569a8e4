import torch

from marlhf_mega.algorithm.counter_rng import fold, uniform

WORD = 1 << 64


def splitmix64(state):
    """The published generator in unbounded Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def test_one_key_gives_the_published_splitmix64_output():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference code for seed 0
    keys = [0, 1, 2**62, -1]
    found = fold(torch.tensor(keys)).tolist()
    assert [value % WORD for value in found] == [splitmix64(key % WORD) for key in keys]


def test_keys_chain_and_broadcast():
    one = fold(7, 3, 5).item() % WORD
    assert one == splitmix64((splitmix64((splitmix64(7) + 3) % WORD) + 5) % WORD)
    grid = fold(7, torch.arange(4).unsqueeze(1), torch.arange(6))
    assert grid.shape == (4, 6)
    assert grid[3, 5] == fold(7, 3, 5)
    assert grid.unique().numel() == 24


def test_uniform_numbers_fill_the_unit_interval_evenly():
    draws = uniform(fold(1234, torch.arange(20000)))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
