"""What is asked of a vLLM engine, and how its answers are read."""

import math
from dataclasses import dataclass, field
from typing import Any

from marlhf_mega.config.limits import engine_candidates
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One response that is wanted."""

    prompt: list[int]
    max_tokens: int
    seed: int
    """Decides all draws of the response; from 0 to below 2^63."""


@dataclass(kw_only=True)
class EngineResponse:
    """What the engine drew, while it grows and when it has ended."""

    tokens: list[int]
    logprobs: list[float]
    kept: list[list[int]] = field(default_factory=list)
    """Ids that filters left at every token's place, if the rule writes them down."""


def sampling_params(
    request: EngineRequest, rule: SamplingRule, stop: StopRule, *, vocab_size: int
) -> Any:
    """Return vLLM's own form of a request; the same seed draws the same tokens in every batch."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=rule.temperature,
        top_k=rule.top_k,
        top_p=rule.top_p,
        seed=request.seed,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        stop_token_ids=sorted(stop.end_ids),
        # Besides that of the token: of those that a filter may have left.
        logprobs=min(engine_candidates(rule.top_k), vocab_size) if rule.records_kept else 0,
        flat_logprobs=True,
        detokenize=False,
        # Texts that end a response are looked for here, as the engine has no tokenizer.
        output_kind=RequestOutputKind.DELTA if stop.texts else RequestOutputKind.FINAL_ONLY,
    )


def extend(response: EngineResponse, output: Any, rule: SamplingRule, stop: StopRule) -> None:
    """Add tokens, as far as the one that ends the response."""
    flat = output.logprobs
    for token, first, end in zip(
        output.token_ids, flat.start_indices, flat.end_indices, strict=True
    ):
        # The token itself, then the likeliest ones, which it may be among.
        response.tokens.append(token)
        response.logprobs.append(flat.logprobs[first])
        if rule.records_kept:
            rest = slice(first + 1, end)
            response.kept.append(_kept(flat.token_ids[rest], flat.logprobs[rest], rule))
        if stop.texts and stop.is_met(response.tokens):
            return


def _kept(ids: list[int], logprobs: list[float], rule: SamplingRule) -> list[int]:
    """Return the ids that filters left: the others have no probability."""
    if len(ids) == engine_candidates(rule.top_k) and logprobs[-1] > -math.inf:
        raise RuntimeError(
            f"rollout.top_k={rule.top_k}: at most {len(ids) - 1} tokens may be as likely as the "
            "k-th or likelier, as rollout.engine=vllm keeps them all; there are more. Use another "
            "rollout.top_k, or rollout.engine=own."
        )
    return [token for token, logprob in zip(ids, logprobs, strict=True) if logprob > -math.inf]
