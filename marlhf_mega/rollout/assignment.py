"""Which data-parallel rank holds which sample of a batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import assign_by_tokens
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.types import Rollout


def local_indices(batch_size: int, minibatch_size: int, mesh: Mesh) -> list[int]:
    """Assign a global batch to the data-parallel ranks: each gets a share of every minibatch.

    Minibatch m is the m-th block of the global batch whatever the layout; this rank's samples of
    it are one slice of the block.

    Returns:
        Global sample indices of this rank, minibatch after minibatch.
    """
    share = minibatch_size // mesh.dp_size
    return [
        start + mesh.dp_rank * share + offset
        for start in range(0, batch_size, minibatch_size)
        for offset in range(share)
    ]


def block_of(mesh: Mesh, num_samples: int, *, first: int = 0) -> list[int]:
    """Return a data-parallel rank's block of samples from `first` on.

    In a block, unlike in every so manieth sample, responses to a prompt are together.
    """
    start, stop = (num_samples * (mesh.dp_rank + end) // mesh.dp_size for end in (0, 1))
    return [*range(first + start, first + stop)]


def own_samples(config: Config, mesh: Mesh, num_samples: int, *, first: int = 0) -> list[int]:
    """Return the samples that a training rank gets: those that it trains on.

    With a filter these are settled later.
    """
    if config.rollout.filter is not None:
        return block_of(mesh, num_samples, first=first)
    return local_indices(num_samples, config.ppo.minibatch_size, mesh)


def gather_rollouts(rollout: Rollout, mesh: Mesh) -> list[Rollout]:
    """Collect the rollouts of all replicas of a mesh, in rank order. All ranks call it."""
    full = rollout.full_logprobs
    here = replace(
        rollout,
        logprobs=rollout.logprobs.cpu(),
        full_logprobs=None if full is None else full.cpu(),
    )
    return gather_objects(here, mesh.groups.dp)


def select(parts: Sequence[Rollout], wanted: Sequence[int], device: torch.device) -> Rollout:
    """Return the rollout of some samples, by their global index and in that order.

    Args:
        parts: rollouts that hold every wanted sample.
        wanted: global indices of the samples.
        device: where the log-probs go.
    """
    if len(parts) == 1 and parts[0].sample_indices == list(wanted):
        return parts[0]
    place = {s: (part, row) for part in parts for row, s in enumerate(part.sample_indices)}
    found = [place[sample] for sample in wanted]
    responses = [part.responses[row] for part, row in found]
    width = max(map(len, responses), default=1)

    def gather(name: str, device: torch.device) -> Tensor | None:
        """Put the samples' parts of a [batch, response, ...] tensor together, if there is one."""
        like: Tensor | None = getattr(parts[0], name)
        if like is None:
            return None
        grid = like.new_zeros(len(found), width, *like.shape[2:], device=device)
        for number, (part, row) in enumerate(found):
            length = len(part.responses[row])
            grid[number, :length] = getattr(part, name)[row, :length].to(device)
        return grid

    routing = None
    if parts[0].routing is not None:
        rows = [part.routing[row] for part, row in found if part.routing is not None]
        # Recorded until the last token of each; what is behind it is zero.
        routing = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logprobs = gather("logprobs", device)
    assert logprobs is not None
    return Rollout(
        prompts=[part.prompts[row] for part, row in found],
        responses=responses,
        finished=[part.finished[row] for part, row in found],
        sample_indices=list(wanted),
        logprobs=logprobs,
        full_logprobs=gather("full_logprobs", device),
        kept=gather("kept", torch.device("cpu")),
        routing=routing,
    )


def balance(rollout: Rollout, *, minibatch_size: int, mesh: Mesh) -> Rollout:
    """Exchange samples so that every replica has about as many tokens of each minibatch.

    All ranks call it. Minibatch m stays the m-th block of the global batch, and every replica
    keeps its number of samples of it.

    Args:
        rollout: this replica's samples, as `local_indices` assigns them.
        minibatch_size: sequences per optimizer step, over all replicas.
        mesh: this rank's mesh.
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
        assigned = assign_by_tokens([lengths[sample] for sample in block], num_ranks=mesh.dp_size)
        wanted += [start + offset for offset in assigned[mesh.dp_rank]]
    return select(parts, wanted, mesh.device)
