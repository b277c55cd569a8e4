"""A rank reads what it owns, hashes what it reads, and exports a few blocks at a time."""

import json
import re

import pytest

from tests.distributed.ranks import run_ranks

CASES = {
    "DP2 -> DP2": ({}, {}),
    "TP2 -> DP2": ({"tensor_size": 2}, {}),
    "PP2 -> DP2": ({"pipeline_size": 2}, {}),
    "DP2 -> TP2": ({}, {"tensor_size": 2}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    cases = json.dumps(CASES)
    found = run_ranks("resume_memory_ranks.py", 2, root / "out.json", str(root), cases)
    return found | {"disk": str(root / "disk")}


@pytest.mark.parametrize("case", CASES)
def test_a_resume_takes_less_than_a_rank_holds(found, case):
    for held, extra in found[case]:
        assert held > 50e6
        assert extra < 0.5 * held, f"{extra / 1e6:.0f} MB to load {held / 1e6:.0f} MB"


def test_only_files_with_weights_are_hashed_to_load_weights(found):
    hashed, weights = found["hashed"]
    assert weights <= hashed < 1.05 * weights


def test_an_export_takes_a_few_blocks_of_memory(found):
    """Of 2 MiB here; the embedding's two halves would be 60 MB."""
    for largest, every in found["exported"]:
        assert largest > 60e6
        for extra in every:
            assert extra < 0.3 * largest, f"{extra / 1e6:.0f} MB"


def test_sampled_tokens_that_do_not_come_have_the_limit_of_collectives(found):
    assert re.fullmatch(
        r"rollout: pipeline stage 0 must get the sampled tokens of the last stage within 10 s; .+\. "
        r"Look at the ranks of that stage\.",
        found["late"],
    )


def test_a_checkpoint_of_one_file_per_rank_is_loaded(found):
    equal, files, _ = found["old"]
    assert equal == [True, True]
    assert files == ["__0_0.distcp"]


def test_free_space_is_that_of_the_disk_that_a_link_leads_to(found):
    assert found["old"][2] == [found["disk"]]
