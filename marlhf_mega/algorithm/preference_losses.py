"""Losses of a policy on ranked responses to a prompt, without a reward model.

S is the sum of a response's log-probs, S_ref that of the reference, h = S - S_ref, and
D = h_w - h_l of the chosen and the rejected response. Every function returns one term for each
pair; the caller adds them up and divides once by the number of pairs of the whole optimizer step.

The caller may multiply a pair's term by its margin: by a predicted difference of rewards as in RDO
(arXiv 2408.09385; not verified, and the model that predicts it is not ours). It may add the chosen
response's negative log-likelihood per token, as iterative DPO on reasons does (arXiv 2404.19733).
"""

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput, preference_terms
from marlhf_mega.algorithm.macro_actions import MacroActions


def segment_discounts(actions: MacroActions, gamma: float) -> Tensor:
    """Return gamma^k on every token of macro action k, [batch, response], 0 on padding."""
    lengths = actions.lengths
    powers = gamma ** torch.arange(lengths.shape[1], dtype=torch.float32, device=lengths.device)
    return actions.spread(powers.expand_as(lengths))


def dpo_terms(
    lead: Tensor,
    *,
    beta: float,
    label_smoothing: Tensor | float = 0.0,
    offset: Tensor | float = 0.0,
) -> Tensor:
    """-(1 - e) log sigma(x) - e log sigma(-x) with x = beta D - offset.

    DPO (arXiv 2305.18290, eq. 7); with e the conservative DPO that arXiv 2403.00409 compares with;
    with an offset ODPO (arXiv 2402.10571), where a pair's implicit rewards are to differ by more.
    With D of means per token instead of sums, the length-normalised DPO of arXiv 2411.15124.

    Args:
        lead: [pairs] D.
        beta: how strongly the reference holds.
        label_smoothing: e, the probability that a label is wrong; scalar or [pairs].
        offset: scalar or [pairs].
    """
    return preference_terms(beta * lead - offset, 1.0 - label_smoothing)


def ipo_terms(lead: Tensor, *, tau: float) -> Tensor:
    """(D - 1 / (2 tau))^2 (IPO, arXiv 2310.12036, eq. 17); [pairs] from [pairs] D.

    With D of means per token instead of sums it is what TRL computes.
    """
    return (lead - 0.5 / tau).square()


def cpl_terms(chosen: Tensor, rejected: Tensor, *, alpha: float, bias: float) -> Tensor:
    """-log sigma(alpha S_w - bias alpha S_l), without a reference (CPL, arXiv 2310.13639, eq. 5).

    The paper's S discounts steps: sum_t gamma^t log pi. Here a step is a macro action, and S has
    the weights of `segment_discounts`.

    Args:
        chosen: [pairs] S_w.
        rejected: [pairs] S_l.
        alpha: temperature.
        bias: lambda, below 1: likelihood of either response counts, so that it does not fall.
    """
    return preference_terms(alpha * (chosen - bias * rejected), 1.0)


def refuel_terms(lead: Tensor, reward_lead: Tensor, *, eta: float) -> Tensor:
    """(D - eta (R_w - R_l))^2, D against the policy that gave the responses.

    REFUEL (arXiv 2410.04612, eq. 4). Of a chat only the last turn counts.

    Args:
        lead: [pairs] D.
        reward_lead: [pairs] R_w - R_l.
        eta: nats per unit of reward.
    """
    return (lead - eta * reward_lead).square()


def pro_terms(scores: Tensor, rewards: Tensor) -> Tensor:
    """Every response against all that are worse (PRO, arXiv 2306.17492), as its code has it.

    With s the mean log-prob of a response and T_k = max_{j>k} (r_k - r_j), the sum over k < n of
    log(exp(s_k T_k) + sum_{j>k} exp(s_j (r_k - r_j))) - s_k T_k. There is no reference.

    Args:
        scores: [rankings, responses] s, the best response first.
        rewards: [rankings, responses] r, which do not rise.
    """
    gaps = rewards[:, :-1, None] - rewards[:, None]  # [rankings, k, j]
    worse = torch.ones_like(gaps[0], dtype=torch.bool).triu(1)
    top = gaps.masked_fill(~worse, -torch.inf).amax(2)
    own = scores[:, :-1] * top
    others = (scores[:, None] * gaps).masked_fill(~worse, -torch.inf)
    return (torch.cat((own[..., None], others), 2).logsumexp(2) - own).sum(1)


def xpo_terms(lead: Tensor, explored: Tensor, *, beta: float, alpha: float) -> Tensor:
    """The loss of DPO + alpha S of the response that the reference gave (XPO, arXiv 2405.21046).

    Minimising S makes the policy leave what the reference says. The paper draws a new pair of one
    response each of policy and reference in every step; here pairs are given, so that one step of
    the paper is one run.

    Args:
        lead: [pairs] D.
        explored: [pairs] S of the reference's response, whether chosen or rejected.
        beta: as in `dpo_terms`.
        alpha: weight of the exploration.
    """
    return dpo_terms(lead, beta=beta) + alpha * explored


def bfpo_terms(lead: Tensor, safe: Tensor, *, beta: float, factor: float, shift: float) -> Tensor:
    """(D - (b3 (b1 I_w - I_l) - alpha) / beta)^2 with b3 = 1 / (b1 - 1) (BFPO, arXiv 2408.15313).

    The chosen response is the more helpful one. With b1 = 3 and alpha = 1/2 the target is 1/2 of
    two safe responses, 1 of a safe and an unsafe one, -1 of an unsafe and a safe one, and -1/2.

    Args:
        lead: [pairs] D.
        safe: [pairs, 2] I: 1 for a safe response, else 0; the chosen one first.
        beta: how strongly the reference holds.
        factor: b1, above 1.
        shift: alpha.
    """
    labels = (factor * safe[:, 0] - safe[:, 1]) / (factor - 1)
    return (lead - (labels - shift) / beta).square()


def nash_md_terms(
    logprobs: Tensor, ref_logprobs: Tensor, preference: Tensor, *, beta: float
) -> Tensor:
    """-(P - 1/2) S + beta sum_t sg(log pi - log pi_ref)_t log pi_t (Nash-MD, arXiv 2312.00886).

    The gradient is that of the paper's algorithm as TRL has it: the response is one of the policy,
    and P how likely a judge prefers it to one of the geometric mixture of policy and reference. The
    value itself says nothing.

    Args:
        logprobs: [pairs, response] of the policy's response, 0 on padding.
        ref_logprobs: [pairs, response] of the reference, 0 on padding.
        preference: [pairs] P.
        beta: weight of the divergence from the reference.
    """
    divergence = ((logprobs - ref_logprobs).detach() * logprobs).sum(1)
    return beta * divergence - (preference - 0.5) * logprobs.sum(1)


def ipo_md_terms(lead: Tensor, preference: Tensor, *, tau: float) -> Tensor:
    """(D - (P - 1/2) / tau)^2 on responses that the policy has just given.

    Up to a constant the expectation of `ipo_terms` over who is preferred: online IPO where both
    responses are of the policy, IPO-MD where both are of its geometric mixture with the reference
    (arXiv 2403.08635). The order of a pair does not matter.

    Args:
        lead: [pairs] D of the first response over the second.
        preference: [pairs] P, how likely a judge prefers the first.
        tau: how strongly the reference holds.
    """
    return (lead - (preference - 0.5) / tau).square()


def pair_output(losses: Tensor, rewards: Tensor, chosen_nll: Tensor, mask: Tensor) -> LossOutput:
    """Add the terms up, with the metrics of every loss.

    Args:
        losses: [pairs] with gradient.
        rewards: [pairs, responses] implicit rewards, the chosen response first.
        chosen_nll: [pairs] of the chosen response, per token.
        mask: [pairs] bool, False on those that do not count.
    """
    count = mask.sum().to(losses.dtype)
    columns = held_out_columns(losses, rewards) | {"nll": chosen_nll}
    chosen, others = rewards[:, 0], rewards[:, 1:].mean(1)
    columns |= {"chosen_reward": chosen, "rejected_reward": others}
    metrics = {
        name: (torch.where(mask, column.detach(), 0.0).sum(), count)
        for name, column in columns.items()
        if name != "loss"
    }
    return LossOutput(loss_sum=torch.where(mask, losses, 0.0).sum(), count=count, metrics=metrics)


def held_out_columns(losses: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """Return the loss, the accuracy and the margin of each pair, all [pairs].

    The margin is the lead of the chosen response over the best of the others. Equal rewards, such
    as those of a policy that still is its reference, count half.
    """
    lead = rewards[:, 0] - rewards[:, 1:].amax(1)
    return {"accuracy": (lead.sign() + 1) / 2, "margin": lead, "loss": losses}
