"""Write a trained model as a Hugging Face folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from marlhf_mega.checkpoint.hf.exporter import export_weights
from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.weights import layout_of
from marlhf_mega.config.hf_families import Head
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import WorldPeers
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def export_hf(chunks: Sequence[StageModel], config: Config, mesh: Mesh, *, target: Path) -> None:
    """Export one model. All ranks call it.

    Args:
        chunks: this rank's chunks.
        config: of the run, whose directory holds the tokenizer.
        mesh: where this rank stands.
        target: the folder; an earlier export there is replaced.
    """
    model = chunks[0].model
    assert model.vocab_size is not None
    head: Head = "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    report = export_weights(
        target,
        local_parameters(chunks),
        WeightTable(model, head),
        layout_of(mesh, model.vocab_size),
        dtype=chunks[0].config.params_dtype,
        side_files=SideFiles(source=model.hf_path, tokenizer=config.run.dir / "tokenizer"),
        peers=WorldPeers(mesh),
        replace=True,
    )
    logger.info("exported %d tensors to %s", report.num_tensors, target)
