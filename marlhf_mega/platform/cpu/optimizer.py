"""AdamW that does not load torch's compiler."""

import torch


class AdamW(torch.optim.AdamW):
    """Torch's AdamW without what keeps its methods out of compiled code.

    On CPUs nothing is compiled, and to keep out of it loads the compiler: a second of processor
    time at the start of every rank.
    """

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[attr-defined]
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]
