"""Write the checkpoints of a run, and go on from the newest one."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from marlhf_mega.checkpoint.contents import read_state
from marlhf_mega.checkpoint.saver import Saver, check_space, check_writable, clear_leftovers
from marlhf_mega.checkpoint.sharded import Saveable
from marlhf_mega.checkpoint.store import find, load
from marlhf_mega.config.checks import Job
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.collectives import broadcast_object
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.resume import CONFIG, check_fresh_start, check_settings, starts_afresh

logger = logging.getLogger(__name__)


def make_saver(config: Config, mesh: Mesh) -> Saver:
    """Return what writes this run's checkpoints."""
    settings = config.checkpoint
    return Saver(
        config.run.dir,
        mesh,
        keep=settings.keep,
        keep_every=settings.keep_every,
        background=settings.async_save,
    )


def resume(
    config: Config,
    job: Job,
    roles: Mapping[str, Saveable],
    mesh: Mesh,
    *,
    required: Sequence[str],
) -> dict[str, Any] | None:
    """Restore the trained models and return the rest of the state; none for a fresh start.

    Args:
        config: of this run.
        job: whose settings must be those of the checkpoint.
        roles: the models of its checkpoints, built as for a fresh start.
        mesh: this rank's mesh.
        required: keys that the state must have.

    Raises:
        ConfigError: there is nothing to resume from but `checkpoint.resume=must`, or a setting is
            not as it must be.
        RuntimeError: checkpoints could not be written, or a part of the state is missing.
    """
    check_writable(config.run.dir, mesh)
    clear_leftovers(config.run.dir, mesh)
    check_space(config.run.dir, roles, mesh)
    if broadcast_object(starts_afresh(config)):
        return None
    found = find(config.run.dir, mesh)
    if found is None:
        check_fresh_start(config)
        return None
    # Before the weights: a changed model is better named by its key than by a tensor's shape.
    check_settings(read_state(found).get(CONFIG, {}), config, job)
    state = load(found, roles, mesh, required=(*required, CONFIG))
    logger.info("resuming from %s", found)
    return state
