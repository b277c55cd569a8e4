"""Write a trained model as a Hugging Face folder."""

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path

import torch

from marlhf_mega.checkpoint.hf.auto_tokenizer import warn_of_other_text
from marlhf_mega.checkpoint.hf.exporter import ExportReport, Peers, export_weights
from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.hf.peft import export_adapters
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.checkpoint.weights import layout_of, learning_parts, table_of
from marlhf_mega.config.peft import peft_from_lora
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.lora import merged_adapters
from marlhf_mega.parallel.collectives import broadcast_object, gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.heartbeat import this_host

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

    Adapters are merged into its weights, and exported on their own beside it, in `target`_peft.

    Args:
        chunks: this rank's chunks.
        config: of the run, whose directory holds the tokenizer's files.
        mesh: this rank's mesh.
        target: the folder; an earlier export there is replaced.
        tokenizer: gives config.json its special ids; none: those of `model.hf_path` stay.
        dtype: of the files; none: the model's.
        progress: called with the number of bytes after every block this rank wrote.

    Returns:
        What was written.
    """
    model = chunks[0].model
    # The folder that a run began from may be gone when it is exported.
    source = model.hf_path if model.hf_path and model.hf_path.is_dir() else None
    kept = config.run.dir / "tokenizer"
    side_files = SideFiles(source=source, tokenizer=kept if kept.is_dir() else None)
    if tokenizer is not None:
        side_files = replace(
            side_files,
            bos_token_id=tokenizer.bos_id,
            end_ids=tokenizer.end_ids,
            pad_token_id=_padding(tokenizer),
        )
    gathered = broadcast_object(
        writes_from_first(config, target, hosts=set(gather_objects(this_host())))
    )
    with merged_adapters(chunks):
        report = export_weights(
            target,
            local_parameters(chunks),
            table_of(chunks),
            layout_of(mesh, model),
            dtype=dtype or chunks[0].config.params_dtype,
            side_files=side_files,
            peers=Peers(mesh),
            tensor_peers=Peers(mesh, mesh.groups.tp),
            gathered=gathered,
            progress=progress,
        )
    if chunks[0].has_adapters:
        export_peft(chunks, mesh, target=target.with_name(f"{target.name}_peft"))
    logger.info("exported %d tensors to %s", report.num_tensors, target)
    if tokenizer is not None and mesh.rank == 0:
        warn_of_other_text(target, tokenizer)
    return report


def export_peft(chunks: Sequence[StageModel], mesh: Mesh, *, target: Path) -> None:
    """Export a model's adapters as a folder of peft. All ranks call it."""
    model = chunks[0].model
    export_adapters(
        target,
        learning_parts(chunks),
        layout_of(mesh, model),
        config=peft_from_lora(model.lora, chunks[0].head, model.hf_path),
        digest=chunks[0].base_digest,
    )


def writes_from_first(
    config: Config, target: Path, *, hosts: Set[str], mounts: Path = Path("/proc/self/mounts")
) -> bool:
    """Whether the first rank must write an export: if asked, or if hosts cannot share its files.

    On NFS and FUSE a host writes back whole pages, over what another host has written into them.

    Args:
        config: of the run.
        target: where the export goes.
        hosts: the machines of all ranks.
        mounts: the system's table of mounted file systems.
    """
    if config.checkpoint.export_from_first or len(hosts) == 1:
        return config.checkpoint.export_from_first
    kind = _file_system(target, mounts)
    one_writer = kind.startswith(("nfs", "fuse", "cifs", "smb", "9p"))
    if one_writer:
        logger.info(
            "%s: is on %s; the first rank writes what %d hosts hold", target, kind, len(hosts)
        )
    return one_writer


def _file_system(path: Path, mounts: Path) -> str:
    """Return the type of the file system that a path is on."""
    lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    kinds = {Path(line[1].replace("\\040", " ")): line[2] for line in lines}
    path = path.resolve()
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), "unknown")


def _padding(tokenizer: Tokenizer) -> int:
    """Return an id that no text ends with, if there is one.

    transformers scores a sequence at its last token that is not padding. Were an end token padding,
    that would be the token before the end.
    """
    candidates = (tokenizer.pad_id, tokenizer.bos_id, *sorted(tokenizer.special_ids))
    free = (i for i in candidates if i is not None and i not in tokenizer.end_ids)
    return next(free, tokenizer.pad_id)
