"""The four models of ppo, and what each computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.offload import Offload
from marlhf_mega.models.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Policy and critic learn; reference and reward models do not change."""

    policy: TrainState
    critic: TrainState
    reference: Sequence[StageModel]
    rewards: Sequence[Sequence[StageModel]]
    """One list of chunks for every learned reward term, in the config's order."""
    offload: Offload = field(default_factory=Offload)
    """Holds on the device what a phase needs."""


@dataclass(frozen=True)
class LogprobStep:
    """Runs policy or reference: log-probs of the response tokens and entropies."""

    temperature: float

    def __call__(self, chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
        """Return float32 [2, batch, response] on the last chunk."""
        output: Tensor = chunk(batch, temperature=self.temperature)
        return output


def value_step(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run the critic: the value of the state before every response token, [batch, response]."""
    output: Tensor = chunk(batch, shift=-1)
    return output


def score_step(chunk: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """Run a reward model: the score after every response token, [batch, response]."""
    output: Tensor = chunk(batch, shift=0)
    return output
