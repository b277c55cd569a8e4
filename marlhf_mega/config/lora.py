"""Low-rank adapters (LoRA, arXiv 2106.09685): how large they are and which projections have one."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from marlhf_mega.config.section import Section

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
MODULES = (*ATTENTION, *FEED_FORWARD)
"""Names of projections as Hugging Face and peft have them."""
ALL = "all-linear"

FUSED: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Megatron-Core's projection -> the projections that are fused in it, in the order of its rows."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LoraConfig(Section):
    """Adapters: trained models learn low-rank changes of some projections, all else is frozen."""

    rank: int | None = Field(None, gt=0)
    """Rank of the adapters of every model that is trained. None means that all weights learn. A
    scalar head always learns."""
    alpha: float | None = Field(None, gt=0)
    """An adapter's output is multiplied by alpha / rank. None means twice the rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in passes that train; the others are multiplied
    by 1 / (1 - dropout). In steps of 1/65536. In ppo old log-probs and values are those without:
    the first likelihood ratio of an update is not 1."""
    targets: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field((ALL,), min_length=1)
    """Projections that get an adapter: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`,
    `up_proj`, `down_proj`. `all-linear` means all of them."""
    path: Path | None = None
    """sft, reward: a folder of peft whose adapters training goes on from; its rank, alpha, targets
    and, unless it is set, dropout are taken too. Other jobs need a merged model
    (`tools/convert_hf.py merge`)."""

    @property
    def is_on(self) -> bool:
        """Whether trained models have adapters."""
        return self.rank is not None

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the projections with an adapter, none without a rank."""
        return self.named if self.is_on else ()

    @property
    def named(self) -> tuple[str, ...]:
        """Names of the projections that `targets` means."""
        return tuple(name for name in MODULES if name in self.targets or ALL in self.targets)

    @property
    def size(self) -> int:
        """The rank; only of adapters that are there."""
        assert self.rank is not None
        return self.rank

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        alpha = 2.0 * self.size if self.alpha is None else self.alpha
        return alpha / (self.size**0.5 if self.rank_stabilized else self.size)

    def adapted(self, projection: str) -> tuple[str, ...]:
        """Return which of the projections fused in one of Megatron-Core's have an adapter."""
        return tuple(name for name in FUSED[projection] if name in self.modules)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = (*MODULES, ALL)
        for name in self.targets:
            if name not in known:
                raise ValueError(
                    f"model.lora.targets=[{name}]: must name projections; known are "
                    f"{', '.join(known)}. Use these."
                )
        for name in ("alpha", "rank_stabilized", "dropout", "targets"):
            value = getattr(self, name)
            if not (self.is_on or self.path) and value != type(self).model_fields[name].default:
                shown = f"[{','.join(value)}]" if name == "targets" else str(value).lower()
                raise ValueError(
                    f"model.lora.{name}={shown}: needs model.lora.rank, which is not set. Set it, "
                    f"or remove {name}."
                )
        return self
