"""The structure reports of tools/check.py, on a small repository made for the purpose."""

import importlib
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"

OLD = {
    "marlhf_mega/cli.py": "def main() -> int:\n    return 0\n",
    "marlhf_mega/train/loop.py": "STEPS = 3\n\n\ndef run() -> None:\n    print(STEPS)\n",
}
NEW = {
    "marlhf_mega/cli.py": OLD["marlhf_mega/cli.py"],
    "marlhf_mega/loops/loop.py": '''"""A module
of two docstring lines."""

import logging

logger = logging.getLogger(__name__)
STEPS = 3  # code with a comment
"""What STEPS means."""
# A comment alone.

Rows = list[int]


def run() -> str:
    """Run."""

    text = """a string
    that is code"""
    return text


def _private() -> None: ...
''',
    "marlhf_mega/loops/other/deep.py": """import logging
from marlhf_mega.loops.loop import Rows
logger = logging.getLogger(__name__)
STEPS: int = 4
class Rows: ...
def _private() -> None: ...
""",
    "tools/tool.py": "def long() -> None:\n" + "    print(1)\n" * 9,
}


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("structure")


@pytest.fixture
def repository(tmp_path):
    """A working tree that differs from its only commit."""

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    write(tmp_path, OLD)
    git("add", ".")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    git(*author, "commit", "--quiet", "--message", "old")
    (tmp_path / "marlhf_mega/train/loop.py").unlink()
    write(tmp_path, NEW)
    return tmp_path


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_reports_compare_the_tree_with_a_commit(structure, repository, capsys):
    structure.print_reports(repository, structure.find_base(repository, "HEAD"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith((".", "loops", "train", "total"))]
    # loop.py: 4 lines at the top, 4 of run, 1 of _private; deep.py: 6.
    assert rows == [
        [".", "2", "2", "+0"],
        ["loops", "0", "15", "+15"],
        ["train", "3", "0", "-3"],
        ["total", "5", "17", "+12"],
    ]
    longest = lines.index("longest functions") + 1
    assert lines[longest].split() == ["10", "lines", "tools/tool.py:1", "long"]
    assert lines[-2:] == [
        "Rows: loops.loop, loops.other.deep",
        "STEPS: loops.loop, loops.other.deep",
    ]


def test_without_a_base_the_tree_stands_alone(structure, repository, capsys):
    assert structure.find_base(repository, None) is None  # one commit has none before it
    structure.print_reports(repository, None)
    lines = capsys.readouterr().out.splitlines()
    assert ["total", "17"] in [line.split() for line in lines]


def test_a_base_that_git_does_not_know_is_refused(structure, repository):
    with pytest.raises(ValueError, match=r"--base=v9: must name a commit; git knows none\."):
        structure.find_base(repository, "v9")
