"""Models in and out of Hugging Face folders, without training. All ranks call these functions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.checkpoint.hf.exporter import ExportReport
from marlhf_mega.checkpoint.saver import save
from marlhf_mega.checkpoint.store import load_weights
from marlhf_mega.checkpoint.weights import fill_from, roles_of
from marlhf_mega.config.origin import Origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import Head, StageModel, build_chunks
from marlhf_mega.models.roles import score_step
from marlhf_mega.parallel.collectives import gather_over_tensor
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.output import write_run_directory

Progress = Callable[[int], None]


def role_of(origin: Origin, *, key: str) -> str:
    """Return the role that an origin's model plays: policy or reward."""
    return "reward" if "reward" in roles_of(origin, key=key) else "policy"


def import_model(
    origin: Origin, role: str, config: Config, mesh: Mesh, *, progress: Progress | None = None
) -> list[StageModel]:
    """Build a model of a Hugging Face folder and fill it."""
    head: Head = "scalar" if role == "reward" else "language"
    chunks = build_chunks(origin.model, config.precision, mesh, head=head)
    fill_from(origin, chunks, mesh, seed=config.run.seed, progress=progress)
    return chunks


def write_run(
    chunks: Sequence[StageModel],
    role: str,
    config: Config,
    tokenizer_path: Path,
    mesh: Mesh,
) -> Path:
    """Write a model as a run directory that `model.init` or `reward.source` can name."""
    if mesh.rank == 0:
        write_run_directory(config, Tokenizer.load(tokenizer_path), tokenizer_path, mesh)
    return save(config.run.dir, 0, {role: chunks}, {}, mesh, keep=1)


def export_run(
    origin: Origin,
    role: str,
    config: Config,
    mesh: Mesh,
    *,
    target: Path,
    progress: Progress | None = None,
) -> ExportReport:
    """Export one role of a run's newest checkpoint."""
    head: Head = "language" if role == "policy" else "scalar"
    chunks = build_chunks(origin.model, config.precision, mesh, head=head)
    load_weights(origin.path, chunks, mesh, role=role)
    tokenizer = Tokenizer.load(origin.path / "tokenizer")
    return export_hf(chunks, config, mesh, target=target, tokenizer=tokenizer, progress=progress)


def answer_ids(
    chunks: Sequence[StageModel], rows: Sequence[list[int]], mesh: Mesh, *, new_tokens: int
) -> dict[str, Tensor]:
    """Run a model on token ids through the paths that training and rollout use.

    Returns:
        For every row I of a language model `logits.I` float32 [tokens, vocab] and `generated.I`
        int64 [new_tokens], its greedy continuation; of a reward model `score.I` float32 [1].
        Logits are there on the last stage only.
    """
    if chunks[0].head == "scalar":
        prompts, rest = [row[:1] for row in rows], [row[1:] for row in rows]
        grid = forward_rows(
            chunks, prompts, rest, mesh=mesh, limit=MicrobatchLimit(rows=len(rows)), run=score_step
        )
        return {f"score.{i}": grid[i, len(r) - 1].reshape(1).cpu() for i, r in enumerate(rest)}
    made = Generator(chunks, mesh, eos_id=-1).generate(
        rows,
        range(len(rows)),
        rule=SamplingRule(temperature=0.0),
        max_response_tokens=new_tokens,
        seed=0,
        step=0,
    )
    logits = _all_logits(chunks, rows, mesh)
    return {
        **{f"generated.{i}": torch.tensor(r) for i, r in enumerate(made.responses)},
        **{f"logits.{i}": values.contiguous() for i, values in enumerate(logits)},
    }


def _all_logits(
    chunks: Sequence[StageModel], rows: Sequence[list[int]], mesh: Mesh
) -> list[Tensor]:
    batch = SequenceBatch.create(
        [row[:1] for row in rows],
        [row[1:] for row in rows],
        pad_id=0,
        multiple=mesh.sequence_multiple,
        device=mesh.device,
    )
    # An interleaved pipeline needs as many microbatches as stages; they are all the same.
    batches = [batch] * (mesh.pp_size if mesh.num_chunks > 1 else 1)
    outputs = run_forward(chunks, batches, lambda chunk, b: chunk.logits(b))
    if not outputs:
        return []
    whole = gather_over_tensor(outputs[0].flatten(0, 1), mesh.groups.tp).cpu()
    whole = whole[:, : chunks[0].model.vocab_size].unflatten(0, (len(rows), -1))
    return [logits[: len(row)] for logits, row in zip(whole, rows, strict=True)]
