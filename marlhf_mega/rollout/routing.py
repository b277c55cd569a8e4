"""Which experts the tokens of the sequences in flight went to, a slot for each sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.routing import Replay, record_dtype, replays_of
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.work import Prefill, Work


class RoutingRecord:
    """The choices of one model chunk's routers, stored where its keys and values are."""

    def __init__(self, chunk: StageModel, *, num_slots: int, max_tokens: int) -> None:
        """Allocate it.

        Args:
            chunk: of a model with experts.
            num_slots: sequences in flight.
            max_tokens: longest sequence.
        """
        model, device = chunk.model, chunk.rotary_speeds.device
        assert model.num_experts is not None
        self.routers: list[Replay] = replays_of(chunk)
        shape = (num_slots, max_tokens, len(self.routers), model.experts_per_token)
        self._experts = torch.zeros(shape, dtype=record_dtype(model.num_experts), device=device)
        self._slots = torch.arange(num_slots, device=device)

    def store(self, work: Work) -> None:
        """Take what the routers chose in the pass that has just been made."""
        chosen = [router.chosen for router in self.routers]
        experts = torch.stack([c for c in chosen if c is not None], dim=1) + 1
        experts = experts.to(self._experts.dtype)
        batch, seq = work.tokens.shape
        if isinstance(work, Prefill):
            new = slice(work.first_slot, work.first_slot + len(work.rows))
            by_row = experts.view(seq, batch, *experts.shape[1:]).transpose(0, 1)
            self._experts[new, :seq] = by_row[work.rows]
        else:
            self._experts[self._slots[:batch], work.positions] = experts

    def move_slot(self, source: int, target: int) -> None:
        """Copy a sequence's choices to another slot."""
        self._experts[target] = self._experts[source]

    def read(self, slot: int, length: int) -> Tensor:
        """Return [length, layers of the chunk, top_k] on the CPU: of a sequence's first tokens."""
        return self._experts[slot, :length].cpu()


@contextmanager
def recording(chunks: Sequence[StageModel], *, is_on: bool) -> Iterator[None]:
    """Let routers keep what they choose."""
    routers = [router for chunk in chunks for router in replays_of(chunk)]
    for router in routers:
        router.records = is_on
    try:
        yield
    finally:
        for router in routers:
            router.records, router.chosen = False, None


def whole_routing(rows: Sequence[Tensor], chunks: Sequence[StageModel], mesh: Mesh) -> Tensor:
    """Join what the pipeline's stages recorded. All ranks of a replica call it.

    Args:
        rows: [tokens, layers of this rank, top_k] of each sequence, on the CPU; a replica may have
            no sequence.
        chunks: of this rank.
        mesh: this rank's mesh.

    Returns:
        [sequences, longest, layers, top_k] on the CPU, see `Rollout.routing`.
    """
    numbers = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
    model = chunks[0].model
    assert model.num_experts is not None
    # One row more, which is cut off again: there may be no other.
    nothing = torch.zeros(
        0, len(numbers), model.experts_per_token, dtype=record_dtype(model.num_experts)
    )
    own = torch.nn.utils.rnn.pad_sequence([*rows, nothing], batch_first=True)[:-1]
    whole = own.new_zeros(*own.shape[:2], model.num_layers, own.shape[-1])
    for layers, part in gather_objects((numbers, own), mesh.groups.pp):
        whole[:, :, layers] = part
    return whole
