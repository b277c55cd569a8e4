"""The public names of the package."""

import subprocess
import sys

import pytest

import marlhf_mega.algorithm as ma


def test_every_public_name_is_there_and_nothing_else_is_made_up():
    assert len(set(ma.__all__)) == len(ma.__all__)
    for name in ma.__all__:
        assert getattr(ma, name).__name__ == name
        assert getattr(ma, name).__doc__
    with pytest.raises(AttributeError, match="module marlhf_mega.algorithm has no attribute nope"):
        ma.nope  # noqa: B018


def test_the_names_of_the_choices_need_no_torch():
    code = "import sys, marlhf_mega.algorithm.choices; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
