"""Run models over a replica's sequences: cut them into microbatches once, then pass each model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.limits import gpu_rows, gpu_width, round_up
from marlhf_mega.data.microbatch import (
    MicrobatchLimit,
    fewest_by_tokens,
    split_by_size,
    split_by_tokens,
)
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.prepacked import prepacked_projections
from marlhf_mega.models.routing import NOT_RECORDED
from marlhf_mega.parallel.collectives import broadcast_from_last_stage, max_over_replicas
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward

Forward = Callable[[Any, SequenceBatch], Tensor]
"""Runs one model chunk on one microbatch; the last chunk's output is [..., batch, response]."""


def logprob_forward(
    chunk: torch.nn.Module,
    batch: SequenceBatch,
    *,
    temperature: float = 1.0,
    filtered: bool = False,
    replayed: bool = False,
) -> Tensor:
    """Log-probs of the response tokens, and entropies: float32 [2, batch, response].

    With `filtered` both are of the distribution that is left of the sampler's filters, and a third
    grid has the log-probs over the whole vocabulary. With `replayed` tokens go to the experts that
    they went to in the rollout.
    """
    output: Tensor = chunk(batch, temperature=temperature, filtered=filtered, replayed=replayed)
    return output


def value_forward(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run the critic: the value of the state before every response token, [batch, response]."""
    output: Tensor = chunk(batch, shift=-1)
    return output


def score_forward(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run a reward model: the score after every response token, [batch, response]."""
    output: Tensor = chunk(batch, shift=0)
    return output


def both_scores_forward(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run a reward model with a length head: the scores of both heads, [2, batch, response]."""
    output: Tensor = chunk(batch, shift=0, with_length=True)
    return output


def last_state_forward(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run a model without its head: the states at the last response tokens, [batch, hidden]."""
    output: Tensor = chunk(batch, shift=0, last_states=True)
    return output


@dataclass(frozen=True, kw_only=True)
class IndexedBatch:
    """One microbatch, and which of the caller's sequences it holds."""

    indices: Tensor
    """[batch] int64 on the CPU; an index past the caller's last sequence is a filler."""
    batch: SequenceBatch


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A replica's sequences as microbatches; every rank of the replica holds the same."""

    microbatches: list[IndexedBatch]
    response_lengths: list[int]
    """Tokens of every response, in the caller's order."""
    mesh: Mesh
    limit: MicrobatchLimit
    """What they were cut by."""


def make_batches(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    limit: MicrobatchLimit,
    mesh: Mesh,
    kept: Tensor | None = None,
    routing: Tensor | None = None,
    group: int = 1,
) -> Batches:
    """Cut sequences by their lengths into microbatches that suit the layout.

    An interleaved pipeline needs a multiple of its stages, and ranks that share experts need the
    same number; where there are too few sequences, fillers without a response, which count
    nowhere, make up the number. They also make up padded rows on GPUs to one of few numbers.

    Args:
        prompts: token ids of each sequence.
        responses: token ids of each sequence.
        limit: of a microbatch.
        mesh: this rank's mesh.
        kept: [sequences, response, width] of a rollout, on the CPU.
        routing: [sequences, tokens, layers, top_k] of a rollout, on the CPU.
        group: so many neighbours stay together, next to each other; not with `limit.tokens`.
    """
    sizes = _sizes(prompts, responses, limit, mesh)
    count = _num_microbatches(sizes, limit, mesh)
    num_fillers = max(0, count * group - len(prompts))
    # One more may fill up rows.
    all_prompts = [*prompts, *([[0]] * (num_fillers + 1))]
    all_responses: list[list[int]] = [*responses, *([[]] * (num_fillers + 1))]
    sizes += _sizes([[0]] * num_fillers, [[]] * num_fillers, limit, mesh)
    if limit.tokens is None:
        parts = split_by_size(
            sizes, microbatch_size=limit.sequences, min_microbatches=count, group=group
        )
    else:
        parts = split_by_tokens(
            sizes, max_tokens=limit.tokens, min_microbatches=count, packed=limit.packed
        )
    widths = _least_widths(sizes, parts, limit, mesh)
    if mesh.device.type != "cpu" and not limit.packed:
        parts = [
            _rows_filled_up(part, limit, width=width, filler=len(prompts), group=group)
            for part, width in zip(parts, widths, strict=True)
        ]
    microbatches = [
        IndexedBatch(
            indices=indices,
            batch=SequenceBatch.create(
                [all_prompts[i] for i in indices.tolist()],
                [all_responses[i] for i in indices.tolist()],
                multiple=mesh.sequence_multiple,
                context_multiple=mesh.context_multiple,
                least_width=width,
                device=mesh.device,
                packed=limit.packed,
                # A filler has no response token, so whose row it gets does not matter.
                kept=None if kept is None else kept[indices.clamp(max=len(kept) - 1)],
                routing=None if routing is None else _routing_of(routing, indices),
            ),
        )
        for indices, width in zip(parts, widths, strict=True)
    ]
    lengths = [len(response) for response in responses]
    return Batches(microbatches=microbatches, response_lengths=lengths, mesh=mesh, limit=limit)


def _sizes(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    limit: MicrobatchLimit,
    mesh: Mesh,
) -> list[int]:
    """Return what each sequence costs of a microbatch's tokens."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    if limit.packed:
        return [round_up(length, mesh.context_multiple) for length in lengths]
    if mesh.device.type != "cpu":
        lengths = [gpu_width(length, packed=False, most=limit.tokens) for length in lengths]
    return [round_up(length, mesh.sequence_multiple) for length in lengths]


def _least_widths(
    sizes: Sequence[int], parts: Sequence[Tensor], limit: MicrobatchLimit, mesh: Mesh
) -> list[int]:
    """Return how wide the row of each microbatch has to be, at least.

    On GPUs the widths are few. The packed rows of a pipeline have the same one, so that its stages
    need not tell each other.
    """
    if mesh.device.type == "cpu":
        return [1] * len(parts)
    if not limit.packed:
        return [max(sizes[i] for i in part.tolist()) for part in parts]
    tokens = [sum(sizes[i] for i in part.tolist()) for part in parts]
    if mesh.pp_size > 1:
        tokens = [max(tokens)] * len(parts)
    return [gpu_width(count, packed=True, most=limit.tokens) for count in tokens]


def _rows_filled_up(
    part: Tensor, limit: MicrobatchLimit, *, width: int, filler: int, group: int
) -> Tensor:
    """Add fillers to padded rows, so that their number is one of few."""
    most = limit.sequences if limit.tokens is None else limit.tokens // width
    rows = group * gpu_rows(len(part) // group, most=most // group)
    return torch.cat((part, part.new_full((rows - len(part),), filler)))


def _routing_of(routing: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of some sequences; a filler's token goes where it likes."""
    rows = routing[indices.clamp(max=len(routing) - 1)]
    rows[indices >= len(routing)] = NOT_RECORDED
    return rows


def prompt_batches(prompts: Sequence[list[int]], *, limit: MicrobatchLimit, mesh: Mesh) -> Batches:
    """Cut prompts whose own states are wanted: they take the place of the responses."""
    return make_batches([[]] * len(prompts), prompts, limit=limit, mesh=mesh)


def _num_microbatches(sizes: Sequence[int], limit: MicrobatchLimit, mesh: Mesh) -> int:
    """Return how many microbatches the layout wants, at least 1."""
    if limit.tokens is None or not sizes:
        needed = -(-len(sizes) // limit.sequences)
    else:
        needed = fewest_by_tokens(sizes, max_tokens=limit.tokens, packed=limit.packed)
    if mesh.ep_size > 1:
        needed = max_over_replicas(needed, mesh)
    return round_up(max(needed, 1), mesh.pp_size if mesh.num_chunks > 1 else 1)


def run_forward(
    chunks: Sequence[torch.nn.Module],
    batches: Batches,
    forward: Forward,
    *,
    leading: tuple[int, ...] = (),
) -> Tensor:
    """Run a model on a replica's sequences without gradients.

    Every rank of the replica calls it and gets the result.

    Args:
        chunks: this rank's chunks.
        batches: the sequences.
        forward: runs one chunk; the last stage's output is [*leading, batch, response].
        leading: (2,) for `logprob_forward`, (3,) if it is filtered.

    Returns:
        float32 [*leading, sequences, response] in the caller's order, zero on padding; response
        is the longest response.
    """
    mesh, num_sequences = batches.mesh, len(batches.response_lengths)
    shape = (*leading, num_sequences, max(batches.response_lengths, default=1))
    # Heads that give log-probs multiply in pieces of their own.
    with prepacked_projections([getattr(chunk, "module", chunk).decoder for chunk in chunks]):
        outputs = pipeline_forward(chunks, [m.batch for m in batches.microbatches], forward)
    whole = None
    if outputs:
        whole = torch.zeros(shape, device=mesh.device)
        for microbatch, output in zip(batches.microbatches, outputs, strict=True):
            real = microbatch.indices < num_sequences
            indices = microbatch.indices[real].to(mesh.device)
            width = min(shape[-1], output.shape[-1])
            whole[..., indices, :width] = output[..., real.to(mesh.device), :width].float()
    return broadcast_from_last_stage(whole, shape, mesh)


def last_states(chunks: Sequence[torch.nn.Module], batches: Batches) -> Tensor | None:
    """Return float32 [sequences, hidden], states at the last response tokens; on the last stage.

    All ranks of a pipeline call it; on the other stages there is none.
    """
    inputs = [m.batch for m in batches.microbatches]
    outputs = pipeline_forward(chunks, inputs, last_state_forward)
    if not outputs:
        return None
    order = torch.cat([m.indices for m in batches.microbatches]).argsort()
    real = order[: len(batches.response_lengths)]
    return torch.cat(outputs)[real.to(batches.mesh.device)]


def last_token_scores(chunks: Sequence[torch.nn.Module], batches: Batches) -> Tensor:
    """Return float32 [sequences]: a reward model's score at every response's last token."""
    grid = run_forward(chunks, batches, score_forward)
    last = torch.tensor([n - 1 for n in batches.response_lengths], dtype=torch.int64)
    return grid.gather(1, last.to(grid.device)[:, None])[:, 0]
