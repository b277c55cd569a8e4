"""Every file in configs/ loads, and holds only what differs from the defaults."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from marlhf_mega.config.load import load_config
from marlhf_mega.config.schema import Config

FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_loads(path):
    # Runs start from one another; here none of them has been made.
    config = load_config(path, ["model.init=random"])
    assert config.run.name != Config().run.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_repeats_no_default(path):
    defaults = Config().model_dump(mode="json")
    for section, values in OmegaConf.to_container(OmegaConf.load(path)).items():
        repeated = [key for key, value in values.items() if defaults[section][key] == value]
        assert repeated == [], f"{path.name}: {section}"
