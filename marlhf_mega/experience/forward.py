"""Run a model over many sequences: cut to microbatches, pipeline, put the rows back in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.data.microbatch import (
    fewest_by_tokens,
    round_up,
    split_by_size,
    split_by_tokens,
)
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.parallel.collectives import broadcast_from_last_stage, max_over_replicas
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
    microbatch_tokens: int | None = None,
    packing: bool = False,
    mesh: Mesh,
) -> list[Cut]:
    """Cut rows by their lengths to microbatches that suit the layout.

    An interleaved pipeline needs a multiple of its stages, and ranks that share experts need the
    same number; where there are too few rows, rows without a response, which count nowhere, fill
    up.

    Args:
        prompts: token ids of each row.
        responses: token ids of each row.
        microbatch_size: most rows of a microbatch.
        microbatch_tokens: most tokens of a microbatch, instead of a number of rows.
        packing: rows of a microbatch lie one after the other; else each is padded, and
            `microbatch_tokens` counts padding.
        mesh: where this rank stands.
    """

    def taken(length: int) -> int:
        return length if packing else round_up(length, mesh.sequence_multiple)

    lengths = [taken(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]
    if microbatch_tokens is None or not lengths:
        needed = -(-len(lengths) // microbatch_size)
    else:
        needed = fewest_by_tokens(lengths, max_tokens=microbatch_tokens, packed=packing)
    if mesh.ep_size > 1:
        needed = max_over_replicas(needed, mesh)
    count = round_up(max(needed, 1), mesh.pp_size if mesh.num_chunks > 1 else 1)
    num_fillers = max(0, count - len(prompts))
    all_prompts = [*prompts, *([[0]] * num_fillers)]
    all_responses: list[list[int]] = [*responses, *([[]] * num_fillers)]
    lengths += [taken(1)] * num_fillers
    if microbatch_tokens is None:
        parts = split_by_size(lengths, microbatch_size=microbatch_size, min_microbatches=count)
    else:
        parts = split_by_tokens(
            lengths, max_tokens=microbatch_tokens, min_microbatches=count, packed=packing
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
                packed=packing,
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
    microbatch_tokens: int | None = None,
    packing: bool = False,
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
        microbatch_tokens: tokens per forward, instead of a number of rows.
        packing: rows lie one after the other without padding.
        run: calls one chunk; the last stage's output is [*leading, batch, response].
        leading: (2,) for a language head, which gives log-probs and entropies.

    Returns:
        float32 [*leading, rows, response], zero on padding; response is the longest response.
    """
    cuts = cut_rows(
        prompts,
        responses,
        microbatch_size=microbatch_size,
        microbatch_tokens=microbatch_tokens,
        packing=packing,
        mesh=mesh,
    )
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
