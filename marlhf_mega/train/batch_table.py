"""The table of batch sizes that a job starts with: what happens how often, and why."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.config.limits import round_up
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.offline import OfflineConfig, PreferenceConfig
from marlhf_mega.config.sections.ppo import PPOConfig
from marlhf_mega.config.sections.training import RewardModelConfig, SftConfig
from marlhf_mega.parallel.mesh import Mesh

_Supervised = SftConfig | RewardModelConfig | PreferenceConfig | OfflineConfig
BatchRow = tuple[str, str, str]
"""What, from which numbers, how many."""


def batches(config: Config, job: TrainingJob, mesh: Mesh) -> list[BatchRow]:
    """Resolve the batch sizes of a job on a training rank's mesh."""
    section: _Supervised
    match job:
        case "ppo":
            return _ppo_batches(config, mesh)
        case "sft":
            section, key, item = config.sft, "sft", "sequences"
        case "reward":
            section, key, item = config.reward_model, "reward_model", "pairs"
        case "preference":
            section, key, item = config.preference, "preference", "pairs"
        case "offline":
            section, key, item = config.offline, "offline", "responses"
    size, replicas = section.batch_size, mesh.dp_size
    return [
        (f"{item} per optimizer step", f"{key}.batch_size", f"{size:,}"),
        _share(item, size, replicas),
        _microbatches(section, size // replicas, mesh),
    ]


def _ppo_batches(config: Config, mesh: Mesh) -> list[BatchRow]:
    rollout, ppo = config.rollout, config.ppo
    size, each = rollout.batch_size, rollout.samples_per_prompt
    kept = rollout.trained_size
    minibatches = kept // ppo.minibatch_size
    return [
        ("prompts per PPO step", f"{size:,} / {each} samples each", f"{size // each:,}"),
        ("sequences per PPO step", "rollout.batch_size", f"{size:,}"),
        _generation(config, mesh),
        *([] if size == kept else [("sequences trained on", f"{rollout.filter}", f"{kept:,}")]),
        _share("sequences", kept, mesh.dp_size),
        (
            "optimizer steps per PPO step",
            f"{ppo.epochs} epochs x {kept:,} / minibatch {ppo.minibatch_size:,}",
            f"{ppo.epochs * minibatches:,}",
        ),
        _microbatches(ppo, ppo.minibatch_size // mesh.dp_size, mesh),
    ]


def _generation(config: Config, mesh: Mesh) -> BatchRow:
    """Describe who generates, and how many sequences of a replica are decoded together."""
    rollout, parallel = config.rollout, config.rollout_parallel
    ranks = rollout.ranks or mesh.world_size
    replicas = ranks // parallel.model_size
    share = -(-rollout.batch_size // replicas)
    who = f"{rollout.ranks} rollout ranks" if rollout.ranks else "all ranks"
    layout = f"TP{parallel.tensor_size} x PP{parallel.pipeline_size} x DP{replicas}"
    return (
        "sequences decoded together",
        f"{who}: {layout}",
        f"{min(share, rollout.slots or share):,}",
    )


def _share(item: str, size: int, replicas: int) -> BatchRow:
    return f"{item} per replica", f"{size:,} / {replicas} data-parallel", f"{size // replicas:,}"


def _microbatches(section: _Supervised | PPOConfig, share: int, mesh: Mesh) -> BatchRow:
    """Describe the microbatches of a replica's share of an optimizer step."""
    what = "microbatches per optimizer step"
    layout = "packed" if section.packing else "padded"
    tokens = section.microbatch_tokens if isinstance(section, PPOConfig) else None
    if tokens is not None:
        return what, f"up to {tokens:,} tokens each, {layout}", "by length"
    size = section.microbatch_size
    # An interleaved pipeline needs a multiple of its stages.
    count = round_up(-(-share // size), mesh.pp_size if mesh.num_chunks > 1 else 1)
    return what, f"{share:,} / microbatch {size:,}, {layout}", f"{count:,}"


def show_batches(rows: Sequence[BatchRow], *, console: Console | None = None) -> None:
    """Show the batch sizes as a table."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(style="dim")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)
