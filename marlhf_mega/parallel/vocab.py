"""Log-probabilities and entropy from vocabulary-sharded logits, in chunks, with exact gradients.

No rank ever holds `[tokens, vocab]`, nor the float32 copy of its own shard for all tokens: logits
of one chunk are made, reduced to a few numbers per token and dropped; backward makes them again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.config.limits import logits_chunk_tokens
from marlhf_mega.parallel.mesh import Group, Mesh
from marlhf_mega.platform.products import matmul


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Which columns of the vocabulary this tensor-parallel rank holds."""

    group: Group
    start: int
    """First column."""
    num_real: int
    """Columns that are tokens; the rest of the shard is padding and takes no part."""
    num_total: int
    """Tokens of the whole vocabulary."""

    @staticmethod
    def of(mesh: Mesh, *, vocab_size: int, padded_size: int) -> "VocabShard":
        """Return this rank's shard of `vocab_size` tokens padded to `padded_size` rows."""
        width = padded_size // mesh.tp_size
        start = mesh.tp_rank * width
        num_real = min(max(vocab_size - start, 0), width)
        return VocabShard(
            group=mesh.groups.tp, start=start, num_real=num_real, num_total=vocab_size
        )


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and the entropy of softmax(cap(hidden @ weight.T) / temperature).

    All tensor-parallel ranks call it with the same hidden states and get the same result. The
    gradient of `hidden` is this rank's part only: the caller sums it over the group (the backward
    of Megatron's copy-to or gather-from region does).

    Args:
        hidden: [tokens, hidden].
        weight: [vocab/tp, hidden], this rank's rows.
        targets: [tokens] int64, global token ids.
        shard: which rows `weight` holds.
        temperature: divides the logits.
        softcap: logits become softcap * tanh(logits / softcap) first.

    Returns:
        logprobs and entropy, float32 [tokens] each.
    """
    result: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(
        hidden, weight, targets, shard, temperature, softcap
    )
    return result


def _scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits over the temperature and, with a cap, d logits / d raw logits."""
    logits = matmul(hidden, weight.t()).float()
    slope = None
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        slope = 1 - squashed.square()
        logits = squashed * softcap
    return (logits if temperature == 1.0 else logits / temperature), slope


def _own_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return column indices inside the shard (0 for others' targets) and whose they are."""
    local = targets - shard.start
    mine = (local >= 0) & (local < shard.num_real)
    return torch.where(mine, local, 0), mine


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabShard,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        rows = weight[: shard.num_real]
        # Small results that stay after each chunk would split the memory that the next one needs.
        found = torch.empty(len(targets), 3, device=hidden.device)
        for h, t, part in _chunks(weight, hidden, targets, found):
            part[:] = _chunk_statistics(h, rows, t, shard, temperature, softcap)
        logprobs, entropy, log_normaliser = found.t().contiguous()
        ctx.save_for_backward(hidden, weight, targets, entropy, log_normaliser)
        ctx.shard, ctx.temperature, ctx.softcap = shard, temperature, softcap
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> Any:
        hidden, weight, targets, entropy, log_normaliser = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        rows = weight[: shard.num_real]
        grad_hidden = torch.empty_like(hidden)
        grad_rows: Tensor | None = None
        # Asking a GPU would mean to wait for it.
        with_entropy = grad_entropy.device.type != "cpu" or bool(grad_entropy.any())
        done = 0
        chunks = _chunks(
            weight, hidden, targets, entropy, log_normaliser, grad_logprobs, grad_entropy
        )
        for h, t, ent, log_z, grad_lp, grad_ent in chunks:
            grad = _logits_gradient(
                h,
                rows,
                t,
                log_z,
                grad_lp,
                (ent, grad_ent) if with_entropy else None,
                shard,
                ctx.temperature,
                ctx.softcap,
            )
            grad_hidden[done : done + len(h)] = matmul(grad, rows)
            part = matmul(grad.t(), h)
            # Chunks of a low-precision model are summed in float32 and rounded once.
            grad_rows = part if grad_rows is None else grad_rows.float().add_(part)
            done += len(h)
            del grad, part  # or they would lie beside those of the next chunk
        assert grad_rows is not None, "even no tokens are one chunk"
        return grad_hidden, _with_padding(grad_rows, weight), None, None, None, None


def _logits_gradient(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    log_normaliser: Tensor,
    grad_logprobs: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    shard: VocabShard,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Return d loss / d raw logits of a chunk, [tokens, real columns] like `hidden`.

    `entropy` is that of the tokens and its gradient, or none where nothing depends on it.
    """
    logits, slope = _scaled_logits(hidden, rows, temperature, softcap)
    logp = logits.sub_(log_normaliser[:, None])
    # d logp[target] / d z = onehot - p;  d entropy / d z = -p (log p + entropy)
    if entropy is not None:
        value, grad_value = entropy
        p = logp.exp()
        weight_on_p = logp.add_(value[:, None]).mul_(-grad_value[:, None])
        grad = weight_on_p.sub_(grad_logprobs[:, None]).mul_(p)
        del p
    else:
        grad = logp.exp_().mul_(-grad_logprobs[:, None])
    local, mine = _own_targets(targets, shard)
    if shard.num_real:
        grad.scatter_add_(1, local[:, None], (grad_logprobs * mine)[:, None])
    if slope is not None:
        grad.mul_(slope)
    if temperature != 1.0:
        grad.div_(temperature)
    return grad.to(hidden.dtype)


def _with_padding(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of all rows of `weight`, zero behind those given."""
    if len(rows) == len(weight):
        return rows.to(weight.dtype)
    whole = torch.zeros_like(weight)
    whole[: len(rows)] = rows
    return whole


def _chunks(weight: Tensor, *tensors: Tensor) -> Any:
    """Cut along the tokens, on every rank alike: rows of `weight` that are padding count too."""
    size = logits_chunk_tokens(len(weight), on_cpu=weight.device.type == "cpu")
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _chunk_statistics(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    shard: VocabShard,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Return log-probs, entropy and the log of the normaliser, float32 [tokens, 3]."""
    logits, _ = _scaled_logits(hidden, rows, temperature, softcap)
    local, mine = _own_targets(targets, shard)
    if shard.num_real:
        highest = logits.amax(-1)
        target_logits = logits.gather(1, local[:, None])[:, 0] * mine
    else:
        highest = torch.full(targets.shape, -torch.inf, device=hidden.device)
        target_logits = torch.zeros(targets.shape, device=hidden.device)
    _all_reduce(highest, dist.ReduceOp.MAX, shard.group)
    shifted = logits.sub_(highest[:, None])
    weights = shifted.exp()
    sums = torch.stack([weights.sum(-1), shifted.mul_(weights).sum(-1), target_logits])
    _all_reduce(sums, dist.ReduceOp.SUM, shard.group)
    normaliser, weighted, target_logits = sums
    log_z = highest + normaliser.log()
    entropy = normaliser.log() - weighted / normaliser
    return torch.stack([target_logits - log_z, entropy, log_z], -1)


def _all_reduce(tensor: Tensor, op: Any, group: Group) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
