"""The complete configuration of a run, and what its sections must agree on."""

from typing import Any, Self

from pydantic import model_validator

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.section import Section
from marlhf_mega.config.sections.data import DataConfig, TokenizerConfig
from marlhf_mega.config.sections.hardware import MemoryConfig, ParallelConfig, PrecisionConfig
from marlhf_mega.config.sections.offline import OfflineConfig, PreferenceConfig
from marlhf_mega.config.sections.ppo import PPOConfig
from marlhf_mega.config.sections.reward import RewardConfig
from marlhf_mega.config.sections.rollout import MacroConfig, RolloutConfig
from marlhf_mega.config.sections.run import (
    CheckpointConfig,
    EvaluateConfig,
    LoggingConfig,
    RunConfig,
    WatchdogConfig,
)
from marlhf_mega.config.sections.training import (
    CriticConfig,
    OptimizerConfig,
    RewardModelConfig,
    SftConfig,
)


class Config(Section):
    """The complete configuration of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    policy: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    macro: MacroConfig = MacroConfig()
    ppo: PPOConfig = PPOConfig()
    preference: PreferenceConfig = PreferenceConfig()
    offline: OfflineConfig = OfflineConfig()
    reward: RewardConfig = RewardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def has_reference(self) -> bool:
        """Whether ppo asks the policy's first weights: for a penalty, macro actions or a reward."""
        ppo = self.ppo
        asked = any(term.kind == "rto" for term in self.reward.dense)
        asked |= ppo.kl_coef > 0 or ppo.kl_loss_coef > 0 or self.reward.kl_max is not None
        return asked or self.macro.rule == "perplexity"

    def with_packing(self, *, on_gpu: bool) -> Self:
        """Settle `packing` in the sections that leave it to the device."""
        changes = {
            name: section.model_copy(update={"packing": True})
            for name, section in self
            if on_gpu and getattr(section, "packing", True) is None
        }
        return self.model_copy(update=changes)

    @property
    def replays_routing(self) -> bool:
        """Whether ppo replays which experts the tokens of the rollout went to."""
        return self.ppo.router_replay and self.model.num_experts is not None

    @property
    def critic_from_policy(self) -> bool:
        """Whether the critic begins as the policy with a new head."""
        init = self.critic.init
        return init == "policy" or (init == "reward" and self.reward.critic_model is None)

    @property
    def rollout_parallel(self) -> ParallelConfig:
        """Degrees during generation: those of training unless the rollout has its own."""
        own = self.rollout.engine == "own"  # vLLM splits layers by tensor parallelism alone
        tensor = self.rollout.tensor_size or self.parallel.tensor_size
        pipeline = (self.rollout.pipeline_size or self.parallel.pipeline_size) if own else 1
        if own and (tensor, pipeline) == (self.parallel.tensor_size, self.parallel.pipeline_size):
            return self.parallel.generating
        return ParallelConfig(
            tensor_size=tensor,
            pipeline_size=pipeline,
            expert_size=self.parallel.expert_size if own else 1,
            # Megatron-Core requires it with experts; generation itself switches it off.
            sequence_parallel=self.model.num_experts is not None and tensor > 1,
        )

    @property
    def moves_weights(self) -> bool:
        """Whether ranks that train receive weights other than their own to generate."""
        own = self.rollout.engine == "own"
        return not own or self.rollout_parallel != self.parallel.generating

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Set what a preset stands for, unless the user has."""
        macro = values.get("macro") if isinstance(values, dict) else None
        if not isinstance(macro, dict) or macro.get("compat") != "ma_rlhf":
            return values
        ppo = values.get("ppo") or {}
        return values | {
            "macro": {"reward": "mean"} | macro,
            "ppo": {"whiten_advantages": False} | ppo if isinstance(ppo, dict) else ppo,
        }

    @model_validator(mode="after")
    def _preset_is_kept(self) -> Self:
        if self.macro.compat != "ma_rlhf":
            return self
        for key, value, wanted in (
            ("macro.reward", self.macro.reward, "mean"),
            ("ppo.whiten_advantages", self.ppo.whiten_advantages, False),
        ):
            if value != wanted:
                shown = str(value).lower()
                raise ValueError(
                    f"{key}={shown}: must be {str(wanted).lower()} with macro.compat=ma_rlhf, "
                    "which reproduces the released code. Remove one of the two."
                )
        return self

    @model_validator(mode="after")
    def _one_warmup_each(self) -> Self:
        for name in ("policy", "critic", "reward_model"):
            optimizer = getattr(self, name)
            if optimizer.warmup_steps and optimizer.warmup_ratio:
                raise ValueError(
                    f"{name}.warmup_ratio={optimizer.warmup_ratio:g}: replaces warmup_steps, "
                    f"which is {optimizer.warmup_steps}. Remove one of the two."
                )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.rollout.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"rollout.batch_size={self.rollout.batch_size}: must be a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}. Change one of them."
            )
        if self.parallel.sequence_parallel and self.parallel.tensor_size == 1:
            raise ValueError(
                "parallel.sequence_parallel=true: needs parallel.tensor_size > 1; it is 1. "
                "Set it to false."
            )
        for key in self.checkpoint.allow_changed:
            section, _, name = key.partition(".")
            known = getattr(self, section) if section in type(self).model_fields else None
            if known is None or (name and name not in type(known).model_fields):
                raise ValueError(
                    f"checkpoint.allow_changed=[{key}]: must name keys or sections; there is no "
                    f"{key}. Write for example [policy.lr,reward]."
                )
        return self
