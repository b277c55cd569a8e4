"""Step counters that are kept per parameter group."""

from types import SimpleNamespace

import torch

from marlhf_mega.checkpoint import optimizer_state


class GroupAdam(torch.optim.Optimizer):
    """Adam with a step counter per group, as in Transformer Engine."""

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


def test_an_optimizer_with_step_counts_in_its_groups_resumes_from_them():
    def made():
        inner = GroupAdam([{"params": [torch.nn.Parameter(torch.ones(3))]}, {"params": []}])
        part = SimpleNamespace(optimizer=inner)
        role = SimpleNamespace(optimizers=lambda: [part])
        optimizer_state.fill_empty(role)
        return role, inner, inner.param_groups[0]["params"][0]

    role, inner, weight = made()
    assert optimizer_state.steps_taken(role) == 0
    for _ in range(3):
        weight.grad = weight.data.clone()
        inner.step()
    assert optimizer_state.steps_taken(role) == 3
    resumed, inner_resumed, weight_resumed = made()
    weight_resumed.data.copy_(weight.data)
    for name, value in inner.state[weight].items():
        inner_resumed.state[weight_resumed][name].copy_(value)
    optimizer_state.set_steps_taken(resumed, 3)
    for optimizer, parameter in ((inner, weight), (inner_resumed, weight_resumed)):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.equal(weight_resumed, weight)
    assert optimizer_state.steps_taken(resumed) == 4
