"""One optimizer step on one rank, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.checkpoint import optimizer_state
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


class GroupAdam(torch.optim.Optimizer):
    """Adam that counts its steps in the group, from the first one on, as Transformer Engine's."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                state = self.state[parameter]
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(parameter.grad, 0.1)
                second.lerp_(parameter.grad**2, 0.001)
                scale = (second / (1 - 0.999 ** group["step"])).sqrt() + 1e-8
                parameter.data -= group["lr"] * first / (1 - 0.9 ** group["step"]) / scale


def test_an_optimizer_that_counts_in_its_groups_goes_on_counting_after_a_resume():
    def made():
        inner = GroupAdam([{"params": [torch.nn.Parameter(torch.ones(3))]}, {"params": []}])
        role = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))
        role.optimizer.chained_optimizers = [role.optimizer]
        optimizer_state.fill_empty(role)
        return role, inner, inner.param_groups[0]["params"][0]

    role, inner, weight = made()
    assert optimizer_state.num_steps(role) == 0
    for _ in range(3):
        weight.grad = weight.data.clone()
        inner.step()
    assert optimizer_state.num_steps(role) == 3
    resumed, inner_resumed, weight_resumed = made()
    weight_resumed.data.copy_(weight.data)
    for name, value in inner.state[weight].items():
        inner_resumed.state[weight_resumed][name].copy_(value)
    optimizer_state.set_num_steps(resumed, 3)
    for optimizer, parameter in ((inner, weight), (inner_resumed, weight_resumed)):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.equal(weight_resumed, weight)
    assert optimizer_state.num_steps(resumed) == 4
