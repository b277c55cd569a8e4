"""A replaced file is the old or the new one, whatever happens in between."""

import os
from pathlib import Path

import pytest

from marlhf_mega import durable


def test_the_new_content_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with durable.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        durable.replace(path, "\ud800")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("flush", "expected"),
    [(True, ["fsync state.json.tmp", "replace", "fsync folder"]), (False, ["replace"])],
)
def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch, flush, expected):
    path = tmp_path / "folder" / "state.json"
    path.parent.mkdir()
    done, fsync, rename = [], os.fsync, os.replace

    def log_fsync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        done.append(f"fsync {name}")
        fsync(descriptor)

    def log_replace(*paths):
        done.append("replace")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    durable.replace(path, "new", flush=flush)
    assert done == expected
