"""Generation by a vLLM engine: requests from prompts, a `Rollout` from its answers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.config.limits import engine_candidates
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import Rollout, RolloutOptions
from marlhf_mega.rollout.vllm_engine import VllmEngine
from marlhf_mega.rollout.vllm_requests import EngineRequest, EngineResponse


class VllmGenerator:
    """Generates with the weights that its engine has been filled with."""

    def __init__(self, engine: VllmEngine, mesh: Mesh, *, stop: StopRule) -> None:
        """Take an engine.

        Args:
            engine: this rank's.
            mesh: whose tensor-parallel ranks are a replica of the engine.
            stop: ends a response.
        """
        self.engine, self.mesh, self.stop = engine, mesh, stop
        self.chunks: Sequence[Module] = ()
        """None of ours: the engine has its own model."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        options: RolloutOptions,
    ) -> Rollout:
        """Generate one response to each of this replica's prompts, as `Generator` does.

        The engine draws with a generator of its own, seeded for each sample by (seed, step, sample
        index): the tokens are others than our decoder's, and the same in every run. It decides
        itself how many it decodes together: `options.slots` is not read.
        """
        indices = torch.tensor(list(sample_indices), dtype=torch.int64)
        seeds = fold(options.seed, options.step, indices) & (2**63 - 1)
        requests = [
            EngineRequest(prompt=list(prompt), max_tokens=options.limit_of(sample), seed=seed)
            for prompt, sample, seed in zip(prompts, sample_indices, seeds.tolist(), strict=True)
        ]
        found = self.engine.complete(requests, rule=options.rule, stop=self.stop)
        logprobs = _grid([response.logprobs for response in found], self.mesh.device)
        # Those under the whole vocabulary are not known where tokens were filtered.
        unknown = torch.full_like(logprobs, torch.nan) if options.rule.is_filtered else None
        return Rollout(
            prompts=[list(prompt) for prompt in prompts],
            responses=[response.tokens for response in found],
            finished=[self.stop.is_met(response.tokens) for response in found],
            sample_indices=list(sample_indices),
            logprobs=logprobs,
            full_logprobs=unknown,
            kept=_masks(found, options.rule.top_k) if options.rule.records_kept else None,
        )


def _masks(responses: Sequence[EngineResponse], top_k: int) -> Tensor:
    """Return rows of `write_mask`, [batch, response, width] int32 on the CPU."""
    if not responses:
        return torch.empty(0, 1, engine_candidates(top_k), dtype=torch.int32)
    kept = [ids for response in responses for ids in response.kept]
    counts = torch.tensor([len(ids) for ids in kept])
    masks = torch.full((len(kept), engine_candidates(top_k)), -1, dtype=torch.int32)
    flat = torch.tensor([token for ids in kept for token in ids], dtype=torch.int32)
    masks[torch.arange(masks.shape[1]) < counts[:, None]] = flat
    parts = masks.split([len(response.kept) for response in responses])
    return pad_sequence(parts, batch_first=True, padding_value=-1)


def _grid(rows: list[list[float]], device: torch.device) -> Tensor:
    """Return rows of different lengths as one tensor, padded with zeros."""
    if not rows:
        return torch.zeros(0, 1, device=device)
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
