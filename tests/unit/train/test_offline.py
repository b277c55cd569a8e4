"""Offline losses count every response once."""

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import OfflineExample
from marlhf_mega.train import offline
from marlhf_mega.train.offline_known import Known
from tests.unit.models.meshes import mesh
from tests.unit.update.three_responses import PROMPTS, RESPONSES, logprobs_of, total


@pytest.mark.parametrize("algorithm", ["a_lol", "a_lol_macro", "a_lol_kl", "nll"])
def test_three_responses_in_two_interleaved_stages_count_three_times(algorithm):
    examples = [
        OfflineExample(prompt_ids=p, response_ids=r, reward=0.0, line=1)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    known = Known(
        rewards=torch.tensor([0.5, 1.0, 0.75]),
        values=torch.full((3,), 0.25),
        ref_logprobs=-0.2 * torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 6]]),
        action_ids=torch.tensor([[0, 1, -1], [0, -1, -1], [0, 0, 1]]),
    )
    found = []
    for stages, size in ((1, 3), (2, 1)):
        settings = {"algorithm": algorithm, "microbatch_size": size, "kl_coef": 0.1}
        config = Config.model_validate({"offline": settings})
        parts = offline.valued_microbatches(examples, [0, 1, 2], known, config, mesh(stages))
        assert len(parts) == (1 if stages == 1 else 4)
        losses = []
        for part in parts:
            logprobs = logprobs_of(part.batch)
            loss = offline.valued_loss(torch.stack([logprobs, -logprobs]), part, config)
            losses.append((loss.loss_sum, loss.count, loss.metrics["advantage"][0]))
        found.append(total(losses))
    assert found[1] == pytest.approx(found[0])
    assert found[0][1:] == pytest.approx([3, 0.25 + 0.75 + 0.5])
