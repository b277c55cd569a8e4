"""What offline RL knows of its responses before it trains."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.algorithm.macro_actions import NO_ACTION
from marlhf_mega.checkpoint.contents import newest_state
from marlhf_mega.data.datasets import OfflineExample
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.evaluation import Evaluator
from marlhf_mega.experience.segmentation import Segmenter, TokenEvidence
from marlhf_mega.models.forward import logprob_forward, make_batches, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import broadcast_object, gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.offline_values import frozen_body, learn_values, values_of
from marlhf_mega.train.resume import starts_afresh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Known:
    """Of responses; zeros, or no action, where the algorithm does not need it."""

    rewards: Tensor
    """[responses]"""
    values: Tensor
    """[responses]: what their prompts are worth."""
    ref_logprobs: Tensor
    """[responses, tokens] of the first policy."""
    action_ids: Tensor
    """[responses, tokens] int64: which macro action each token belongs to."""

    def take(self, rows: Tensor, *, real: Tensor, width: int, device: torch.device) -> "Known":
        """Return these rows, of at most `width` tokens; those that are not real say nothing."""
        cut = real[:, None]
        return Known(
            rewards=self.rewards[rows].where(real, 0.0).to(device),
            values=self.values[rows].where(real, 0.0).to(device),
            ref_logprobs=self.ref_logprobs[rows, :width].where(cut, 0.0).to(device),
            action_ids=self.action_ids[rows, :width].where(cut, NO_ACTION).to(device),
        )


def known_before(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
    watchdog: Watchdog,
) -> Known:
    """Return what is known, on all ranks.

    It is kept in `run.dir`/offline.safetensors with the settings that it comes from, so that a
    resumed run of the same settings continues with the same numbers. A fresh start computes it
    anew: what it comes from may have been fixed.
    """
    config, settings = inputs.config, inputs.config.offline
    file = config.run.dir / "offline.safetensors"
    resumes = not starts_afresh(config) and newest_state(config.run.dir) is not None
    if broadcast_object(resumes and file.is_file()):
        with safe_open(file, framework="pt") as content:
            if content.metadata() == _made_with(inputs):
                return Known(**{f.name: content.get_tensor(f.name) for f in fields(Known)})
    num_examples, width = len(inputs.train), max(len(e.response_ids) for e in inputs.train)
    known = Known(
        rewards=torch.tensor([example.reward for example in inputs.train]),
        values=torch.zeros(num_examples),
        ref_logprobs=torch.zeros(num_examples, width),
        action_ids=torch.full((num_examples, width), NO_ACTION),
    )
    own = torch.arange(mesh.dp_rank, num_examples, mesh.dp_size).tolist()
    prompts = [inputs.train[i].prompt_ids for i in own]
    responses = [inputs.train[i].response_ids for i in own]
    limit = MicrobatchLimit.of(settings)
    if settings.needs_values:
        body = frozen_body(inputs, policy, mesh)
        learned = learn_values(inputs, policy, body, evaluator, mesh, watchdog)
        watchdog.enter("experience", times=-(-num_examples // settings.batch_size))
        _put(known.values[:, None], own, values_of(body, learned, prompts, limit, mesh), mesh)
    if settings.needs_reference:
        watchdog.enter("experience", times=-(-num_examples // settings.batch_size))
        batches = make_batches(prompts, responses, limit=limit, mesh=mesh)
        logprobs, entropy = run_forward(policy, batches, logprob_forward, leading=(2,))
        _put(known.ref_logprobs, own, logprobs, mesh)
        if settings.algorithm == "a_lol_macro":
            evidence = TokenEvidence(old_logprobs=logprobs, ref_logprobs=logprobs, entropy=entropy)
            _put(known.action_ids, own, _action_ids(inputs, own, responses, evidence, mesh), mesh)
    if mesh.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(file) as partial:
            save_file(asdict(known), partial, metadata=_made_with(inputs))
    return known


def _made_with(inputs: Inputs[OfflineExample]) -> dict[str, str]:
    """Return what the numbers depend on, as a file's metadata."""
    config, settings = inputs.config, inputs.config.offline
    found = {"data_hash": inputs.data_hash, "reference": str(settings.needs_reference)}
    if settings.needs_values:
        sources = [config.reward, config.critic, settings.value_epochs, settings.batch_size]
        found["values"] = repr(sources)
    if settings.algorithm == "a_lol_macro":
        found["actions"] = repr(config.macro)
    return found


def _action_ids(
    inputs: Inputs[OfflineExample],
    own: list[int],
    responses: list[list[int]],
    evidence: TokenEvidence,
    mesh: Mesh,
) -> Tensor:
    """Return which macro action of its response each token belongs to."""
    config = inputs.config
    segmenter = Segmenter(config.macro, inputs.tokenizer, mesh, seed=config.run.seed)
    actions, num_fallbacks = segmenter.segment_given(responses, own, evidence)
    if num_fallbacks and mesh.is_replica_leader:
        logger.warning("offline: %d of %d responses cannot be parsed", num_fallbacks, len(own))
    return actions.ids


def _put(target: Tensor, own: list[int], results: Tensor, mesh: Mesh) -> None:
    """Put every replica's results in their places; all replicas get all of them."""
    for indices, part in gather_objects((own, results.cpu()), mesh.groups.dp):
        if indices:
            target[indices, : part.shape[1]] = part
