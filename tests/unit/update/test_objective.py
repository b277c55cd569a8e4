"""The policy's objective from its three terms, by hand."""

import pytest
import torch

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.update.ppo import PpoMicrobatch, policy_objective


def test_the_objective_is_the_sum_of_its_terms_and_each_is_reported():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    actions = MacroActions.from_starts(mask, mask)
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 0.5], [0.25, 0.5, 0.5]]))
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    nothing = torch.zeros(2, 3)
    microbatch = PpoMicrobatch(
        batch=None,
        actions=actions,
        old_logprobs=logprobs,
        # k2: half of the squared difference, which is 0.4 at every token.
        ref_logprobs=logprobs - 0.4,
        old_values=nothing,
        advantages=torch.tensor([[1.0, 1.0, 2.0], [-3.0, 0.0, 0.0]]),
        returns=nothing,
    )
    both = {"kl_loss_coef": 0.5, "entropy_coef": 0.1}
    config = Config.model_validate({"ppo": both, "macro": {"rule": "token"}})
    loss = policy_objective(torch.stack([logprobs, entropy]), microbatch, config=config)
    terms = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    assert float(loss.count) == 4
    assert terms["kl_loss"] == pytest.approx(0.4**2 / 2)
    assert terms["entropy_loss"] == pytest.approx(-(1 + 2 + 3 + 4) / 4)
    # The ratio is 1, so the surrogate is the negative mean advantage.
    surrogate = -(1 + 1 + 2 - 3) / 4
    assert float(loss.loss_sum) / 4 == pytest.approx(surrogate + 0.5 * 0.08 - 0.1 * 2.5)
    alone = Config.model_validate({"macro": {"rule": "token"}})
    plain = policy_objective(torch.stack([logprobs, entropy]), microbatch, config=alone)
    assert not {"kl_loss", "entropy_loss"} & set(plain.metrics)
