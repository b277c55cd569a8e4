"""What generation takes and returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from marlhf_mega.config.schema import Config
from marlhf_mega.rollout.sampling import SamplingRule


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How the samples of a step are drawn."""

    rule: SamplingRule
    max_response_tokens: int | Mapping[int, int]
    """Longest response, the end token included; a mapping gives it by global sample index."""
    seed: int
    step: int
    """(seed, step, sample index, position) decide every draw."""
    record_routing: bool = False
    """Write down which experts tokens go to."""
    slots: int | None = None
    """Responses decoded together on a replica that generates; None means all."""

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        step: int,
        slots: int | None = None,
        for_training: bool = False,
        masked: bool = False,
    ) -> Self:
        """Return what the configuration says of the rollout.

        Args:
            config: of the run.
            step: PPO step, from 0.
            slots: None means `rollout.slots`.
            for_training: write down what training on the samples needs: what top-k and top-p
                keep, which experts tokens go to.
            masked: take `rollout.mask_interval` into account; there is a mask policy in ppo alone.
        """
        settings = config.rollout
        has_mask = masked and settings.mask_interval is not None
        rule = SamplingRule(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            record_kept=for_training,
            min_kept=settings.mask_min_tokens if has_mask else None,
        )
        return cls(
            rule=rule,
            max_response_tokens=settings.max_response_tokens,
            seed=config.run.seed,
            step=step,
            record_routing=for_training and config.replays_routing,
            slots=slots or settings.slots,
        )

    def limit_of(self, sample: int) -> int:
        """Return the longest response of a sample, by its global index."""
        limits = self.max_response_tokens
        return limits if isinstance(limits, int) else limits[sample]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The responses of one data-parallel rank, in the order of the prompts it was given."""

    prompts: list[list[int]]
    """Token ids."""
    responses: list[list[int]]
    """Token ids, the end token included where there is one; never empty."""
    finished: list[bool]
    """Whether the response ended by itself rather than at the length limit."""
    sample_indices: list[int]
    """Global index of every sample within its step: the key of its random draws."""
    logprobs: Tensor
    """[batch, response] float32, zero on padding: log p of each token under the distribution that
    it was drawn from, after temperature, top-k and top-p."""
    full_logprobs: Tensor | None = None
    """The same under softmax(logits / temperature) over the whole vocabulary; None where nothing
    was filtered: then they are `logprobs`."""
    kept: Tensor | None = None
    """[batch, response, width] on the CPU: which tokens top-k and top-p kept at every position, see
    algorithm/replay_mask.py; None where nothing was filtered, or nothing is to be learned."""

    routing: Tensor | None = None
    """[batch, prompt and response, layers, top_k] on the CPU: the experts that each token went to,
    their numbers plus one, 0 where a token was not passed through the model, as the last one of a
    response; None without experts, or where nothing is to be learned."""

    @property
    def unfiltered_logprobs(self) -> Tensor:
        """[batch, response] float32, under softmax(logits / temperature)."""
        return self.logprobs if self.full_logprobs is None else self.full_logprobs

    def response_mask(self, device: torch.device) -> Tensor:
        """Return bool [batch, response], True at real tokens."""
        lengths = torch.tensor([len(r) for r in self.responses], device=device)
        return torch.arange(int(lengths.max()), device=device) < lengths[:, None]
