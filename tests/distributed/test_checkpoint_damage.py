"""Damaged, forged and unfinished checkpoints are named and never used."""

import pytest

from tests.distributed.ranks import run_ranks

ROLE_FILES = [
    ".metadata",
    *(f"__{rank}_{kind}0.distcp" for rank in range(2) for kind in ("", "optimizer_")),
    "metadata.json",
]
FILES = [
    "manifest.json",
    "state.json",
    *(f"{role}/{name}" for role in ("policy", "critic") for name in ROLE_FILES),
]
SAYS = {
    "flip": ("has changed since it was written", "cannot be read"),
    "truncate": ("bytes instead of", "cannot be read"),
    "remove": ("is missing",),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    return run_ranks("checkpoint_damage_ranks.py", 2, root / "out.json", str(root))


def test_every_file_was_damaged_in_every_way(found):
    assert set(found["damaged"]) == {f"{name} {kind}" for name in FILES for kind in SAYS}


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_once_and_the_older_checkpoint_is_used(found, name, kind):
    result = found["damaged"][f"{name} {kind}"]
    assert result["name"] == "step_000002"
    (warning,) = result["warnings"]
    assert f"step_000004 is damaged, {name} " in warning
    assert any(text in warning for text in SAYS[kind])
    assert warning.endswith("using step_000002")


@pytest.mark.parametrize("case", ["garbage", "empty", "absent"])
def test_a_latest_that_names_nothing_is_reported_once(found, case):
    result = found["pointers"][case]
    assert result["name"] == "step_000004"
    (warning,) = result["warnings"]
    assert "latest names no checkpoint" in warning


def test_a_latest_that_is_not_there_yet_is_no_damage(found):
    assert found["pointers"]["removed"] == {"name": "step_000004", "warnings": []}


def test_latest_may_be_set_back_by_hand(found):
    assert found["pointers"]["rolled back"] == {"name": "step_000002", "warnings": []}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(found):
    message = found["pointers"]["all damaged"]["name"]
    assert "step_000004 is damaged, policy/.metadata is missing" in message
    assert "step_000002 is damaged, state.json has changed" in message
    assert len(message.splitlines()) == 1


def test_checkpoints_that_are_removed_while_they_are_read_make_way_for_newer_ones(found):
    assert found["removed meanwhile"] == {"name": "step_000006", "warnings": []}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("code", "it names posix.system"),
        ("object", "embedding.word_embeddings.weight, which is not a tensor"),
        ("path", "it points to ../../latest"),
    ],
)
def test_a_forged_table_is_refused_before_it_is_read(found, case, expected):
    name, *refusals = found["malicious"][case]
    assert name == "step_000004"
    for messages in refusals:
        assert messages[0] == messages[1]
        assert expected in messages[0]
        assert "policy/.metadata: must be a plain table of tensors" in messages[0]
        assert len(messages[0].splitlines()) == 1
    assert not found["malicious"]["executed"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("disk fills on rank 1", "step_000006: could not be written; rank 1: File too large."),
        ("folder vanishes", "step_000006: could not be written; rank 0: No such file or directory"),
    ],
)
@pytest.mark.parametrize("where", ["", " in the background"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_harms_nothing(found, case, where, expected):
    result = found["failing"][case + where]
    first, second = result["messages"]
    assert first == second
    assert expected in first
    assert first.endswith("earlier checkpoints are intact.")
    assert len(first.splitlines()) == 1
    assert result["left"] == ["latest", "step_000002", "step_000004"]
    assert result["latest"] == "step_000004"


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(found):
    if "small disk" not in found["failing"]:
        pytest.skip("a tmpfs cannot be mounted here")
    result = found["failing"]["small disk"]
    first, second = result["messages"]
    assert first == second
    assert "must have room for a checkpoint of 1." in first
    assert " MB; 1.0 MB are free." in first
    assert result["left"] == []


def test_a_disk_that_is_read_only_is_refused_before_the_first_step_and_at_a_save(found):
    if "read-only" not in found["failing"]:
        pytest.skip("a tmpfs cannot be mounted here")
    for messages in found["failing"]["read-only"].values():
        first, second = messages
        assert first == second
        assert "rank 0: Read-only file system" in first
        assert len(first.splitlines()) == 1


def test_a_folder_that_cannot_be_written_to_is_refused_on_all_ranks(found):
    first, second = found["failing"]["in the way"]
    assert first == second
    assert "must be a folder that every rank can write to; rank 0: Not a directory" in first
    assert len(first.splitlines()) == 1
    assert found["failing"]["good folder"] == ["not refused", "not refused"]


@pytest.mark.parametrize("case", ["fixed", "fixed in the background"])
def test_a_later_save_succeeds_where_one_failed(found, case):
    result = found["failing"][case]
    assert result["messages"] == ["not refused", "not refused"]
    assert result["left"] == ["latest", "step_000006"]
