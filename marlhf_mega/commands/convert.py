"""Models from and to Hugging Face folders without training. All ranks call these functions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.checkpoint.contents import newest_state, roles_of
from marlhf_mega.checkpoint.hf.exporter import ExportReport
from marlhf_mega.checkpoint.hf.peft import import_adapters
from marlhf_mega.checkpoint.saver import save
from marlhf_mega.checkpoint.store import load_weights
from marlhf_mega.checkpoint.weights import (
    fill_from,
    fill_merged,
    layout_of,
    learning_parts,
    merge_loaded,
)
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import Head
from marlhf_mega.config.origin import Origin
from marlhf_mega.config.peft import head_of_peft, lora_from_peft
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import last_token_scores, make_batches
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.collectives import gather_tensors
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.output import write_run_directory

OnProgress = Callable[[int], None]

_DTYPE = "dtype_of_files"
"""Key of an imported run's state."""


def role_of(origin: Origin, *, key: str) -> str:
    """Return the role of an origin's model: policy or reward."""
    return "reward" if "reward" in roles_of(origin, key=key) else "policy"


def import_model(
    origin: Origin, role: str, config: Config, mesh: Mesh, *, progress: OnProgress | None = None
) -> list[StageModel]:
    """Build the model of a Hugging Face folder and read its weights."""
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
    *,
    dtype: torch.dtype,
) -> Path:
    """Write a model as a run directory for `model.init` or `reward.source`.

    Args:
        chunks: this rank's chunks.
        role: policy or reward.
        config: its `run.dir` is the new directory.
        tokenizer_path: folder of the tokenizer.
        mesh: this rank's mesh.
        dtype: number format of the imported files, which an export of the run uses again.
    """
    if mesh.rank == 0:
        write_run_directory(config, Tokenizer.load(tokenizer_path), tokenizer_path, mesh)
    return save(config.run.dir, 0, {role: chunks}, {_DTYPE: str(dtype)}, mesh, keep=1)


def dtype_of_files(run_dir: Path) -> torch.dtype | None:
    """Return the number format of the files that a run was imported from; None for other runs."""
    name = (newest_state(run_dir) or {}).get(_DTYPE, "")
    return {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}.get(name)


def export_run(
    origin: Origin,
    role: str,
    config: Config,
    mesh: Mesh,
    *,
    target: Path,
    dtype: torch.dtype | None = None,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Export one role of a run's newest checkpoint; its files have the model's or another dtype."""
    head: Head = "language" if role == "policy" else "scalar"
    chunks = build_chunks(origin.model, config.precision, mesh, head=head)
    if origin.lora.is_on:
        fill_merged(origin, chunks, mesh, seed=config.run.seed, role=role)
    else:
        load_weights(origin.path, chunks, mesh, role=role)
    tokenizer = Tokenizer.load(origin.path / "tokenizer")
    return export_hf(
        chunks, config, mesh, target=target, tokenizer=tokenizer, dtype=dtype, progress=progress
    )


def merge_model(
    origin: Origin,
    adapters: Path,
    config: Config,
    mesh: Mesh,
    *,
    target: Path,
    dtype: torch.dtype,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Export the model of a Hugging Face folder with the adapters of a folder of peft merged in."""
    head = head_of_peft(adapters, key="adapters")
    chunks = build_chunks(origin.model, config.precision, mesh, head=head)
    fill_from(origin, chunks, mesh, seed=config.run.seed)

    def load() -> None:
        parts, layout = learning_parts(chunks), layout_of(mesh, chunks[0].model)
        digest = chunks[0].base_digest
        import_adapters(adapters, parts, layout, digest=digest, key="adapters")

    merge_loaded(chunks, lora_from_peft(adapters, LoraConfig(), key="adapters"), mesh, load)
    return export_hf(chunks, config, mesh, target=target, dtype=dtype, progress=progress)


def answer_ids(
    chunks: Sequence[StageModel], sequences: Sequence[list[int]], mesh: Mesh, *, new_tokens: int
) -> dict[str, Tensor]:
    """Run a model on token ids through the code paths of training and rollout.

    Returns:
        For each sequence I, `logits.I` float32 [tokens, vocab] (on the last stage only) and the
        greedy continuation `generated.I` int64 [new_tokens] of a language model, or `score.I`
        float32 [1] of a reward model.
    """
    if chunks[0].head == "scalar":
        prompts, rest = [ids[:1] for ids in sequences], [ids[1:] for ids in sequences]
        batches = make_batches(
            prompts, rest, limit=MicrobatchLimit(sequences=len(sequences)), mesh=mesh
        )
        scores = last_token_scores(chunks, batches).cpu()
        return {f"score.{i}": score.reshape(1) for i, score in enumerate(scores)}
    made = Generator(chunks, mesh, stop=StopRule()).generate(
        sequences,
        range(len(sequences)),
        RolloutOptions(
            rule=SamplingRule(temperature=0.0), max_response_tokens=new_tokens, seed=0, step=0
        ),
    )
    logits = _all_logits(chunks, sequences, mesh)
    return {
        **{f"generated.{i}": torch.tensor(r) for i, r in enumerate(made.responses)},
        **{f"logits.{i}": values.contiguous() for i, values in enumerate(logits)},
    }


def _all_logits(
    chunks: Sequence[StageModel], sequences: Sequence[list[int]], mesh: Mesh
) -> list[Tensor]:
    batch = SequenceBatch.create(
        [ids[:1] for ids in sequences],
        [ids[1:] for ids in sequences],
        multiple=mesh.sequence_multiple,
        device=mesh.device,
    )
    # An interleaved pipeline needs at least as many microbatches as stages: repeat the batch.
    batches = [batch] * (mesh.pp_size if mesh.num_chunks > 1 else 1)
    outputs = pipeline_forward(chunks, batches, lambda chunk, b: chunk.logits(b))
    if not outputs:
        return []
    whole = torch.cat(gather_tensors(outputs[0].flatten(0, 1), mesh.groups.tp), dim=-1).cpu()
    whole = whole[:, : chunks[0].model.vocab_size].unflatten(0, (len(sequences), -1))
    return [logits[: len(ids)] for logits, ids in zip(whole, sequences, strict=True)]
