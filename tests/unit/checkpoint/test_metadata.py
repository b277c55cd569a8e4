"""The table of contents of a sharded checkpoint is read without being executed."""

import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from marlhf_mega.checkpoint.metadata import TensorFacts, read_tensors


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three tensors, written by torch."""
    write(tmp_path, {"w": torch.zeros(3, 4), "b": torch.ones(5), "s": torch.tensor(1.5)})
    return tmp_path


def write(folder, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


def table(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def replace_table(folder, value, protocol=None):
    (folder / ".metadata").write_bytes(pickle.dumps(value, protocol))


def read_shapes(folder):
    return {name: facts.shape for name, facts in read_tensors(folder).items()}


def test_torchs_table_gives_names_and_shapes(folder):
    assert read_shapes(folder) == {"w": (3, 4), "b": (5,), "s": ()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn])
def test_number_formats_are_known(tmp_path, dtype):
    write(tmp_path, {"w": torch.zeros(2, 2, dtype=dtype)})
    assert read_tensors(tmp_path) == {"w": TensorFacts((2, 2), dtype)}
    assert read_tensors(tmp_path)["w"].num_bytes == 4 * dtype.itemsize
    assert read_tensors(tmp_path)["w"].files == {"__0_0.distcp"}


@pytest.mark.parametrize("protocol", [4, 5])
def test_newer_pickles_are_read(folder, protocol):
    replace_table(folder, table(folder), protocol)
    assert set(read_shapes(folder)) == {"w", "b", "s"}


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "os.system": (Call(os.system, "touch executed"), "names posix.system"),
    "subprocess": (Call(subprocess.run, ["touch", "executed"]), "names subprocess.run"),
    "eval": (Call(eval, "open('executed', 'w')"), "names builtins.eval"),
    "getattr": (Call(getattr, "text", "upper"), "names builtins.getattr"),
    "torch.load": (Call(torch.load, "executed"), "names torch.serialization.load"),
    "a module's attribute": (Call(sys.exit), "names sys.exit"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_in_the_pickle_is_named_but_not_made(folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    value, expected = CALLS[case]
    content = table(folder)
    content.planner_data = {"x": value}
    for forged in (value, content):
        replace_table(folder, forged)
        with pytest.raises(RuntimeError, match=expected):
            read_shapes(folder)
    assert not (folder / "executed").exists()


RAW = {
    "protocol 0": (b"cos\nsystem\n(S'touch executed'\ntR.", "names os.system"),
    "an instance": (b"(S'touch executed'\nios\nsystem\n.", "names os.system"),
    "an extension": (b"\x80\x04\x82\x01.", "is damaged"),
    "a persistent id": (b"\x80\x04K\x01Q.", "is damaged"),
    "a dotted name": (
        b"\x80\x04\x8c\x05torch\x8c\x0dhub.os.system\x93\x8c\x01x\x85R.",
        "names torch.hub.os.system",
    ),
    "attributes of a class": (
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x01a\x8c\x01bsb.",
        "is damaged",
    ),
    "nothing": (b"", "is damaged"),
    "a cut": (b"\x80\x04}", "is damaged"),
    "an empty stack": (b"\x80\x04.", "is damaged"),
    "text": (b"{}\n", "is damaged"),
    "a number": (b"\x80\x04K\x01.", "is damaged"),
}


@pytest.mark.parametrize("case", RAW)
def test_any_other_pickle_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, expected = RAW[case]
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(RuntimeError, match=expected) as error:
        read_shapes(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/.metadata: must be a plain table of tensors; ")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()


def test_an_object_which_torch_would_unpickle_is_refused(tmp_path):
    write(tmp_path, {"w": torch.zeros(2), "rng": {"state": 1}})
    with pytest.raises(RuntimeError, match=r"lists rng.*, which is not a tensor"):
        read_shapes(tmp_path)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/b"])
def test_files_elsewhere_are_refused(folder, path):
    content = table(folder)
    next(iter(content.storage_data.values())).relative_path = path
    replace_table(folder, content)
    with pytest.raises(RuntimeError, match=f"points to {path}"):
        read_shapes(folder)


def test_transformed_files_are_refused(folder):
    content = table(folder)
    next(iter(content.storage_data.values())).transform_descriptors = ["zstd"]
    replace_table(folder, content)
    with pytest.raises(RuntimeError, match="asks for the files to be transformed"):
        read_shapes(folder)


def test_a_listed_file_must_exist(folder):
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(RuntimeError, match=r"lists __0_0.distcp, which is missing"):
        read_shapes(folder)


def refusal(folder):
    """What `read_shapes` refuses a table with; none if it takes it."""
    try:
        read_shapes(folder)
    except RuntimeError as error:
        return str(error)
    return None


def test_every_truncation_and_every_changed_byte_is_read_or_refused(folder):
    data = (folder / ".metadata").read_bytes()
    messages = set()
    for position in range(0, len(data), 3):
        for bad in (data[:position], data[:position] + b"\xff" + data[position + 1 :]):
            (folder / ".metadata").write_bytes(bad)
            messages.add(refusal(folder))
    assert all(m is None or "must be a plain table of tensors" in m for m in messages)
    assert {None} < messages
