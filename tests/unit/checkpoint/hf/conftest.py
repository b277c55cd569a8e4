import shutil

import pytest

from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.config.hf import head_of_hf_config, model_config_from_hf, read_hf_config
from marlhf_mega.config.model import ModelConfig
from tests.unit.checkpoint.hf.transfers import run_clean


@pytest.fixture(scope="session")
def hf_root(tmp_path_factory):
    """A folder with one tiny Hugging Face model per family."""
    root = tmp_path_factory.mktemp("hf")
    run_clean("make_hf.py", root)
    return root


@pytest.fixture(scope="session")
def table_of():
    def build(folder, head=None):
        config = model_config_from_hf(folder, ModelConfig(hf_path=folder))
        found = head_of_hf_config(read_hf_config(folder, where="test"), where="test")
        return WeightTable(config, head or found)

    return build


@pytest.fixture
def folder(hf_root, tmp_path):
    """A copy of a Llama in several shards, to be damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(hf_root / "llama2", copy)
    return copy
