"""Which replica holds which sample: take samples out of all replicas' rollouts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from marlhf_mega.data.microbatch import deal_by_tokens
from marlhf_mega.parallel.collectives import gather_objects_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.types import Rollout


def gather_rollouts(rollout: Rollout, mesh: Mesh) -> list[Rollout]:
    """Collect the rollouts of all replicas of a mesh, in rank order. All ranks call it."""
    return gather_objects_over_data(replace(rollout, logprobs=rollout.logprobs.cpu()), mesh)


def pick(parts: Sequence[Rollout], wanted: Sequence[int], device: torch.device) -> Rollout:
    """Return the rollout of some samples, by their global index and in that order.

    Args:
        parts: rollouts that hold every wanted sample.
        wanted: global indices of the samples.
        device: where the log-probs go.
    """
    place = {s: (part, row) for part in parts for row, s in enumerate(part.sample_indices)}
    found = [place[sample] for sample in wanted]
    responses = [part.responses[row] for part, row in found]
    logprobs = torch.zeros(len(found), max(map(len, responses), default=1), device=device)
    for number, (part, row) in enumerate(found):
        length = len(part.responses[row])
        logprobs[number, :length] = part.logprobs[row, :length].to(device)
    return Rollout(
        prompts=[part.prompts[row] for part, row in found],
        responses=responses,
        finished=[part.finished[row] for part, row in found],
        sample_indices=list(wanted),
        logprobs=logprobs,
    )


def balance(rollout: Rollout, *, minibatch_size: int, mesh: Mesh) -> Rollout:
    """Exchange samples so that every replica has about as many tokens of each minibatch.

    All ranks call it. Minibatch m stays the m-th block of the global batch, and every replica
    keeps its number of samples of it.

    Args:
        rollout: this replica's samples, as `local_indices` deals them.
        minibatch_size: sequences per optimizer step, over all replicas.
        mesh: where this rank stands.
    """
    if mesh.dp_size == 1:
        return rollout
    parts = gather_rollouts(rollout, mesh)
    lengths = {
        sample: len(part.prompts[row]) + len(part.responses[row])
        for part in parts
        for row, sample in enumerate(part.sample_indices)
    }
    wanted = []
    for start in range(0, len(lengths), minibatch_size):
        block = range(start, start + minibatch_size)
        dealt = deal_by_tokens([lengths[sample] for sample in block], num_ranks=mesh.dp_size)
        wanted += [start + offset for offset in dealt[mesh.dp_rank]]
    return pick(parts, wanted, mesh.device)
