"""What a job runs: its models and the sizes of its batches, at their longest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from marlhf_mega.config.checks import check_other_model, check_world, rollout_ranks
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.layout import Layout, round_up
from marlhf_mega.plan.parameters import Head

PlannedJob = Literal["sft", "reward", "ppo"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a job."""

    name: str
    model: ModelConfig
    head: Head
    learns: bool
    is_assumed: bool = False
    """Its origin is not on this disk: it is taken to have the policy's shape."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One forward at its largest: every sequence as long as the configuration allows."""

    rows: int
    seq: int
    """Tokens of a sequence, padding to the ranks that share it included."""
    response: int
    """Response tokens of a sequence."""
    packed: int | None = None
    """Tokens of a packed row: beside so many sequences a shorter one. None: each has its row."""

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.seq if self.packed is None else self.packed

    @property
    def response_tokens(self) -> int:
        """Tokens that the head sees."""
        return -(-self.tokens * self.response // self.seq)

    @property
    def positions(self) -> int:
        """Rotary angles: rows share them."""
        return self.seq if self.packed is None else self.packed

    @property
    def pairs(self) -> int:
        """Pairs of positions of a sequence, over all sequences."""
        return self.rows * self.seq**2 + (self.tokens - self.rows * self.seq) ** 2

    def describe(self) -> str:
        """Say the sizes, such as `4 x 512 tokens`."""
        return f"{self.rows} x {self.seq}" if self.packed is None else f"{self.packed} packed"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job on a world."""

    config: Config
    job: PlannedJob
    layout: Layout
    """Of the ranks that train."""
    num_rollout_ranks: int
    """Ranks beside them that only generate; 0: those that train generate as well."""
    roles: tuple[Role, ...]
    microbatch: Microbatch
    """Of passes that train."""
    scoring: Microbatch
    """Of passes that keep nothing for a backward pass."""
    num_microbatches: int
    """Per optimizer step and data-parallel rank."""
    minibatch_rows: int
    """Sequences per optimizer step and data-parallel rank."""
    batch_rows: int
    """Sequences per step and data-parallel rank."""

    @property
    def policy(self) -> Role:
        """The first model that learns."""
        return self.roles[0]

    @property
    def world_size(self) -> int:
        """Ranks of both kinds."""
        return self.layout.world + self.num_rollout_ranks


def workload(config: Config, job: str, world_size: int) -> Workload:
    """Size a job.

    Args:
        config: with the vocabulary size.
        job: sft, reward or ppo.
        world_size: number of ranks of both kinds.

    Raises:
        ConfigError: the job has no plan, the vocabulary size is missing, or the layout does not
            fit.
    """
    if job not in get_args(PlannedJob):
        raise ConfigError(
            f"--job={job}: must be one of {', '.join(get_args(PlannedJob))}; the others have no "
            "plan. Plan ppo for what also generates."
        )
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size: a plan needs it; it is not set. Set it, or model.hf_path or "
            "tokenizer.path."
        )
    apart = rollout_ranks(config, job)
    check_world(config, world_size, apart=apart)
    planned = cast(PlannedJob, job)
    roles = _roles(config, planned)
    for role in roles:
        if role.model != config.model:
            num_ranks = world_size - apart
            check_other_model(config, role.model, num_ranks, what=role.name, learns=role.learns)
    layout = Layout.of(config.parallel, world_size - apart)
    rows, minibatch, batch = _rows(config, planned, layout)
    microbatch = _microbatch(config, planned, layout, rows=rows, most=max(1, minibatch))
    scoring = microbatch
    if planned == "ppo":
        factor = config.ppo.scoring_microbatch_factor
        most = _most_scored(config, layout, batch)
        scoring = _microbatch(config, planned, layout, rows=rows, most=most, factor=factor)
    count = -(-minibatch // microbatch.rows)
    return Workload(
        config=config,
        job=planned,
        layout=layout,
        num_rollout_ranks=apart,
        roles=roles,
        microbatch=microbatch,
        scoring=scoring,
        num_microbatches=round_up(count, layout.pipeline if layout.chunks > 1 else 1),
        minibatch_rows=minibatch,
        batch_rows=batch,
    )


def _most_scored(config: Config, layout: Layout, batch: int) -> int:
    """Return the sequences that one replica scores in a microbatch, however many may go in one.

    An interleaved pipeline cuts them to as many microbatches as it has stages.
    """
    if config.data.validation_path is not None:
        batch = max(batch, -(-config.evaluate.num_prompts // layout.data))
    return max(1, -(-batch // (layout.pipeline if layout.chunks > 1 else 1)))


def microbatch_keys(config: Config, job: str, *, rows: int, seq: int) -> dict[str, int]:
    """Return the key that makes microbatches of `rows` sequences of `seq` tokens."""
    if job == "ppo" and config.ppo.microbatch_tokens is not None:
        return {"ppo.microbatch_tokens": rows * seq}
    section = {"sft": "sft", "reward": "reward_model"}.get(job, "ppo")
    return {f"{section}.microbatch_size": rows}


def _microbatch(
    config: Config, job: PlannedJob, layout: Layout, *, rows: int, most: int, factor: int = 1
) -> Microbatch:
    """Size a forward of `rows` sequences, or of a number of tokens, times a factor.

    It never has more than `most` sequences.
    """
    packs = {
        "sft": config.sft.packing,
        "reward": config.reward_model.packing,
        "ppo": config.ppo.packing,
    }[job]
    new = config.rollout if job == "ppo" else config.data
    seq = config.data.max_prompt_tokens + new.max_response_tokens
    share = layout.sequence_share * layout.context_multiple
    seq = round_up(seq, layout.context_multiple if packs else share)
    budget = config.ppo.microbatch_tokens if job == "ppo" else None
    if budget is not None:
        budget *= factor
        rows = max(1, budget // seq)
    else:
        rows *= factor
    rows = min(rows, most)
    tokens = rows * seq if budget is None else min(budget, most * seq)
    return Microbatch(
        rows=rows,
        seq=seq,
        response=new.max_response_tokens,
        packed=round_up(tokens, share) if packs else None,
    )


def _rows(config: Config, job: PlannedJob, layout: Layout) -> tuple[int, int, int]:
    """Return rows of a microbatch, of an optimizer step and of a step, on one replica."""
    match job:
        case "sft":
            size = config.sft.microbatch_size
            step = config.sft.batch_size // layout.data
            return size, step, step
        case "reward":  # both sides of a pair go through together
            size = 2 * config.reward_model.microbatch_size
            step = 2 * config.reward_model.batch_size // layout.data
            return size, step, step
    minibatch = config.ppo.minibatch_size // layout.data
    return config.ppo.microbatch_size, minibatch, config.rollout.batch_size // layout.data


def _roles(config: Config, job: PlannedJob) -> tuple[Role, ...]:
    model = config.model
    if job == "sft":
        return (Role(name="policy", model=model, head="language", learns=True),)
    if job == "reward":
        return (Role(name="reward", model=model, head="scalar", learns=True),)
    terms = [term.source for term in config.reward.source if term.is_model]
    shapes = [_shape(source, model) for source in terms]
    match config.critic.init:
        case "reward" if terms:
            critic = shapes[0]
        case "reward" | "policy":
            critic = model, False
        case path:
            critic = _shape(path, model)
    names = ["reward"] if len(terms) == 1 else [f"reward {n}" for n in range(1, len(terms) + 1)]
    return (
        Role(name="policy", model=model, head="language", learns=True),
        Role(name="critic", model=critic[0], head="scalar", learns=True, is_assumed=critic[1]),
        Role(name="reference", model=model, head="language", learns=False),
        *(
            Role(name=name, model=shape, head="scalar", learns=False, is_assumed=assumed)
            for name, (shape, assumed) in zip(names, shapes, strict=True)
        ),
    )


def _shape(source: str, policy: ModelConfig) -> tuple[ModelConfig, bool]:
    """Return a model's shape, and whether it is only assumed because it is not on this disk."""
    if not Path(source).exists():
        return policy, True
    return find_origin(Path(source), key="reward.source").model, False
