"""One optimizer step on one rank, by hand."""

import math

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

SIZES = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 16,
}


@pytest.fixture(scope="module")
def chunks():
    config = Config.model_validate({"model": SIZES})
    mesh = create_mesh(config.parallel)
    built = build_chunks(config.model, config.precision, mesh, head="language")
    for parameter in built[0].parameters():
        torch.nn.init.zeros_(parameter)
    yield built
    destroy_mesh()


@pytest.mark.parametrize(("limit", "kept"), [(0.0, 1.0), (0.5, 0.5 / 7.0), (7.5, 1.0)])
def test_gradients_are_clipped_to_the_limit_and_the_reported_norm_is_unclipped(chunks, limit, kept):
    settings = Config().policy.model_copy(update={"grad_clip": limit})
    state = TrainState(chunks, settings, total_steps=10)
    state.zero_grad()
    (buffer,) = state.gradient_buffers()
    count = sum(p.numel() for p in chunks[0].parameters())
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(7.0 / math.sqrt(count))
    result = state.step()
    assert result.grad_norm == pytest.approx(7.0, rel=1e-5)
    norm = torch.stack([g.norm() for g in state.gradient_shards()]).norm().item()
    assert norm == pytest.approx(7.0 * kept, rel=1e-5)
    assert buffer.norm().item() == pytest.approx(7.0 * kept, rel=1e-5)
    moments = [x["exp_avg"].norm() for x in state.optimizers()[0].optimizer.state.values()]
    expected = (1 - settings.beta1) * 7.0 * kept
    assert torch.stack(moments).norm().item() == pytest.approx(expected, rel=1e-5)
    # A later gradient below the limit stays what it is.
    buffer.fill_(0.1 / math.sqrt(buffer.numel()))
    state.step()
    assert buffer.norm().item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("total", [3, 10])
def test_the_learning_rate_rises_over_a_warm_up_that_the_run_does_not_end(chunks, total):
    settings = Config().policy.model_copy(update={"lr": 0.1, "warmup_steps": 10})
    state = TrainState(chunks, settings, total_steps=total)
    for _ in range(total):
        state.zero_grad()
        result = state.step()
    assert result.lr == pytest.approx(0.01 * total)


@pytest.mark.parametrize(
    ("settings", "total", "rates"),
    [
        ({"lr_schedule": "linear"}, 4, [0.8, 0.6, 0.4, 0.2]),
        ({"lr_schedule": "linear"}, 1, [0.5]),
        ({"lr_schedule": "cosine"}, 2, [0.75, 0.25]),  # (1 + cos(pi k / 3)) / 2
        ({"lr_schedule": "linear", "warmup_steps": 2}, 4, [0.5, 1.0, 2 / 3, 1 / 3]),
        (
            {"lr_schedule": "linear", "min_lr": 0.05, "warmup_ratio": 0.3},
            4,
            [0.5, 1.0, 5 / 6, 4 / 6],
        ),
        ({"warmup_ratio": 0.05}, 30, [0.5, 1.0, *[1.0] * 28]),
    ],
)
def test_no_step_of_a_schedule_is_without_effect(chunks, settings, total, rates):
    policy = Config().policy.model_copy(update={"lr": 0.1, **settings})
    state = TrainState(chunks, policy, total_steps=total)
    found = []
    for _ in range(total):
        state.zero_grad()
        found.append(state.step().lr)
    assert found == pytest.approx([0.1 * rate for rate in rates])
