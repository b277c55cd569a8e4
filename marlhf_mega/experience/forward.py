"""Run a model over many sequences: cut to microbatches, pipeline, put the rows back in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.data.microbatch import split_by_size
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.parallel.collectives import broadcast_from_last_stage
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One microbatch and which of the caller's rows it holds."""

    rows: Tensor
    """[batch] int64 on the CPU; a row past the caller's last only fills up a pipeline."""
    batch: SequenceBatch


def cut_rows(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    microbatch_size: int,
    mesh: Mesh,
) -> list[Cut]:
    """Sort rows by length and cut them to microbatches that suit the layout.

    An interleaved pipeline needs a multiple of its stages; where there are too few rows, rows
    without a response, which count nowhere, fill up.
    """
    multiple = mesh.pp_size if mesh.num_chunks > 1 else 1
    num_microbatches = max(1, -(-len(prompts) // microbatch_size))
    num_fillers = max(0, -(-num_microbatches // multiple) * multiple - len(prompts))
    all_prompts = [*prompts, *([[0]] * num_fillers)]
    all_responses: list[list[int]] = [*responses, *([[]] * num_fillers)]
    lengths = [len(p) + len(r) for p, r in zip(all_prompts, all_responses, strict=True)]
    parts = split_by_size(
        lengths, microbatch_size=microbatch_size, num_microbatches_multiple=multiple
    )
    return [
        Cut(
            rows=rows,
            batch=SequenceBatch.create(
                [all_prompts[i] for i in rows.tolist()],
                [all_responses[i] for i in rows.tolist()],
                pad_id=0,
                multiple=mesh.sequence_multiple,
                device=mesh.device,
            ),
        )
        for rows in parts.indices
    ]


def forward_rows(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    mesh: Mesh,
    microbatch_size: int,
    run: Callable[[Any, SequenceBatch], Tensor],
    leading: tuple[int, ...] = (),
) -> Tensor:
    """Run a model on this replica's rows without gradients.

    Every rank of the replica calls it and gets the result.

    Args:
        chunks: this rank's chunks.
        prompts: token ids of each row.
        responses: token ids of each row.
        mesh: where this rank stands.
        microbatch_size: rows per forward.
        run: calls one chunk; the last stage's output is [*leading, batch, response].
        leading: (2,) for a language head, which gives log-probs and entropies.

    Returns:
        float32 [*leading, rows, response], zero on padding; response is the longest response.
    """
    cuts = cut_rows(prompts, responses, microbatch_size=microbatch_size, mesh=mesh)
    outputs = run_forward(chunks, [cut.batch for cut in cuts], run)
    columns = max((len(r) for r in responses), default=1)
    whole = None
    if outputs:
        whole = torch.zeros(*leading, len(prompts), columns, device=mesh.device)
        for cut, output in zip(cuts, outputs, strict=True):
            real = cut.rows < len(prompts)
            rows = cut.rows[real].to(mesh.device)
            width = min(columns, output.shape[-1])
            whole[..., rows, :width] = output[..., real.to(mesh.device), :width].float()
    return broadcast_from_last_stage(whole, (*leading, len(prompts), columns), mesh)
