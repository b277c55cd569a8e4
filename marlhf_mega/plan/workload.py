"""What a job runs: its models, and the largest sizes of its batches."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

from marlhf_mega.config.checks import SECTIONS, check_other_model, check_world, rollout_ranks
from marlhf_mega.config.limits import gpu_width, round_up
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.layout import WorldLayout

PlannedJob = Literal["sft", "reward", "preference", "ppo"]
GENERATING_ROLES = ("policy", "mask")
"""Models that generate, and are never offloaded; the mask policy does nothing else."""
_Shape = tuple[ModelConfig, LoraConfig, bool]
"""A model's shape, its adapters, and whether that is an assumption: its folder is missing."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a job."""

    name: str
    model: ModelConfig
    head: Head
    learns: bool
    is_policy: bool = False
    """Whether it is the policy without its adapters, which takes no memory of its own."""
    shares_base: bool = False
    """Whether its frozen weights are the policy's: its own are adapters and a head."""
    is_assumed: bool = False
    """Its folder does not exist here, so it is assumed to have the policy's shape."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchShape:
    """The largest forward pass: all sequences as long as the configuration allows."""

    sequences: int
    seq: int
    """Tokens of a sequence, with padding for context and sequence parallelism."""
    response: int
    """Response tokens of a sequence."""
    packed: int | None = None
    """Width of the row when packed. None means padded."""
    filled: int | None = None
    """Tokens of the full sequences and of a shorter one in such a row; the rest is padding."""

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.sequences * self.seq if self.packed is None else self.packed

    @property
    def filled_tokens(self) -> int:
        """Tokens, without the padding at the end of a packed row."""
        return self.tokens if self.filled is None else self.filled

    @property
    def response_tokens(self) -> int:
        """Tokens that the head sees."""
        return -(-self.filled_tokens * self.response // self.seq)

    @property
    def positions(self) -> int:
        """Positions with rotary angles, which padded sequences share."""
        return self.seq if self.packed is None else self.packed

    @property
    def pairs(self) -> int:
        """Pairs of positions in the same sequence, over all sequences."""
        shorter = self.filled_tokens - self.sequences * self.seq
        padding = self.tokens - self.filled_tokens
        return self.sequences * self.seq**2 + shorter**2 + padding**2

    def describe(self) -> str:
        """Return the sizes as text, such as `4 x 512`."""
        return f"{self.sequences} x {self.seq}" if self.packed is None else f"{self.packed} packed"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job on a number of ranks."""

    config: Config
    job: PlannedJob
    layout: WorldLayout
    """Of the ranks that train."""
    num_rollout_ranks: int
    """Number of ranks that only generate; 0 means that training ranks generate."""
    roles: tuple[Role, ...]
    microbatch: MicrobatchShape
    """Of training passes."""
    scoring: MicrobatchShape
    """Of passes without a backward pass."""
    num_microbatches: int
    """Per optimizer step and data-parallel rank."""
    minibatch_sequences: int
    """Sequences per optimizer step and data-parallel rank."""
    batch_sequences: int
    """Sequences per step and data-parallel rank."""

    @property
    def policy(self) -> Role:
        """The first model that is trained."""
        return self.roles[0]

    @property
    def num_generating(self) -> int:
        """Number of models that generate beside each other."""
        return sum(role.name in GENERATING_ROLES for role in self.roles)

    @property
    def world_size(self) -> int:
        """Number of ranks, of both kinds."""
        return self.layout.world + self.num_rollout_ranks


def workload(config: Config, job: str, world_size: int, *, on_gpu: bool = False) -> Workload:
    """Compute the sizes of a job.

    Args:
        config: with the vocabulary size.
        job: one of `PlannedJob`.
        world_size: number of ranks of both kinds.
        on_gpu: rows are packed by default, and have one of few widths.

    Raises:
        ConfigError: the job cannot be planned, the vocabulary size is missing, or the layout
            does not fit.
    """
    if job not in get_args(PlannedJob):
        raise ConfigError(
            f"--job={job}: must be one of {', '.join(get_args(PlannedJob))}; other jobs "
            "cannot be planned. Use ppo for jobs that generate."
        )
    if job == "preference" and config.preference.is_online:
        raise ConfigError(
            f"preference.loss={config.preference.loss}: cannot be planned, since it generates and "
            "is judged. Plan --job=ppo with the same models and rollout.batch_size as an estimate."
        )
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size: a plan needs it; it is not set. Set it, or model.hf_path or "
            "tokenizer.path."
        )
    config = config.with_packing(on_gpu=on_gpu)
    num_rollout_ranks = rollout_ranks(config, job)
    check_world(config, world_size, num_rollout_ranks=num_rollout_ranks)
    planned = cast(PlannedJob, job)
    roles = _roles(config, planned)
    for role in roles:
        if role.model != config.model:
            num_ranks = world_size - num_rollout_ranks
            check_other_model(config, role.model, num_ranks, what=role.name, learns=role.learns)
    layout = WorldLayout.of(config.parallel, world_size - num_rollout_ranks)
    size, minibatch, batch = _batch_sizes(config, planned, layout)
    shaped = partial(_microbatch, config, planned, layout, size=size, on_gpu=on_gpu)
    microbatch = shaped(most=max(1, minibatch))
    scoring = microbatch
    if planned == "ppo":
        factor = config.ppo.scoring_microbatch_factor
        most = _most_scored(config, layout, batch)
        scoring = shaped(most=most, factor=factor)
    count = -(-minibatch // microbatch.sequences)
    return Workload(
        config=config,
        job=planned,
        layout=layout,
        num_rollout_ranks=num_rollout_ranks,
        roles=roles,
        microbatch=microbatch,
        scoring=scoring,
        num_microbatches=round_up(count, layout.pipeline if layout.chunks > 1 else 1),
        minibatch_sequences=minibatch,
        batch_sequences=batch,
    )


def _most_scored(config: Config, layout: WorldLayout, batch: int) -> int:
    """Return the most sequences that one replica can have in a scoring microbatch.

    An interleaved pipeline splits them into as many microbatches as it has stages.
    """
    if config.data.validation_path is not None:
        settings = config.evaluate
        answers = settings.num_prompts * settings.samples_per_prompt
        batch = max(batch, -(-answers // layout.data))
    return max(1, -(-batch // (layout.pipeline if layout.chunks > 1 else 1)))


def microbatch_keys(config: Config, job: str, *, sequences: int, seq: int) -> dict[str, int]:
    """Return the key and value for microbatches of so many sequences of `seq` tokens."""
    if job == "ppo" and config.ppo.microbatch_tokens is not None:
        return {"ppo.microbatch_tokens": sequences * seq}
    return {f"{SECTIONS[job]}.microbatch_size": sequences}


def _microbatch(
    config: Config,
    job: PlannedJob,
    layout: WorldLayout,
    *,
    size: int,
    most: int,
    on_gpu: bool,
    factor: int = 1,
) -> MicrobatchShape:
    """Size a forward pass of `size` sequences, or of `ppo.microbatch_tokens`, times a factor.

    It never has more than `most` sequences.
    """
    packs = getattr(config, SECTIONS[job]).packing
    new = config.rollout if job == "ppo" else config.data
    seq = config.data.max_prompt_tokens + new.max_response_tokens
    share = layout.sequence_share * layout.context_multiple
    budget = config.ppo.microbatch_tokens if job == "ppo" else None
    budget = None if budget is None else budget * factor
    if on_gpu and not packs:
        seq = gpu_width(seq, packed=False, most=budget)
    seq = round_up(seq, layout.context_multiple if packs else share)
    size = min(most, size * factor if budget is None else max(1, budget // seq))
    tokens = size * seq if budget is None else min(budget, most * seq)
    width = gpu_width(tokens, packed=True, most=budget) if on_gpu else tokens
    return MicrobatchShape(
        sequences=size,
        seq=seq,
        response=new.max_response_tokens,
        packed=round_up(width, share) if packs else None,
        filled=tokens if packs else None,
    )


def _batch_sizes(config: Config, job: PlannedJob, layout: WorldLayout) -> tuple[int, int, int]:
    """Return the sequences of a microbatch, an optimizer step and a step, on one replica."""
    if job == "ppo":
        minibatch = config.ppo.minibatch_size // layout.data
        return config.ppo.microbatch_size, minibatch, config.rollout.batch_size // layout.data
    section = getattr(config, SECTIONS[job])
    # The responses to a prompt are in one microbatch.
    each = {"reward": 2, "preference": config.preference.num_responses}.get(job, 1)
    step = each * section.batch_size // layout.data
    return each * section.microbatch_size, step, step


def _roles(config: Config, job: PlannedJob) -> tuple[Role, ...]:
    model = config.model
    if job in ("sft", "preference"):
        return (Role(name="policy", model=model, head="language", learns=True),)
    if job == "reward":
        return (Role(name="reward", model=model, head="scalar", learns=True),)
    judges = config.reward.models
    shapes = [_shape(judge.source, model) for judge in judges]
    shares = config.reward.share_base
    names = ["reward"] if len(judges) == 1 else [f"reward {n}" for n in range(1, len(judges) + 1)]
    return (
        Role(name="policy", model=model, head="language", learns=True),
        *([_critic(config, shapes)] if config.ppo.has_critic else []),
        *([_reference(config)] if config.has_reference else []),
        *([_mask(config)] if config.rollout.mask_interval is not None else []),
        *(
            Role(
                name=name,
                model=shape.adapted(lora) if shares else shape.plain,
                head="language" if judge.is_language else "scalar",
                learns=False,
                is_assumed=assumed,
                shares_base=shares,
            )
            for name, judge, (shape, lora, assumed) in zip(names, judges, shapes, strict=True)
        ),
    )


def _reference(config: Config) -> Role:
    return Role(
        name="reference",
        model=config.model.plain,
        head="language",
        learns=False,
        is_policy=config.model.lora.is_on,
    )


def _mask(config: Config) -> Role:
    return Role(name="mask", model=config.model, head="language", learns=False)


def _critic(config: Config, rewards: list[_Shape]) -> Role:
    shares = config.critic.share_base
    if shares or config.critic_from_policy:
        model, assumed = config.model, False
    elif config.critic.init == "reward":
        assert config.reward.critic_model is not None
        model, _, assumed = rewards[config.reward.critic_model]
    else:
        model, _, assumed = _shape(config.critic.init, config.model)
    return Role(
        name="critic",
        model=model.adapted(config.model.lora),
        head="scalar",
        learns=True,
        is_assumed=assumed,
        shares_base=shares,
    )


def _shape(source: str, policy: ModelConfig) -> _Shape:
    if not Path(source).exists():
        return policy, policy.lora, True
    origin = find_origin(Path(source), key="reward.source")
    return origin.model, origin.lora, False
