"""Which library multiplies on CPUs: measured at the first start of a run, and kept."""

import json
import logging
from collections.abc import Mapping
from typing import Any, get_args

from marlhf_mega import durable
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform.cpu import matmul
from marlhf_mega.train.resume import starts_afresh

logger = logging.getLogger(__name__)

PRODUCTS_FILE = "products.json"


def choose_products(config: Config, mesh: Mesh) -> None:
    """Choose by `precision.cpu_products`; the first rank measures for all. All ranks call it.

    What a run has chosen stays, so that it computes the same after a resume, on any machine.

    Raises:
        ConfigError: the file that keeps the choice is damaged.
    """
    if mesh.platform.name != "cpu" or config.precision.dtype == "bfloat16":
        return
    key = config.precision.cpu_products
    if key != "auto":
        matmul.use(dict.fromkeys(matmul.PRODUCTS, key))
        return
    found: Any = None
    if mesh.launch.rank == 0:
        try:
            found = _kept_or_measured(config)
        except ConfigError as error:
            found = error
    found = mesh.launch.broadcast((found,), source=0)[0]
    if isinstance(found, ConfigError):
        raise found
    matmul.use(found)


def _kept_or_measured(config: Config) -> dict[matmul.ProductKind, matmul.Library]:
    path = config.run.dir / PRODUCTS_FILE
    if path.is_file() and not starts_afresh(config, path):
        return _checked(path.read_text(encoding="utf-8"), str(path))
    model = config.model
    ratios = matmul.measured(model.hidden_size, model.ffn_hidden_size)
    libraries = matmul.faster(ratios)
    logger.info("float32 products: %s", describe_products(ratios, libraries))
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, json.dumps(libraries, indent=2) + "\n")
    return libraries


def describe_products(
    ratios: Mapping[matmul.ProductKind, float],
    libraries: Mapping[matmul.ProductKind, matmul.Library],
) -> str:
    """Say in one line what was chosen, and by how much torch's own library is faster."""
    parts = [f"{kind} by {libraries[kind]} (torch {ratios[kind]:.2f}x)" for kind in matmul.PRODUCTS]
    return ", ".join(parts).replace("_", " ")


def _checked(text: str, path: str) -> dict[matmul.ProductKind, matmul.Library]:
    try:
        found = json.loads(text)
        known = {kind: found[kind] for kind in matmul.PRODUCTS}
    except (ValueError, TypeError, KeyError):
        known = {}
    if not known or not set(known.values()) <= {*get_args(matmul.Library)}:
        raise ConfigError(
            f"{path}: must hold the library of each kind of product, onednn or torch; it does not. "
            "Remove it to measure again, or set precision.cpu_products."
        )
    return known
