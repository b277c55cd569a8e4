"""Write a trained model as a Hugging Face folder."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from marlhf_mega.checkpoint.hf.exporter import ExportReport, export_weights
from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.weights import layout_of
from marlhf_mega.config.hf_families import Head
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import WorldPeers
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def export_hf(
    chunks: Sequence[StageModel],
    config: Config,
    mesh: Mesh,
    *,
    target: Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExportReport:
    """Export one model. All ranks call it.

    Args:
        chunks: this rank's chunks.
        config: of the run, whose directory holds the tokenizer's files.
        mesh: where this rank stands.
        target: the folder; an earlier export there is replaced.
        tokenizer: gives config.json its special ids; none: those of `model.hf_path` stay.
        dtype: of the files; none: the model's.
        progress: called with the number of bytes after every piece this rank wrote.

    Returns:
        What was written.
    """
    model = chunks[0].model
    assert model.vocab_size is not None
    head: Head = "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    # The folder that a run began from may be gone when it is exported.
    source = model.hf_path if model.hf_path and model.hf_path.is_dir() else None
    side_files = SideFiles(source=source, tokenizer=config.run.dir / "tokenizer")
    if tokenizer is not None:
        side_files = replace(
            side_files,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=_padding(tokenizer),
        )
    report = export_weights(
        target,
        local_parameters(chunks),
        WeightTable(model, head),
        layout_of(mesh, model.vocab_size),
        dtype=dtype or chunks[0].config.params_dtype,
        side_files=side_files,
        peers=WorldPeers(mesh),
        gathered=config.checkpoint.export_from_first,
        replace=True,
        progress=progress,
    )
    logger.info("exported %d tensors to %s", report.num_tensors, target)
    return report


def _padding(tokenizer: Tokenizer) -> int | None:
    """Return an id that no text contains behind its first token.

    transformers scores a row at its last token that is not padding. Were the end token padding,
    that would be the token before the end.
    """
    return tokenizer.bos_id if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
