"""The choice of a library is made once for a run."""

import json

import pytest

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.platform.cpu import matmul
from marlhf_mega.train.products import PRODUCTS_FILE, choose_products


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(ParallelConfig())
    destroy_mesh()


@pytest.fixture(autouse=True)
def onednn():
    yield
    matmul.use(dict.fromkeys(matmul.PRODUCTS, "onednn"))


def config(folder, key="auto", resume="auto"):
    return Config.model_validate(
        {
            "run": {"dir": folder},
            "precision": {"cpu_products": key, "dtype": "float32"},
            "checkpoint": {"resume": resume},
        }
    )


def in_use():
    return {kind: matmul.library_of(kind) for kind in matmul.PRODUCTS}


def measure_as(monkeypatch, **ratios):
    found = dict.fromkeys(matmul.PRODUCTS, 1.0) | ratios
    monkeypatch.setattr(matmul, "measured", lambda inner, columns: found)


def test_the_first_start_measures_and_later_ones_keep_to_it(mesh, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    measure_as(monkeypatch, forward=1.5)
    choose_products(config(tmp_path), mesh)
    chosen = dict.fromkeys(matmul.PRODUCTS, "onednn") | {"forward": "torch"}
    assert in_use() == chosen == json.loads((tmp_path / PRODUCTS_FILE).read_text())
    assert (
        "float32 products: forward by torch (torch 1.50x), input gradient by onednn" in caplog.text
    )
    # Another machine, on which the other library is faster.
    measure_as(monkeypatch, decode=2.0)
    matmul.use(dict.fromkeys(matmul.PRODUCTS, "onednn"))
    choose_products(config(tmp_path), mesh)
    assert in_use() == chosen
    choose_products(config(tmp_path, resume="never"), mesh)
    assert in_use() == dict.fromkeys(matmul.PRODUCTS, "onednn") | {"decode": "torch"}


def test_the_key_decides_without_a_measurement(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(matmul, "measured", lambda inner, columns: 1 / 0)
    for key in ("torch", "onednn"):
        choose_products(config(tmp_path, key), mesh)
        assert in_use() == dict.fromkeys(matmul.PRODUCTS, key)
    assert not (tmp_path / PRODUCTS_FILE).exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"forward": "torch"}'])
def test_a_damaged_choice_is_one_line(mesh, tmp_path, text):
    (tmp_path / PRODUCTS_FILE).write_text(text)
    with pytest.raises(
        ConfigError, match=r"products.json: must hold .* Remove it to measure again"
    ):
        choose_products(config(tmp_path), mesh)
