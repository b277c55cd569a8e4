"""How large the steps are, and what they share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import ParallelConfig, PrecisionConfig
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh
from marlhf_mega.platform import Platform

Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the steps that measure speed."""

    model: ModelConfig
    decode_batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    train_batch: int
    """Sequences of an optimizer step, in four microbatches."""
    train_tokens: int
    attention: tuple[int, int, int]
    """Sequences, heads and channels of a head."""
    head: tuple[int, int, int]
    """Tokens, hidden size and vocabulary of the log-prob head."""
    copied_bytes: int
    quickstart: tuple[str, ...]


BILLION = Sizes(
    model=ModelConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=8192,
        vocab_size=32000,
    ),
    decode_batches=(8, 64, 256),
    prompt_tokens=256,
    new_tokens=32,
    train_batch=16,
    train_tokens=1024,
    attention=(8, 32, 64),
    head=(8192, 2048, 128256),
    copied_bytes=1 << 28,
    quickstart=("run.steps=3",),
)
"""A policy of 1B shape. It needs 40 GiB of GPU memory."""

SMALL = Sizes(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        vocab_size=64,
    ),
    decode_batches=(2, 4),
    prompt_tokens=6,
    new_tokens=3,
    train_batch=4,
    train_tokens=8,
    attention=(2, 4, 8),
    head=(64, 32, 128),
    copied_bytes=1 << 16,
    quickstart=(
        "run.steps=1",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "sft.batch_size=8",
        "reward_model.batch_size=8",
        "rollout.batch_size=8",
        "ppo.minibatch_size=8",
        "evaluate.num_prompts=8",
    ),
)
"""What a dry run walks through on a CPU in seconds."""


class Skip(Exception):  # noqa: N818 - it is no error
    """Why a step has nothing to do here."""


@contextmanager
def one_rank() -> Iterator[Mesh]:
    """Give the mesh of this process alone."""
    mesh = create_mesh(ParallelConfig())
    try:
        yield mesh
    finally:
        destroy_mesh()


def policy(sizes: Sizes, mesh: Mesh, *, fp8: str = "off") -> list[StageModel]:
    """Return a policy with random weights, in bfloat16 on a GPU."""
    precision = PrecisionConfig.model_validate({"fp8": fp8})
    chunks = build_chunks(sizes.model, precision, mesh, head="language")
    fill_random(chunks, mesh, seed=1)
    return chunks


def seconds(work: Callable[[], object], platform: Platform, *, repeats: int = 3) -> list[float]:
    """Return the seconds of each call, after which the device is idle."""
    taken = []
    for _ in range(repeats):
        platform.synchronize()
        start = time.perf_counter()
        work()
        platform.synchronize()
        taken.append(time.perf_counter() - start)
    return taken
