import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.config.hf import head_of_hf_config, model_config_from_hf, read_hf_config
from marlhf_mega.config.model import ModelConfig

HERE = Path(__file__).parent


def run_clean(script, *arguments):
    """Run a script where transformers is alone; returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
