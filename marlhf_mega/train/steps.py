"""How many steps a run takes."""

import logging

from marlhf_mega.config.schema import Config

logger = logging.getLogger(__name__)


def num_steps(config: Config, num_examples: int, batch_size: int, *, key: str) -> int:
    """Return `run.steps`, or the steps of `run.epochs`; say what the last pass leaves out.

    Args:
        config: of the run.
        num_examples: training examples of one pass, at least 1.
        batch_size: examples of a step, over all ranks.
        key: of `batch_size`, for the message.
    """
    if config.run.steps is not None:
        return config.run.steps
    epochs = config.run.epochs or 1
    passes = "one pass" if epochs == 1 else f"{epochs} passes"
    steps, rest = divmod(epochs * num_examples, batch_size)
    if steps == 0:
        logger.info(
            "%d training examples at %s=%d: %s is one step, in which some are used twice or more",
            num_examples,
            key,
            batch_size,
            passes,
        )
        return 1
    if rest:
        logger.info(
            "%d training examples at %s=%d: %d are left out of %s (steps: %d). Set run.steps to "
            "reach them.",
            num_examples,
            key,
            batch_size,
            rest,
            passes,
            steps,
        )
    return steps


def optimizer_steps(config: Config, num_steps: int) -> dict[str, int]:
    """Return how many steps each optimizer takes in a run of `num_steps` PPO steps."""
    each = config.ppo.epochs * (config.rollout.trained_size // config.ppo.minibatch_size)
    resting = min(config.ppo.critic_only_steps, num_steps)
    return {"policy": (num_steps - resting) * each, "critic": num_steps * each}
