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
def test_gradients_are_clipped_to_the_limit_and_the_norm_is_that_before(chunks, limit, kept):
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
    moments = [x["exp_avg"].norm() for x in state._optimizers()[0].optimizer.state.values()]
    expected = (1 - settings.beta1) * 7.0 * kept
    assert torch.stack(moments).norm().item() == pytest.approx(expected, rel=1e-5)
    # A later gradient below the limit stays what it is.
    buffer.fill_(0.1 / math.sqrt(buffer.numel()))
    state.step()
    assert buffer.norm().item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("total", [3, 10])
def test_the_learning_rate_rises_to_what_the_log_says(chunks, caplog, total):
    settings = Config().policy.model_copy(update={"lr": 0.1, "warmup_steps": 10})
    with caplog.at_level("INFO", logger="marlhf_mega"):
        state = TrainState(chunks, settings, total_steps=total)
    said = (
        "warmup_steps=10: the run has 3 optimizer steps, so the learning rate ends at 0.03 of 0.1"
    )
    assert (said in caplog.messages) == (total == 3)
    for _ in range(total):
        state.zero_grad()
        result = state.step()
    assert result.lr == pytest.approx(0.01 * total)
