"""Log-probabilities and entropy from vocabulary-sharded logits, in chunks, with exact gradients.

No rank ever holds `[tokens, vocab]` logits, nor a float32 copy of its own shard for all tokens: the
logits of one chunk are computed, reduced to a few numbers per token and dropped. The backward pass
recomputes them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.config.limits import logits_chunk_tokens
from marlhf_mega.parallel.collectives import max_over_tensor, reduce_over_tensor
from marlhf_mega.parallel.mesh import Group, Mesh
from marlhf_mega.platform.cpu.matmul import matmul


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """The part of the vocabulary that this tensor-parallel rank holds."""

    group: Group
    start: int
    """First token id."""
    num_real: int
    """Number of real tokens; the rest of the shard is padding, which takes no part."""
    num_total: int
    """Number of tokens of the whole vocabulary."""

    @property
    def most_real(self) -> int:
        """Number of real tokens of the first rank: no other has more."""
        rank = self.group.rank()
        return min(self.start // rank, self.num_total) if rank else self.num_real

    @staticmethod
    def of(mesh: Mesh, *, vocab_size: int, padded_size: int) -> "VocabShard":
        """Return this rank's shard of `vocab_size` tokens padded to `padded_size`."""
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
    kept: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute log p(target) and the entropy of softmax(cap(hidden @ weight.T) / temperature).

    All tensor-parallel ranks call it with the same hidden states and get the same result. The
    gradient of `hidden` is only this rank's part. The caller sums it over the group, as the
    backward of Megatron's copy-to or gather-from region does.

    Args:
        hidden: [tokens, hidden].
        weight: [vocab/tp, hidden].
        targets: [tokens] int64, global token ids.
        shard: the part of the vocabulary that `weight` holds.
        temperature: divides the logits.
        softcap: logits become softcap * tanh(logits / softcap) first; None means no cap.
        kept: [tokens, width] rows of `read_mask` on any device: the softmax is over the tokens
            that were kept; None means over all.

    Returns:
        logprobs and entropy, float32 [tokens] each; with `kept` also the log-probs under the
        softmax over all tokens.
    """
    result: tuple[Tensor, ...] = _ChunkedLogprobs.apply(
        hidden, weight, targets, shard, temperature, softcap, kept
    )
    return result


def _scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits / temperature and, with a softcap, d capped logits / d raw logits."""
    logits = matmul(hidden, weight.t()).float()
    slope = None
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        slope = 1 - squashed.square()
        logits = squashed * softcap
    return (logits if temperature == 1.0 else logits / temperature), slope


def _own_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return indices within the shard, 0 for other shards' targets, and which are in this shard."""
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
        kept: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weight_rows = weight[: shard.num_real]
        # Results are written into one tensor: small ones per chunk would fragment the memory.
        found = torch.empty(len(targets), 3 if kept is None else 6, device=hidden.device)
        for h, t, part, mask in _chunks(weight, shard, kept, hidden, targets, found):
            logits, _ = _scaled_logits(h, weight_rows, temperature, softcap)
            if mask is not None:
                part[:, 3:] = _chunk_statistics(logits.clone(), t, shard)
                logits.masked_fill_(~mask, -torch.inf)
            part[:, :3] = _chunk_statistics(logits, t, shard, mask)
        logprobs, entropy, log_normaliser, *full = found.t().contiguous()
        ctx.save_for_backward(hidden, weight, targets, entropy, log_normaliser, *full[2:])
        ctx.shard, ctx.temperature, ctx.softcap, ctx.kept = shard, temperature, softcap, kept
        return (logprobs, entropy, *full[:1])

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *grad_full: Tensor) -> Any:
        hidden, weight, targets, entropy, log_normaliser, *full_normaliser = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        weight_rows = weight[: shard.num_real]
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        # On a GPU this check would synchronise.
        with_entropy = grad_entropy.device.type != "cpu" or bool(grad_entropy.any())
        done = 0
        tensors = [hidden, targets, entropy, log_normaliser, grad_logprobs, grad_entropy]
        tensors += [*full_normaliser, *grad_full]
        for h, t, ent, log_z, grad_lp, grad_ent, *full, mask in _chunks(
            weight, shard, ctx.kept, *tensors
        ):
            grad = _logits_gradient(
                _scaled_logits(h, weight_rows, ctx.temperature, ctx.softcap),
                t,
                (log_z, grad_lp),
                (ent, grad_ent) if with_entropy else None,
                (*full, mask) if mask is not None else None,
                shard,
            )
            if ctx.temperature != 1.0:
                grad.div_(ctx.temperature)
            grad = grad.to(h.dtype)
            grad_hidden[done : done + len(h)] = matmul(grad, weight_rows)
            part = matmul(grad.t(), h)
            # Chunks of a low-precision model are summed in float32, then rounded once.
            grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
            done += len(h)
            del grad, part  # so that they do not coexist with those of the next chunk
        assert grad_weight is not None, "zero tokens are one chunk"
        return grad_hidden, _with_padding(grad_weight, weight), *(None,) * 5


def _logits_gradient(
    scaled: tuple[Tensor, Tensor | None],
    targets: Tensor,
    logprobs: tuple[Tensor, Tensor],
    entropy: tuple[Tensor, Tensor] | None,
    full: tuple[Tensor, Tensor, Tensor] | None,
    shard: VocabShard,
) -> Tensor:
    """Return temperature * d loss / d raw logits of a chunk, float32 [tokens, num_real].

    Args:
        scaled: logits, which are used up, and slope of `_scaled_logits`.
        targets: [tokens].
        logprobs: [tokens] log normaliser, and gradient of the log-probs.
        entropy: [tokens] entropy and its gradient; None if the loss does not depend on it.
        full: of the softmax over all tokens: log normaliser, gradient of the log-probs; and the
            mask of the kept tokens, which the others are over. None where all are kept.
        shard: which columns these are.
    """
    (logits, slope), (log_z, grad_logprobs) = scaled, logprobs
    whole = None
    if full is not None:
        full_log_z, grad_full, mask = full
        whole = (logits - full_log_z[:, None]).exp_().mul_(-grad_full[:, None])
        _add_at_targets(whole, targets, grad_full, shard)
        logits.masked_fill_(~mask, -torch.inf)
    logp = logits.sub_(log_z[:, None])
    # d logp[target] / d z = onehot - p;  d entropy / d z = -p (log p + entropy)
    if entropy is not None:
        value, grad_value = entropy
        p = logp.exp()
        if full is not None:
            logp.masked_fill_(~mask, 0.0)
        weight_on_p = logp.add_(value[:, None]).mul_(-grad_value[:, None])
        grad = weight_on_p.sub_(grad_logprobs[:, None]).mul_(p)
        del p
    else:
        grad = logp.exp_().mul_(-grad_logprobs[:, None])
    _add_at_targets(grad, targets, grad_logprobs, shard)
    if whole is not None:
        grad.add_(whole)
    return grad if slope is None else grad.mul_(slope)


def _add_at_targets(grad: Tensor, targets: Tensor, values: Tensor, shard: VocabShard) -> None:
    """Add a value to every token's target, in place, where this rank holds it."""
    local, mine = _own_targets(targets, shard)
    if shard.num_real:
        grad.scatter_add_(1, local[:, None], (values * mine)[:, None])


def _with_padding(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the whole `weight`: zero for the padding after the real tokens."""
    if len(grad) == len(weight):
        return grad.to(weight.dtype)
    whole = torch.zeros_like(weight)
    whole[: len(grad)] = grad
    return whole


def _chunks(weight: Tensor, shard: VocabShard, kept: Tensor | None, *tensors: Tensor) -> Any:
    """Split along the tokens, equally on every rank, since the size counts padded weight rows.

    Each chunk ends with its mask, bool [tokens, num_real]; None where nothing was filtered.
    """
    size = logits_chunk_tokens(len(weight), on_cpu=weight.device.type == "cpu")
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    if kept is None:
        yield from ((*part, None) for part in parts)
        return
    for part, rows in zip(parts, kept.split(size), strict=True):
        mask = read_mask(rows.to(weight.device), start=shard.start, count=shard.num_real)
        yield (*part, mask)


def _chunk_statistics(
    logits: Tensor, targets: Tensor, shard: VocabShard, mask: Tensor | None = None
) -> Tensor:
    """Return log-probs, entropy and the log normaliser, float32 [tokens, 3]; uses up `logits`.

    Where `mask` is False the logits are -inf.
    """
    local, mine = _own_targets(targets, shard)
    if shard.num_real:
        highest = logits.amax(-1)
        target_logits = torch.where(mine, logits.gather(1, local[:, None])[:, 0], 0.0)
    else:
        highest = torch.full(targets.shape, -torch.inf, device=logits.device)
        target_logits = torch.zeros(targets.shape, device=logits.device)
    max_over_tensor(highest, shard.group)
    shifted = logits.sub_(highest[:, None])
    weights = shifted.exp()
    if mask is not None:
        shifted.masked_fill_(~mask, 0.0)
    sums = torch.stack([weights.sum(-1), shifted.mul_(weights).sum(-1), target_logits])
    reduce_over_tensor(sums, shard.group)
    normaliser, weighted, target_logits = sums
    log_z = highest + normaliser.log()
    entropy = normaliser.log() - weighted / normaliser
    return torch.stack([target_logits - log_z, entropy, log_z], -1)
