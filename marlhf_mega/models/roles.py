"""The models of ppo."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.offload import Offload
from marlhf_mega.models.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Policy and critic learn; reference and reward models do not change."""

    policy: TrainState
    critic: TrainState | None
    """None where the estimator of advantages needs no values."""
    reference: Sequence[StageModel] | None
    """To be run `without_adapters`: it may be the policy's own chunks. None where nothing asks
    it."""
    rewards: Sequence[Sequence[StageModel]]
    """One list of chunks for every learned reward term, in the config's order."""
    offload: Offload = field(default_factory=Offload)
    """Holds on the device what a phase needs."""

    @property
    def learning(self) -> dict[str, TrainState]:
        """The models that learn, by role."""
        found = {"policy": self.policy, "critic": self.critic}
        return {role: state for role, state in found.items() if state is not None}
