"""The table's names and shapes, against the files that transformers writes."""

import pytest
from safetensors import safe_open

from tests.unit.checkpoint.hf.make_hf import MODELS, SCALAR_HEADS


@pytest.mark.parametrize("family", [*MODELS, *(f"{name}_reward" for name in SCALAR_HEADS)])
def test_a_model_has_the_tensors_that_transformers_saves(family, hf_root, table_of):
    saved = {}
    for path in (hf_root / family).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
            }
    assert table_of(hf_root / family).tensors == saved
