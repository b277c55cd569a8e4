"""Generation and macro actions."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from marlhf_mega.algorithm.choices import (
    Compat,
    EosRule,
    MacroReward,
    MacroRule,
    PerplexityForm,
    RandomMode,
    Ratio,
    SampleFilter,
    StepUnit,
    ValueRule,
    ValueTarget,
)
from marlhf_mega.config.section import Section


def _one(value: object) -> object:
    return (value,) if isinstance(value, int | str) else value


class VllmConfig(Section):
    """An engine of vLLM that generates."""

    kv_cache_gib: float | None = Field(None, gt=0)
    """Key-value cache of each rank in GiB. None means room for `rollout.slots` sequences of the
    greatest length; the engine packs shorter ones closer, and waits where there is none."""
    enforce_eager: bool = False
    """Neither compile the model nor record CUDA graphs: starts sooner, decodes slower."""
    prefix_caching: bool = True
    """Read common beginnings of prompts once, as of the responses to one prompt."""
    verify_interval: int | None = Field(None, gt=0)
    """Compare embedding and norms with the trained ones at every N-th load of weights. None:
    only at the first, since this holds the embedding twice. Use 1 when looking for a fault."""


class RolloutConfig(Section):
    """Generation."""

    batch_size: int = Field(64, gt=0)
    """Sequences per PPO step, over all ranks."""
    max_response_tokens: int = Field(64, gt=0)
    """Longest response in tokens, the end token included."""
    temperature: float = Field(1.0, ge=0)
    """Divisor of the logits, in sampling and wherever log-probs are recomputed. 0 means greedy,
    which ppo does not allow."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens. 0 means all. ppo renormalises the policy's log-probs
    over the tokens that `top_k` and `top_p` kept, which takes 4 k bytes of host memory a token.
    With `engine=vllm` that is twice as much, and `top_p` requires `top_k`, which is at most 256."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the smallest set of tokens with this total probability. Without `top_k` ppo
    keeps one bit per token of the vocabulary for each response token, in host memory."""
    mask_interval: int | None = Field(None, gt=0)
    """ppo, NLPO: `top_p` is that of the policy as it was after the last multiple of so many steps,
    a second model that generates beside the policy. None: of the policy itself. The paper took 5
    and 20."""
    mask_min_tokens: int = Field(100, gt=0)
    """`mask_interval`: likeliest tokens that are kept in any case. End tokens are too. 100 as in
    NLPO's code."""
    stop: Annotated[
        tuple[int | Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one)
    ] = ()
    """What ends a response besides the end tokens of tokenizer and model: token ids, or texts. A
    text ends it with the token that completes it; the text of a control token is that token."""
    keep_special_tokens: bool = False
    """Whether code and HTTP rewards and the files of generate see the special tokens of a response
    (a tool call's). The end token is never part of its text."""
    samples_per_prompt: int = Field(1, gt=0)
    """ppo and generate: responses to each prompt, which ppo's critic judges one by one; other
    answers are single. Must divide `batch_size`."""
    filter: SampleFilter | None = None
    """ppo: which samples are trained on, by their raw scores: as many, drawn with replacement by
    |score|^`filter_power` (`pf_ppo`); of each prompt the best and the worst, the best and another,
    or only the best; or all, after new prompts have replaced those whose responses score alike
    (`dynamic`). None means all."""
    filter_power: float = Field(2.0, gt=0)
    """`pf_ppo`: power of the score's size. 2 as in verl."""
    filter_tries: int = Field(10, gt=0)
    """`dynamic`: how often a step generates, the first time included. After that prompts whose
    responses score alike are taken as they are. 10 as in DAPO."""
    engine: Literal["own", "vllm"] = "own"
    """What decodes: our decoder, with the weights that are trained or a copy at another layout, or
    a vLLM engine on the same ranks, which gets a copy of the weights before each rollout."""
    vllm: VllmConfig = VllmConfig()
    """Of `engine=vllm`."""
    slots: int | None = Field(None, gt=0)
    """Sequences that one data-parallel rank decodes together. None means its whole share."""
    ranks: int = Field(0, ge=0)
    """ppo: number of ranks, the last ones, that only generate. 0 means that all ranks train and
    generate."""
    staleness: Literal[0, 1] = 0
    """1: `ranks` generate the next batch, with weights one step old, while the others train on this
    one. 0: they wait for the newest weights."""
    cuda_graphs: bool = False
    """Launch each decode step, with the draw of its tokens, as one CUDA graph. The graphs, and the
    key-value cache with them, are kept between rollouts. Not available with experts or FP8."""
    tensor_size: int | None = Field(None, gt=0)
    """Tensor-parallel size of generation. None means that of training."""
    pipeline_size: int | None = Field(None, gt=0)
    """Pipeline stages of generation. None means those of training. A layout of its own costs a copy
    of the weights, in memory and in time, in each rollout; fewer stages make more replicas."""

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are drawn from some of the vocabulary only."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def trained_per_prompt(self) -> int:
        """Responses to a prompt that are trained on."""
        match self.filter:
            case "best_of_n":
                return 1
            case "best_worst" | "best_random":
                return 2
        return self.samples_per_prompt

    @property
    def trained_size(self) -> int:
        """Sequences of a PPO step that are trained on, over all ranks."""
        return self.batch_size // self.samples_per_prompt * self.trained_per_prompt


class MacroConfig(Section):
    """Macro actions: which tokens form one, and how their rewards and values are pooled."""

    rule: MacroRule = "fixed_ngram"
    """Where an action ends. `token` is ordinary PPO, `whole_response` is a bandit."""
    n: int = Field(5, gt=0)
    """`fixed_ngram`: tokens per action. 5 is the default of MA-RLHF."""
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field((2, 3, 5, 10), min_length=1)
    """`random_ngram`: lengths of the shuffled list, in tokens."""
    repeats: int = Field(3, gt=0)
    """`random_ngram`: how often the list contains each length."""
    random_mode: RandomMode = "cycle"
    """`random_ngram`: what follows the list: one last action (`list`), or another shuffled list
    (`cycle`)."""
    perplexity: PerplexityForm = "segment"
    """`perplexity`: start an action where the perplexity of the token, of the prefix or of the
    current action rises."""
    probability: float = Field(0.2, gt=0, le=1)
    """`probability`: a token that the policy found less likely starts an action. 0.2 as in SAE."""
    probability_interval: int = Field(1, gt=0)
    """`probability`: of these tokens the first one, and from there every so many-th. SPO has 5."""
    entropy_share: float = Field(0.3, gt=0, le=1)
    """`entropy`: share of a response's tokens, those of highest entropy, that end an action. 0.3 as
    in Segment-Aligned PO."""
    parser: str = "rules"
    """`parsing`: `rules` (English phrases), `python` (syntax tree), or
    `module:factory` or `path/to/file.py:factory`."""
    cutoff: int = Field(5, gt=0)
    """`parsing`: a constituent with fewer tokens is one action."""
    min_length: int = Field(1, gt=0)
    """Tokens. Shorter actions are merged into the previous one."""
    max_length: int | None = Field(None, gt=0)
    """Tokens. Longer actions are split. None means no limit."""
    eos: EosRule = "join"
    """Whether the end token joins the last action or is an action of its own."""
    value: ValueRule = "equal"
    """Weights that pool token values into the value of an action: the mean (`equal`), the last
    token (`unit`), heavier towards the end (`position`, as in the paper) or the start
    (`position_repo`, as in its code), or the first token."""
    reward: MacroReward = "sum"
    """How token rewards are pooled. `mean` takes the weights of `value`, so that the KL penalty
    does not grow with the length; the score, on the last token, is weighted as well."""
    ratio: Ratio = "token"
    """Likelihood ratio of the policy loss: per token, of the whole action, or its geometric mean
    per token."""
    discount: StepUnit = "per_macro"
    """Whether gamma applies per action or per token."""
    lambda_unit: StepUnit = "per_macro"
    """Whether lambda applies per action or per token."""
    value_target: ValueTarget = "token"
    """What regresses to the return of an action: the value of each of its tokens, or its pooled
    value."""
    compat: Compat = "none"
    """`ma_rlhf` is a preset, the released code: its boundaries with their empty actions,
    `macro.reward=mean` and `ppo.whiten_advantages=false`."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "MacroConfig":
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"macro.max_length={self.max_length}: must be at least macro.min_length="
                f"{self.min_length}. Raise it, or lower macro.min_length."
            )
        return self
