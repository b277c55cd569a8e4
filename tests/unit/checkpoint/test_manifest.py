"""A manifest notices every change of a checkpoint, its own included."""

import hashlib
import json

import pytest

from marlhf_mega.checkpoint import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "a.bin").write_bytes(b"x" * 1000)
    (tmp_path / "policy" / ".hidden").write_bytes(b"")
    (tmp_path / "state.json").write_text("{}")
    names = ("policy/a.bin", "policy/.hidden", "state.json")
    facts = {name: manifest.facts(tmp_path / name) for name in names}
    text = manifest.make(facts, layout="1 rank", config="abc", step=3)
    (tmp_path / "manifest.json").write_text(text)
    return tmp_path


def test_it_lists_every_file_with_size_and_sha256(folder):
    files = manifest.read(folder)["files"]
    assert set(files) == {"policy/a.bin", "policy/.hidden", "state.json"}
    assert files["policy/a.bin"] == {
        "bytes": 1000,
        "sha256": hashlib.sha256(b"x" * 1000).hexdigest(),
    }


def test_it_describes_where_the_checkpoint_came_from(folder):
    body = manifest.read(folder)
    assert (body["layout"], body["config"], body["step"]) == ("1 rank", "abc", 3)
    assert {"python", "torch", "megatron-core"} <= set(body["versions"])


def test_an_untouched_folder_has_no_damage(folder):
    assert manifest.find_damage(folder) is None


def test_each_byte_of_each_file_counts(folder):
    for name in ("policy/a.bin", "state.json", "manifest.json"):
        path = folder / name
        data = path.read_bytes()
        for position in range(0, len(data), 7):
            path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            assert manifest.find_damage(folder).startswith(f"{name} "), position
        path.write_bytes(data)
    assert manifest.find_damage(folder) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.write_bytes(b"x" * 999), "policy/a.bin has 999 bytes instead of 1000"),
        (lambda path: path.unlink(), "policy/a.bin is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "policy/a.bin has"),
    ],
)
def test_the_damage_is_named(folder, change, expected):
    change(folder / "policy" / "a.bin")
    assert manifest.find_damage(folder).startswith(expected)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", "{}", '{"sha256": "x"}'])
def test_an_invalid_manifest_is_damage(folder, text):
    (folder / "manifest.json").write_text(text)
    assert manifest.find_damage(folder).startswith("manifest.json ")


def test_a_missing_manifest_is_damage(folder):
    (folder / "manifest.json").unlink()
    assert manifest.find_damage(folder) == "manifest.json is missing"


def test_shares_cover_every_file_once(folder):
    (folder / "policy" / "a.bin").unlink()
    (folder / "state.json").unlink()
    found = [manifest.find_damage(folder, slice(rank, None, 3)) for rank in range(3)]
    assert sorted(filter(None, found)) == ["policy/a.bin is missing", "state.json is missing"]


def test_the_manifest_is_plain_json(folder):
    assert json.loads((folder / "manifest.json").read_text())["files"]


def test_only_the_files_that_will_be_read_are_compared(folder):
    (folder / "policy" / "a.bin").unlink()
    assert manifest.find_damage(folder, only=["state.json"]) is None
    assert manifest.find_damage(folder, only=["policy/a.bin"]) == "policy/a.bin is missing"
    assert manifest.find_damage(folder, only=["policy/b.bin"]).endswith("lacks policy/b.bin")
