"""What a job is going to do, said before it starts."""

from collections.abc import Iterator
from typing import Any

from marlhf_mega.config.checks import SECTIONS, WITHOUT_TRAINING, Job, rollout_ranks
from marlhf_mega.config.schema import Config
from marlhf_mega.config.unread import unread_keys
from marlhf_mega.data.datasets import PreferencePair, Prompt
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.steps import optimizer_steps


def summary(inputs: Inputs[Any], job: Job, world_size: int) -> str:
    """Return layout, rows, steps and tokens in one line."""
    parts = [
        layout(inputs.config, job, world_size),
        _rows(inputs),
        *_steps(inputs, job),
        _tokens(inputs),
    ]
    return f"ok: {job} on {'; '.join(parts)}"


def layout(config: Config, job: str, world_size: int) -> str:
    """Describe the layout of a launch."""
    generating = rollout_ranks(config, job)
    trained = WorldLayout.of(config.parallel, world_size - generating).describe()
    more = f", {generating} of them generate" if generating else ""
    return f"{trained} ({world_size} rank{'s' * (world_size != 1)}{more})"


def without_effect(inputs: Inputs[Any], job: Job) -> str | None:
    """Name the keys that change nothing in one line; none if all do."""
    config, steps = inputs.config, _num_steps(inputs, job)
    optimizers: dict[str, int] = {}
    if steps is not None and job in SECTIONS:
        trained = "reward_model" if job == "reward" else "policy"
        optimizers = optimizer_steps(config, steps) if job == "ppo" else {trained: steps}
    found = unread_keys(config, job, optimizers)
    return f"without effect: {'; '.join(found)}" if found else None


def _rows(inputs: Inputs[Any]) -> str:
    train, held_out = len(inputs.train), len(inputs.validation)
    return f"{train:,} rows, {held_out:,} held out" if train else f"{held_out:,} rows"


def _steps(inputs: Inputs[Any], job: Job) -> Iterator[str]:
    if job in WITHOUT_TRAINING:
        return
    steps, size = _num_steps(inputs, job), _rows_per_step(inputs.config, job)
    # Which of the responses are good enough is known once their prompts have values.
    yield f"{'one pass in steps' if steps is None else f'{steps:,} steps'} of {size:,} rows"


def _num_steps(inputs: Inputs[Any], job: Job) -> int | None:
    """Return the steps of the run; None if they depend on what is computed before."""
    config = inputs.config
    if config.run.steps is not None or job in WITHOUT_TRAINING:
        return config.run.steps
    if job == "offline" and config.offline.sampling != "all":
        return None
    rows = (config.run.epochs or 1) * inputs.epoch_size
    return max(1, rows // _rows_per_step(config, job))


def _rows_per_step(config: Config, job: Job) -> int:
    if job == "ppo":
        return config.rollout.batch_size // config.rollout.samples_per_prompt
    size: int = getattr(config, SECTIONS[job]).batch_size
    return size


def _tokens(inputs: Inputs[Any]) -> str:
    """Describe the tokens of one pass over the rows that the job works on."""
    lengths = [_length(example) for example in inputs.train or inputs.validation]
    what = "tokens"
    if isinstance((inputs.train or inputs.validation)[0], Prompt):
        what = "prompt tokens"
    return f"{sum(lengths):,} {what}, longest {max(lengths):,}"


def _length(example: Any) -> int:
    prompt = len(example.prompt_ids)
    if isinstance(example, PreferencePair):
        return sum(prompt + len(response) for response in example.responses)
    return prompt + len(getattr(example, "response_ids", ()))
