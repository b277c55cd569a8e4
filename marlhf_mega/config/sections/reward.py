"""Rewards and what becomes of them."""

import string
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from marlhf_mega.algorithm.choices import (
    Combination,
    DenseReward,
    MissingEos,
    ScoreNormalization,
    Shaping,
)
from marlhf_mega.config.section import Section, spell_off


def _quoted(value: object) -> object:
    if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
        raise ValueError(
            "reward.source.answers: must be texts; YAML reads Yes and No as true and false. Quote "
            "them."
        )
    return value


class RewardSource(Section):
    """What gives a response a score."""

    key: ClassVar[str] = "reward.source"
    source: str
    """A reward model (run directory or Hugging Face folder), a code reward `module:function` or
    `path/to/file.py:function`, or an HTTP reward `http://...` (bearer token in
    MARLHF_REWARD_TOKEN)."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Time limit of a code reward for one response, of an HTTP reward for one request. Responses
    that exceed it have no score and do not count. `compiler_signal` takes it as the CPU time of
    one test, at most 4 s."""
    sandbox: Annotated[Literal["namespaces", "off"], BeforeValidator(spell_off)] = "namespaces"
    """How a code reward runs generated programs. `off` runs them with all rights of this user."""

    template: str | None = None
    """What a reward model reads, such as `{response} {prompt} {principle} The quality is`: fields
    of the data row in braces, with `{prompt}` and `{response}`. None means prompt and response."""
    answers: Annotated[tuple[str, str] | None, BeforeValidator(_quoted)] = None
    """Two texts to follow the template, such as [" Yes", " No"]: the score is log p of the first
    less log p of the second, and `source` a language model."""

    @property
    def is_language(self) -> bool:
        """Whether it is a language model, which gives log-probs."""
        return self.answers is not None

    @property
    def template_fields(self) -> tuple[str, ...]:
        """Names in the template, in its order."""
        parts = string.Formatter().parse(self.template or "")
        return tuple(name for _, name, _, _ in parts if name is not None)

    @property
    def is_rule(self) -> bool:
        """Whether `source` names a function: by its module, or by its file."""
        place, _, function = self.source.rpartition(":")
        is_module = all(part.isidentifier() for part in place.split("."))
        named = is_module or (place.endswith(".py") and not self.is_server)
        return named and function.isidentifier()

    @property
    def is_server(self) -> bool:
        """Whether `source` is a web address."""
        return self.source.startswith(("http://", "https://"))

    @property
    def is_model(self) -> bool:
        """Whether `source` is a reward model, which runs on the ranks."""
        return not self.is_rule and not self.is_server

    @model_validator(mode="after")
    def _template_is_usable(self) -> Self:
        if self.template is None:
            if self.answers is not None:
                raise ValueError(
                    f"{self.key}={self.source}: answers follow a template, which is not set. Set "
                    "it, or remove answers."
                )
            return self
        if not self.is_model:
            raise ValueError(
                f"{self.key}={self.source}: a template is for models; a function or server gets "
                "prompt, response and the fields of the row. Remove it."
            )
        try:
            names = self.template_fields
        except ValueError:
            names = ()
        if "response" not in names or not all(map(str.isidentifier, names)):
            raise ValueError(
                f"{self.key}={self.source}: template must name fields in single braces, among them "
                f"{{response}}; it is {self.template!r}. Write other braces twice."
            )
        if self.answers is not None and (not all(self.answers) or len(set(self.answers)) < 2):
            raise ValueError(
                f"{self.key}={self.source}: answers must be two different texts; they are "
                f"[{', '.join(self.answers)}]. Change them."
            )
        return self

    @model_validator(mode="after")
    def _address_is_usable(self) -> Self:
        if not self.is_server:
            return self
        try:
            url = urlsplit(self.source)
            usable = bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"{self.key}={self.source}: must be a web address; its host is missing or its "
                "port is wrong. Write for example http://localhost:8000/score."
            )
        if "@" in url.netloc:
            raise ValueError(
                f"{self.key}={url.scheme}://...@{url.hostname}: must not contain a password, "
                "which would be saved with the run; it does. Put a token into MARLHF_REWARD_TOKEN."
            )
        return self


class RewardTerm(RewardSource):
    """One source of reward."""

    weight: float = 1.0
    """Factor of this source's scores."""


class RewardConstraint(RewardSource):
    """A judge whose score must reach a threshold."""

    key: ClassVar[str] = "reward.constraints"
    threshold: float
    """The smallest score that satisfies it."""


def _one_term(value: object) -> object:
    if isinstance(value, str):
        return ({"source": value},)
    return (value,) if isinstance(value, dict) else value


class DenseTerm(RewardSource):
    """A model that rewards tokens before the last one."""

    key: ClassVar[str] = "reward.dense"
    kind: DenseReward
    """`rto`: every token, by log p of a DPO model less that of the reference. `sentence`, `clause`:
    the last token of each, by a reward model's score of the response so far; clauses also end at
    commas, colons and semicolons."""
    weight: float = 1.0
    """Factor of its rewards."""
    clip: float | None = Field(None, gt=0)
    """The weighted reward of a token is clipped to +- this. None means no clipping."""

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        if not self.is_model or self.template is not None:
            raise ValueError(
                f"{self.key}={self.source}: must be a model, without a template, since it rewards "
                "tokens. Give the directory of one."
            )
        return self

    @property
    def is_language(self) -> bool:
        """Whether it is a language model."""
        return self.kind == "rto"


def _one_name(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class RewardConfig(Section):
    """Reward of a response: that of its sources combined, then shaped, normalised and clipped."""

    source: Annotated[tuple[RewardTerm, ...], BeforeValidator(_one_term)] = ()
    """A path, import path or address, or a list of `{source, weight, ...}`."""
    combine: Combination = "sum"
    """How the weighted scores of several sources become one: their sum; for an ensemble a mixture
    of mean and minimum (`robust`); the scores of the source with the smallest mean over the step
    (`maxmin`), a source for each group of users."""
    robust_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the mean in `robust`; the rest is that of the minimum."""
    constraints: Annotated[tuple[RewardConstraint, ...], BeforeValidator(_one_term)] = ()
    """Judges that must agree, a list of `{source, threshold, ...}`. A response
    that violates one earns nothing, and no update makes it likelier."""
    shaping: Annotated[tuple[Shaping, ...], BeforeValidator(_one_name)] = ()
    """What is done to the scores first, in this order: a name or a list. `par` and
    `center_reference` compare them with the scores of reference responses, `z_score` standardises
    those of a step; `length_penalty`, `overlong`: see their keys."""
    reference_field: str = Field("references", min_length=1)
    """Field of the data rows with the reference responses to the prompt: a text, or a list. The
    sources score them. `response` takes those that `marlhf generate` wrote."""
    par_scale: float = Field(1.0, gt=0)
    """Factor in the sigmoid of `par`."""
    length_coef: float = Field(0.0, ge=0)
    """What `length_penalty` subtracts for each token above `reward.length_limit`."""
    length_limit: int = Field(0, ge=0)
    """Tokens of a response that `length_penalty` leaves free."""
    overlong_buffer: int | None = Field(None, gt=0)
    """Tokens before `rollout.max_response_tokens` over which the penalty of `overlong` grows. None
    means a fifth of the limit."""
    overlong_factor: float = Field(1.0, gt=0)
    """What `overlong` subtracts at the limit."""
    kl_max: float | None = Field(None, gt=0)
    """CGPO: scale the reward of a response by 1 - KL / this, at least 0; KL is log p of the policy
    less that of the reference, in nats. For scores that are never negative: those of `par` or
    `center_reference`. None means no such factor."""
    clip: float | None = Field(None, gt=0)
    """Normalised scores are clipped to +- this. None means no clipping."""
    normalize: ScoreNormalization = "none"
    """Divide scores by the running standard deviation of all scores so far (`running_scale`), after
    subtracting their mean (`running`)."""
    missing_eos: MissingEos = "none"
    """What happens to the score of a response without an end token."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Amount to subtract from the score (`subtract`), or whose negative replaces it (`replace`)."""
    dense: Annotated[tuple[DenseTerm, ...], BeforeValidator(_one_term)] = ()
    """Rewards of other tokens than the last, a list of `{source, kind, weight, clip}`. They are
    added as they are; scores, also those of held-out responses, are without them."""
    max_invalid_fraction: float = Field(0.5, ge=0, le=1)
    """Largest share of responses without a score. A step with more stops the run."""
    share_base: bool = False
    """ppo: with `model.lora.rank`, reward models are adapters and a head on the policy's frozen
    weights. They must have been trained so, from the model that the policy begins from."""

    @property
    def judges(self) -> tuple[RewardSource, ...]:
        """All that judge: sources, then constraints, then dense rewards."""
        return (*self.source, *self.constraints, *self.dense)

    @property
    def models(self) -> tuple[RewardSource, ...]:
        """The judges that are models, in the order of `judges`."""
        return tuple(judge for judge in self.judges if judge.is_model)

    @property
    def critic_model(self) -> int | None:
        """Which of `models` a critic may start from; None: there is none."""
        scored = (
            number
            for number, judge in enumerate(self.models)
            if judge in self.source and not judge.is_language
        )
        return next(scored, None)

    @property
    def compares_references(self) -> bool:
        """Whether reference responses are scored too."""
        return not {"par", "center_reference"}.isdisjoint(self.shaping)
