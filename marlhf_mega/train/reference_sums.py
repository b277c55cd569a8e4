"""What the reference thinks of given responses, computed once and kept by content on disk."""

import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.metrics.held_out import interleave
from marlhf_mega.models.forward import Batches, logprob_forward, make_batches, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import broadcast_object, gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog

logger = logging.getLogger(__name__)


def reference_sums(
    pairs: Sequence[PreferencePair],
    reference: Sequence[StageModel],
    mesh: Mesh,
    watchdog: Watchdog,
    *,
    limit: MicrobatchLimit,
    config: Config,
) -> Tensor:
    """Return the sum of the reference's log-probs of every response, float32 [pairs, 2].

    The file's name is a hash of all token ids and of the weights as this layout holds them, so that
    a file is never taken for that of another model or other data, and several runs may share a
    folder. All ranks call it and get the result.

    Args:
        pairs: all of them, on every rank.
        reference: this rank's chunks.
        mesh: this rank's mesh.
        watchdog: of the job.
        limit: of a microbatch, in sequences.
        config: of the run.
    """
    watchdog.enter("experience")
    folder = config.preference.reference_dir or config.run.dir / "reference"
    file = folder / f"{_content_hash(pairs, reference, mesh, config)}.safetensors"
    if broadcast_object(file.is_file()):
        logger.info("reference: log-probs of %d pairs are in %s", len(pairs), file)
        return load_file(file)["sums"]
    sums = torch.cat(list(_blocks(pairs, reference, mesh, watchdog, limit)))
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with durable.replacing(file) as partial:
            save_file({"sums": sums}, partial)
    return sums


def pair_batches(
    pairs: Sequence[PreferencePair], *, limit: MicrobatchLimit, mesh: Mesh, group: int = 2
) -> Batches:
    """Cut pairs, or rankings of `group` responses, into microbatches: response after response."""
    return make_batches(
        [pair.prompt_ids for pair in pairs for _ in pair.responses],
        [response for pair in pairs for response in pair.responses],
        limit=limit,
        mesh=mesh,
        group=group,
    )


def _blocks(
    pairs: Sequence[PreferencePair],
    reference: Sequence[StageModel],
    mesh: Mesh,
    watchdog: Watchdog,
    limit: MicrobatchLimit,
) -> Iterator[Tensor]:
    """Yield the sums of some pairs at a time: neither memory nor a phase grows with the data."""
    size = 8 * limit.sequences * mesh.dp_size
    for first in range(0, len(pairs), size):
        watchdog.enter("experience")
        block = pairs[first : first + size]
        batches = pair_batches(block[mesh.dp_rank :: mesh.dp_size], limit=limit, mesh=mesh)
        logprobs = run_forward(reference, batches, logprob_forward, leading=(2,))[0]
        own = logprobs.sum(1).view(-1, 2).tolist()
        yield torch.tensor(interleave(gather_objects(own, mesh.groups.dp)))
        done = first + len(block)
        if done == len(pairs) or 10 * done // len(pairs) > 10 * first // len(pairs):
            logger.info("reference: log-probs of %d of %d pairs", done, len(pairs))


def _content_hash(
    pairs: Sequence[PreferencePair], reference: Sequence[StageModel], mesh: Mesh, config: Config
) -> str:
    """Hash what decides the log-probs; weights by their values, wherever they come from."""
    shape = reference[0].model.model_copy(update={"init": "auto", "hf_path": None})
    digest = hashlib.sha256(repr((shape, config.precision)).encode())
    for parameter in (p for chunk in reference for p in chunk.parameters()):
        digest.update(parameter.detach().float().cpu().numpy())
    for pair in pairs[mesh.dp_rank :: mesh.dp_size]:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(numpy.array([len(ids), *ids]).tobytes())
    parts = gather_objects(digest.hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]
