"""Gradients that travel in pieces, against a sum of all of them in one process."""

import json

from tests.distributed.ranks import run_ranks


def test_every_rank_gets_its_shard_of_the_sum_to_the_bit(tmp_path):
    """Shards of less than a piece, of one, of several, and with a rest."""
    sizes = [3 * shard for shard in (1, 10, 40, 57)]
    found = run_ranks("exchange_ranks.py", 3, tmp_path / "out.json", json.dumps(sizes))
    assert found == [[[True] * 4] * 2] * 3
