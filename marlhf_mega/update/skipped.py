"""A minibatch whose gradient is not finite is kept to be looked at, and passed over."""

import logging
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor

from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def keep_skipped(
    num_skipped: int,
    microbatches: Mapping[str, Tensor],
    config: Config,
    mesh: Mesh,
    *,
    role: str,
    step: int,
) -> None:
    """Write this replica's share of the minibatch to `run.dir`/skipped; stop after too many.

    All ranks call it after a skipped step, and all of them raise or none does.

    Args:
        num_skipped: consecutive steps that were skipped, this one included.
        microbatches: what its losses were made of, by name.
        config: of the run.
        mesh: this rank's mesh.
        role: policy, critic or reward.
        step: of the run, from 0; files and messages count from 1, as metrics do.

    Raises:
        RuntimeError: more than `run.max_skipped_steps` optimizer steps were skipped in a row.
    """
    folder = config.run.dir / "skipped"
    if mesh.is_replica_leader:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step + 1:06d}_{role}_replica{mesh.dp_rank}_{num_skipped}.safetensors"
        tensors = {key: value.detach().cpu().contiguous() for key, value in microbatches.items()}
        save_file(tensors, folder / name)
    if mesh.rank == 0:
        logger.warning(
            "step %d: the gradient of %s is not finite; no weight was changed, the minibatch is "
            "in %s",
            step + 1,
            role,
            folder,
        )
    if num_skipped > config.run.max_skipped_steps:
        section = "reward_model" if role == "reward" else role
        raise RuntimeError(
            f"run.max_skipped_steps={config.run.max_skipped_steps}: no more optimizer steps may "
            f"be skipped in a row; {num_skipped} gradients of {role} were not finite, the "
            f"last at step {step + 1}. Look at {folder}, or lower {section}.lr."
        )
