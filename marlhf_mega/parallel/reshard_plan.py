"""Plan which rank sends which part of which tensor to which rank when weights are resharded.

A layout is a list of blocks for every rank. Pure functions; nothing here communicates.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Block:
    """A range of a named tensor and where a rank stores it."""

    tensor: str
    """Name of the unsharded tensor, the same in every layout."""
    dim: int
    """Dim along which the tensor is sharded."""
    lo: int
    """First index in the unsharded tensor."""
    hi: int
    """One past the last index."""
    parameter: int
    """Index of the rank's parameter that holds the range."""
    start: int
    """First index of the range in that parameter."""
    index_bytes: int
    """Bytes per index along `dim`."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A range to copy from a rank that holds it to a rank that needs it."""

    source: int
    target: int
    source_parameter: int
    source_start: int
    target_parameter: int
    target_start: int
    dim: int
    size: int
    """Number of indices along `dim`."""
    index_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the range."""
        return self.size * self.index_bytes

    @property
    def is_local(self) -> bool:
        """Whether the range stays on its rank."""
        return self.source == self.target


def plan_transfers(
    sources: Sequence[Sequence[Block]], targets: Sequence[Sequence[Block]]
) -> list[Transfer]:
    """Find exactly one sender for every index that any rank needs.

    A rank that holds what it needs copies it. Otherwise the holder sends that has the fewest bytes
    to send so far.

    Args:
        sources: what each rank holds before.
        targets: what each rank holds afterwards.

    Raises:
        RuntimeError: no rank holds an index that some rank needs.
    """
    holders: dict[str, list[tuple[int, Block]]] = defaultdict(list)
    for rank, blocks in enumerate(sources):
        for block in blocks:
            holders[block.tensor].append((rank, block))
    sent = [0] * len(sources)
    transfers = []
    for rank, blocks in enumerate(targets):
        for need in blocks:
            for transfer in _cover(need, rank, holders[need.tensor], sent):
                transfers.append(transfer)
                if not transfer.is_local:
                    sent[transfer.source] += transfer.num_bytes
    return transfers


def _cover(
    need: Block, target: int, holders: Sequence[tuple[int, Block]], sent: Sequence[int]
) -> Iterator[Transfer]:
    done = need.lo
    while done < need.hi:
        able = [(rank, block) for rank, block in holders if block.lo <= done < block.hi]
        if not able:
            raise RuntimeError(
                f"{need.tensor}: some rank must hold index {done}, which rank {target} needs; none "
                "does. Build both layouts from the same model."
            )
        rank, block = min(able, key=lambda item: (item[0] != target, sent[item[0]], item[0]))
        assert (block.dim, block.index_bytes) == (need.dim, need.index_bytes), (block, need)
        end = min(need.hi, block.hi)
        yield Transfer(
            source=rank,
            target=target,
            source_parameter=block.parameter,
            source_start=block.start + done - block.lo,
            target_parameter=need.parameter,
            target_start=need.start + done - need.lo,
            dim=need.dim,
            size=end - done,
            index_bytes=need.index_bytes,
        )
        done = end


def schedule_rounds(transfers: Sequence[Transfer], *, limit_bytes: int) -> list[list[Transfer]]:
    """Split the transfers between ranks into rounds that bound the bytes per rank.

    Every part goes into the first round that has room at both its sender and its receiver, which
    keeps both busy.

    Args:
        transfers: from `plan_transfers`; local ones are left out.
        limit_bytes: most bytes that a rank sends, and that it receives, in one round. One index of
            a tensor always fits.

    Returns:
        The rounds, in the order in which they must run.
    """
    rounds: list[list[Transfer]] = []
    sending: list[dict[int, int]] = []
    receiving: list[dict[int, int]] = []
    first_open: dict[tuple[int, int], int] = {}
    for transfer in transfers:
        if transfer.is_local:
            continue
        pair = (transfer.source, transfer.target)
        for part in _split(transfer, limit_bytes):
            number = first_open.get(pair, 0)
            while True:
                if number == len(rounds):
                    rounds.append([])
                    sending.append(defaultdict(int))
                    receiving.append(defaultdict(int))
                size = padded_bytes(part)
                out, into = sending[number][part.source], receiving[number][part.target]
                if max(out, into) == 0 or max(out, into) + size <= limit_bytes:
                    break
                number += 1
            rounds[number].append(part)
            sending[number][part.source] += size
            receiving[number][part.target] += size
            first_open[pair] = number
    return rounds


def padded_bytes(transfer: Transfer) -> int:
    """Return the bytes of a transfer in a bucket, where ranges are aligned for any dtype."""
    return -(-transfer.num_bytes // 8) * 8


def _split(transfer: Transfer, limit_bytes: int) -> Iterator[Transfer]:
    """Split a long range, so that one round can hold parts for several ranks."""
    step = max(1, limit_bytes // 8 // transfer.index_bytes)
    for done in range(0, transfer.size, step):
        yield replace(
            transfer,
            source_start=transfer.source_start + done,
            target_start=transfer.target_start + done,
            size=min(step, transfer.size - done),
        )
