"""The head that learns what prompts are worth: its steps, the epoch that is kept, what is skipped."""

import logging

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.models.prompt_value import PromptValue
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.train.offline_values import fit

STATES = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(3) < torch.tensor([3, 1, 2, 3, 2])[:, None]
SCORES = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75])


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def head():
    return PromptValue(8, low=0.0, high=1.0, seed=3, device=torch.device("cpu"))


def config_of(tmp_path, *, epochs, batch_size=2, max_skipped_steps=3, **critic):
    return Config.model_validate(
        {
            "run": {"dir": tmp_path, "max_skipped_steps": max_skipped_steps},
            "critic": {"grad_clip": 0.0, **critic},
            "offline": {"value_epochs": epochs, "batch_size": batch_size},
        }
    )


def error_of(values):
    with torch.no_grad():
        return (values(STATES, MASK) - SCORES).square().mean().item()


def test_steps_are_those_of_adamw_on_the_mean_squared_error(mesh, tmp_path):
    """All five prompts are in one batch, so that their order does not matter.

    The gradient of the keys' bias is zero but for rounding, which a small epsilon would blow up.
    """
    config = config_of(tmp_path, epochs=3, batch_size=8, lr=0.02, weight_decay=0.1, eps=1e-3)
    values, expected = head(), head()
    fit(values, SCORES, lambda chosen: (STATES[chosen], MASK[chosen]), config, mesh)
    optimizer = torch.optim.AdamW(
        expected.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(expected(STATES, MASK), SCORES).backward()
        optimizer.step()
    for name, weight in expected.state_dict().items():
        assert values.state_dict()[name].numpy() == pytest.approx(weight.numpy(), abs=1e-6), name


def test_the_epoch_with_the_least_error_of_its_steps_is_kept_and_named(mesh, tmp_path, caplog):
    """Weights that a high learning rate carries away come after better ones."""
    config = config_of(tmp_path, epochs=8, batch_size=8, lr=3.0)
    values = head()
    with caplog.at_level(logging.INFO, logger="marlhf_mega"):
        fit(values, SCORES, lambda chosen: (STATES[chosen], MASK[chosen]), config, mesh)
    each = [m.rpartition(" ")[2] for m in caplog.messages if "values, epoch" in m]
    assert len(each) == 8
    least = min(map(float, each))
    best = [float(e) for e in each].index(least) + 1
    assert 1 <= best < 8
    assert (
        f"offline: values of epoch {best} are kept, mean squared error {least:.4g} over 5 greedy "
        "answers"
    ) in caplog.messages
    again = head()
    fit(
        again,
        SCORES,
        lambda chosen: (STATES[chosen], MASK[chosen]),
        config_of(tmp_path, epochs=best, batch_size=8, lr=3.0),
        mesh,
    )
    assert error_of(values) == error_of(again)


def test_a_batch_whose_gradient_is_not_finite_is_passed_over(mesh, tmp_path, caplog):
    def states_of(chosen):
        states = STATES[chosen].clone()
        states[[i == 4 for i in chosen]] = float("nan")
        return states, MASK[chosen]

    values = head()
    fit(values, SCORES, states_of, config_of(tmp_path, epochs=2, batch_size=1, lr=0.02), mesh)
    assert all(weight.isfinite().all() for weight in values.state_dict().values())
    assert not values.state_dict()["query"].equal(head().state_dict()["query"])
    assert "the gradient of critic is not finite; no weight was changed" in caplog.text
    assert len(list((tmp_path / "skipped").iterdir())) == 2
    limited = config_of(tmp_path, epochs=2, batch_size=8, max_skipped_steps=1)
    with pytest.raises(RuntimeError, match=r"2 gradients of critic were not finite"):
        fit(head(), SCORES, states_of, limited, mesh)


def test_scores_that_are_all_equal_are_every_prompts_value(mesh, tmp_path):
    values = PromptValue(8, low=0.5, high=0.5, seed=3, device=torch.device("cpu"))
    scores = torch.full((5,), 0.5)
    config = config_of(tmp_path, epochs=1)
    fit(values, scores, lambda chosen: (STATES[chosen], MASK[chosen]), config, mesh)
    assert values(STATES, MASK).tolist() == [0.5] * 5
