"""Run a model over many sequences: cut to microbatches, pipeline, put the rows back in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.data.microbatch import (
    MicrobatchLimit,
    fewest_by_tokens,
    round_up,
    split_by_size,
    split_by_tokens,
)
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.parallel.collectives import broadcast_from_last_stage, max_over_replicas
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward
from marlhf_mega.rollout.products import packed_projections


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
    limit: MicrobatchLimit,
    mesh: Mesh,
) -> list[Cut]:
    """Cut rows by their lengths to microbatches that suit the layout.

    An interleaved pipeline needs a multiple of its stages, and ranks that share experts need the
    same number; where there are too few rows, rows without a response, which count nowhere, fill
    up.

    Args:
        prompts: token ids of each row.
        responses: token ids of each row.
        limit: of a microbatch.
        mesh: where this rank stands.
    """

    def taken(length: int) -> int:
        return round_up(length, mesh.context_multiple if limit.packed else mesh.sequence_multiple)

    lengths = [taken(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]
    if limit.tokens is None or not lengths:
        needed = -(-len(lengths) // limit.rows)
    else:
        needed = fewest_by_tokens(lengths, max_tokens=limit.tokens, packed=limit.packed)
    if mesh.ep_size > 1:
        needed = max_over_replicas(needed, mesh)
    count = round_up(max(needed, 1), mesh.pp_size if mesh.num_chunks > 1 else 1)
    num_fillers = max(0, count - len(prompts))
    all_prompts = [*prompts, *([[0]] * num_fillers)]
    all_responses: list[list[int]] = [*responses, *([[]] * num_fillers)]
    lengths += [taken(1)] * num_fillers
    if limit.tokens is None:
        parts = split_by_size(lengths, microbatch_size=limit.rows, min_microbatches=count)
    else:
        parts = split_by_tokens(
            lengths, max_tokens=limit.tokens, min_microbatches=count, packed=limit.packed
        )
    return [
        Cut(
            rows=rows,
            batch=SequenceBatch.create(
                [all_prompts[i] for i in rows.tolist()],
                [all_responses[i] for i in rows.tolist()],
                pad_id=0,
                multiple=mesh.sequence_multiple,
                context_multiple=mesh.context_multiple,
                device=mesh.device,
                packed=limit.packed,
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
    limit: MicrobatchLimit,
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
        limit: of a microbatch.
        run: calls one chunk; the last stage's output is [*leading, batch, response].
        leading: (2,) for a language head, which gives log-probs and entropies.

    Returns:
        float32 [*leading, rows, response], zero on padding; response is the longest response.
    """
    cuts = cut_rows(prompts, responses, limit=limit, mesh=mesh)
    # Heads that give log-probs multiply in pieces of their own.
    with packed_projections([getattr(chunk, "module", chunk).decoder for chunk in chunks]):
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
