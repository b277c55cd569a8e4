"""Go on from the newest checkpoint of the run directory, as the config says."""

import logging
from collections.abc import Mapping
from typing import Any

from marlhf_mega.checkpoint.store import find, load
from marlhf_mega.config.schema import Config
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def resume(config: Config, roles: Mapping[str, TrainState], mesh: Mesh) -> dict[str, Any] | None:
    """Restore the trained models and return the rest of the state; none for a fresh start.

    Raises:
        RuntimeError: `checkpoint.resume=must` and there is nothing to go on from.
    """
    if config.checkpoint.resume == "never":
        return None
    found = find(config.run.dir, mesh)
    if found is None:
        if config.checkpoint.resume == "must":
            raise RuntimeError(
                f"checkpoint.resume=must: {config.run.dir} has no checkpoint that can be loaded. "
                "Set it to auto to start afresh."
            )
        return None
    state = load(found, roles, mesh)
    logger.info("going on from %s", found)
    return state
