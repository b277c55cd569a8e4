"""Which checkpoint is used, which are removed, and what an interrupted save leaves."""

import pytest

from marlhf_mega.checkpoint import folders


def make(root, *names, latest=None):
    for name in names:
        (root / name).mkdir()
        (root / name / "file").write_text(name)
    if latest is not None:
        (root / "latest").write_text(latest)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_latest_comes_first_then_older_ones_then_newer_ones(tmp_path):
    make(tmp_path, "step_000002", "step_000004", "step_000006", "step_000008")
    (tmp_path / "latest").write_text("step_000006\n")
    order, remarks = folders.candidates(tmp_path)
    assert order == ["step_000006", "step_000004", "step_000002", "step_000008"]
    assert remarks == []


def test_steps_beyond_six_digits_are_ordered_as_numbers(tmp_path):
    make(tmp_path, "step_999999", "step_1000000", latest="step_1000000")
    assert folders.candidates(tmp_path)[0] == ["step_1000000", "step_999999"]


def test_unfinished_and_foreign_folders_are_no_candidates(tmp_path):
    make(tmp_path, "step_000002", "step_000004.tmp", "notes", "step_x", latest="step_000002")
    assert folders.candidates(tmp_path) == (["step_000002"], [])


def test_a_checkpoint_set_aside_is_used_after_the_one_that_replaced_it(tmp_path):
    make(tmp_path, "step_000002", "step_000004", "step_000004.old", latest="step_000004")
    order, _ = folders.candidates(tmp_path)
    assert order == ["step_000004", "step_000004.old", "step_000002"]


def test_without_a_folder_there_is_nothing(tmp_path):
    assert folders.candidates(tmp_path / "checkpoints") == ([], [])


@pytest.mark.parametrize("text", ["step_000009\n", "", "\x00\x01", "../other", "step_000002\nx"])
def test_a_latest_that_names_no_checkpoint_is_reported(tmp_path, text):
    make(tmp_path, "step_000002", "step_000004", latest=text)
    order, (remark,) = folders.candidates(tmp_path)
    assert order == ["step_000004", "step_000002"]
    assert remark.startswith("latest names no checkpoint")


def test_a_latest_that_is_not_text_is_reported(tmp_path):
    make(tmp_path, "step_000002")
    (tmp_path / "latest").write_bytes(b"\xff\xfe\x80")
    assert folders.candidates(tmp_path)[1][0].startswith("latest names no checkpoint")


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (10, 0, [1, 2, 3, 4, 5, 6]),
        (1, 2, [2, 4, 6]),
        (2, 4, [4, 5, 6]),
    ],
)
def test_the_newest_and_every_nth_are_kept(tmp_path, keep, keep_every, left):
    make(tmp_path, *(f"step_{step:06d}" for step in range(1, 7)), latest="step_000006")
    folders.rotate(tmp_path, 6, keep=keep, keep_every=keep_every)
    assert names(tmp_path) == ["latest", *(f"step_{step:06d}" for step in left)]


def test_the_best_is_kept(tmp_path):
    make(tmp_path, *(f"step_{step:06d}" for step in range(1, 7)), latest="step_000006")
    folders.rotate(tmp_path, 6, keep=1, keep_every=4, best=2)
    assert names(tmp_path) == ["latest", *(f"step_{step:06d}" for step in (2, 4, 6))]


def test_abandoned_later_steps_do_not_displace_good_ones(tmp_path):
    make(tmp_path, "step_000002", "step_000003", "step_000008", latest="step_000003")
    folders.rotate(tmp_path, 3, keep=2, keep_every=0)
    assert names(tmp_path) == ["latest", "step_000002", "step_000003", "step_000008"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, caplog):
    make(tmp_path, "step_000002", "step_000004", "step_000002.tmp", latest="step_000004")
    folders.rotate(tmp_path, 4, keep=1, keep_every=0)
    (record,) = caplog.records
    assert "step_000002 could not be removed" in record.getMessage()
    assert (tmp_path / "step_000004").is_dir()


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    root = tmp_path / "checkpoints"
    folders.remove_leftovers(root)
    make(root, "step_000002", "step_000004.tmp", "step_000002.old.tmp")
    folders.remove_leftovers(root)
    assert names(root) == ["step_000002"]


def test_a_commit_makes_the_folder_the_latest(tmp_path):
    target = folders.path_of(tmp_path, 12)
    folders.begin(target, ["policy", "critic"])
    assert names(tmp_path) == ["step_000012.tmp"]
    folders.commit(target, "{}")
    assert names(tmp_path) == ["latest", "step_000012"]
    assert names(target) == ["critic", "manifest.json", "policy"]
    assert (tmp_path / "latest").read_text() == "step_000012\n"


def test_a_repeated_step_replaces_the_old_checkpoint(tmp_path):
    make(tmp_path, "step_000012", latest="step_000012")
    target = folders.path_of(tmp_path, 12)
    folders.begin(target, ["policy"])
    folders.commit(target, "{}")
    assert names(target) == ["manifest.json", "policy"]
    folders.rotate(tmp_path, 12, keep=1, keep_every=0)
    assert names(tmp_path) == ["latest", "step_000012"]


def test_stray_files_and_folders_set_aside_do_not_block_a_save(tmp_path):
    make(tmp_path, "step_000012", "step_000012.old", latest="step_000012")
    (tmp_path / "step_000013.tmp").touch()
    (tmp_path / "step_000014.tmp").symlink_to(tmp_path / "step_000012")
    folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step_000012", "step_000012.old"]
    target = folders.path_of(tmp_path, 12)
    folders.begin(target, ["policy"])
    folders.commit(target, "{}")
    assert names(target) == ["manifest.json", "policy"]
    assert names(tmp_path) == ["latest", "step_000012", "step_000012.old"]
