"""The optimizer of the CPU is torch's, without torch's compiler."""

import subprocess
import sys

import torch

from marlhf_mega.platform.cpu.optimizer import AdamW


def trained(kind):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=True)
    for step in range(4):
        optimizer.zero_grad()
        (weight.sin() * (step + 1)).sum().backward()
        optimizer.step()
        if step == 1:
            state = optimizer.state_dict()
            optimizer = kind([weight], lr=0.5)
            optimizer.load_state_dict(state)
    return weight


def test_it_computes_what_torchs_own_does():
    assert torch.equal(trained(AdamW), trained(torch.optim.AdamW))


def test_it_does_not_load_the_compiler():
    code = (
        "import sys, torch\n"
        "from marlhf_mega.platform.cpu.optimizer import AdamW\n"
        "from tests.unit.platform.cpu.test_optimizer import trained\n"
        "trained(AdamW)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "trained(torch.optim.AdamW)\n"
        "assert 'torch._dynamo' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
