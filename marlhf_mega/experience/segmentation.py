"""Choose the macro actions of a rollout: the termination rule of the config, on this batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm import termination
from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.parsing import parse_boundaries
from marlhf_mega.config.sections.rollout import MacroConfig
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.parsers import load_parser
from marlhf_mega.parallel.collectives import share_in_replica
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import Rollout

MACRO_STREAM = 1
"""Keeps the draws of random n-grams apart from those of sampling, which has no such key."""


@dataclass(frozen=True, kw_only=True)
class TokenEvidence:
    """What the models say about each token of a rollout, for the rules that read it."""

    old_logprobs: Tensor
    """[batch, response] of the policy at rollout."""
    ref_logprobs: Tensor | None
    """[batch, response] of the reference; None without one."""
    entropy: Tensor | None
    """[batch, response] of the policy at rollout; None where the sampler's log-probs are taken."""


class Segmenter:
    """Cuts responses into macro actions. All ranks of a replica get the same cut."""

    def __init__(self, config: MacroConfig, tokenizer: Tokenizer, mesh: Mesh, *, seed: int) -> None:
        self.config, self.tokenizer, self.mesh, self.seed = config, tokenizer, mesh, seed
        self.parser = load_parser(config.parser) if config.rule == "parsing" else None

    def segment(
        self, rollout: Rollout, response_mask: Tensor, evidence: TokenEvidence, *, step: int
    ) -> tuple[MacroActions, int]:
        """Cut every response of this replica.

        Args:
            rollout: the responses.
            response_mask: [batch, response] bool.
            evidence: what some rules read.
            step: of the run.

        Returns:
            The macro actions, and how many responses fell back to n-grams because they could not
            be parsed.
        """
        ends_with_eos = torch.tensor(rollout.finished, device=response_mask.device)
        starts, num_fallbacks = self._starts(rollout, response_mask, evidence, ends_with_eos, step)
        starts = termination.post_process(
            starts,
            response_mask,
            min_length=self.config.min_length,
            max_length=self.config.max_length,
            eos=self.config.eos,
            ends_with_eos=ends_with_eos,
        )
        actions = MacroActions.from_starts(starts, response_mask, compat=self.config.compat)
        return actions, num_fallbacks

    def segment_given(
        self, responses: list[list[int]], indices: list[int], evidence: TokenEvidence
    ) -> tuple[MacroActions, int]:
        """Cut given responses as ppo would those of its first step.

        Args:
            responses: token ids of every response of this replica.
            indices: the number of each, which decides its draws.
            evidence: as of `segment`.

        Returns:
            As `segment`.
        """
        stop = StopRule.of(self.tokenizer)
        rollout = Rollout(
            prompts=[],
            responses=responses,
            finished=[stop.is_met(response) for response in responses],
            sample_indices=indices,
            logprobs=evidence.old_logprobs,
        )
        return self.segment(rollout, rollout.response_mask(self.mesh.device), evidence, step=0)

    def _starts(
        self,
        rollout: Rollout,
        mask: Tensor,
        evidence: TokenEvidence,
        ends_with_eos: Tensor,
        step: int,
    ) -> tuple[Tensor, int]:
        config = self.config
        match config.rule:
            case "token":
                return termination.fixed_ngram(mask, n=1), 0
            case "fixed_ngram":
                return termination.fixed_ngram(mask, n=config.n), 0
            case "random_ngram":
                indices = torch.tensor(rollout.sample_indices, device=mask.device)
                keys = fold(self.seed, step, MACRO_STREAM, indices)
                starts = termination.random_ngram(
                    mask,
                    lengths=config.lengths,
                    repeats=config.repeats,
                    mode=config.random_mode,
                    keys=keys,
                )
                return starts, 0
            case "perplexity":
                form, compat = config.perplexity, config.compat
                ref_logprobs = evidence.ref_logprobs
                assert ref_logprobs is not None
                return termination.perplexity(mask, ref_logprobs, form=form, compat=compat), 0
            case "probability":
                below, every = config.probability, config.probability_interval
                logprobs = evidence.old_logprobs
                return termination.probability(mask, logprobs, below=below, every=every), 0
            case "entropy":
                assert evidence.entropy is not None
                return termination.entropy(mask, evidence.entropy, share=config.entropy_share), 0
            case "sentence":
                ends = torch.zeros_like(mask)
                flags = self.tokenizer.ends_sentence.to(mask.device)
                ids = torch.tensor([t for r in rollout.responses for t in r], device=mask.device)
                ends[rollout.response_mask(mask.device)] = flags[ids]
                return termination.sentence(mask, ends, ends_with_eos=ends_with_eos), 0
            case "whole_response":
                return termination.whole_response(mask), 0
            case "parsing":
                return self._parsed_starts(rollout, mask)

    def _parsed_starts(self, rollout: Rollout, mask: Tensor) -> tuple[Tensor, int]:
        """Parse on one rank of the replica and share the flags."""
        parsed = None
        if self.mesh.is_replica_leader:
            assert self.parser is not None
            parsed = [
                parse_boundaries(
                    self.tokenizer.decode(ids),
                    self.tokenizer.offsets(ids),
                    self.parser,
                    self.config.cutoff,
                )
                for ids in rollout.responses
            ]
        boundaries = share_in_replica(parsed, self.mesh)
        starts = torch.zeros_like(mask)
        flags = [flag for sample in boundaries for flag in sample.starts]
        starts[rollout.response_mask(mask.device)] = torch.tensor(flags, device=mask.device)
        return starts, sum(sample.fell_back for sample in boundaries)
