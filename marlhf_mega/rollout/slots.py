"""Which response sits in which cache slot. Every rank of a replica keeps the same books."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlhf_mega.config.limits import PREFILL_TOKENS
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.work import Decode, Prefill, Work


@dataclass
class Response:
    """One response as it grows."""

    sample: int
    """Index among the prompts that the generator was given."""
    prompt: list[int]
    max_tokens: int
    """Longest it may grow."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)
    """Before top-k and top-p."""
    kept: list[Tensor] = field(default_factory=list)
    """[width] row of every token on the CPU, if they are recorded."""
    finished: bool = False


class SlotGroup:
    """Slots that are decoded together; with a pipeline there is one group per stage in flight.

    Active responses always fill slots 0..n-1: the last one moves into a slot that falls free, so
    that a step computes nothing for responses that have ended, and new prompts are written to
    neighbouring slots. Samples of one prompt that are admitted together read it once.
    """

    def __init__(self, num_slots: int, waiting: deque[Response], device: torch.device) -> None:
        self.num_slots = num_slots
        self.waiting = waiting
        self.device = device
        self.active: list[Response] = []
        self.in_flight: list[Response] = []
        """Responses that the work under way adds a token to."""

    def next_work(self) -> Work | None:
        """Choose what to run now: new prompts once enough slots are free, else one more token."""
        free = self.num_slots - len(self.active)
        if self.waiting and free and (free * 8 >= self.num_slots or not self.active):
            return self._admit(free)
        if not self.active:
            return None
        self.in_flight = list(self.active)
        positions = [len(r.prompt) + len(r.tokens) - 1 for r in self.active]
        return Decode(
            tokens=self._tensor([[r.tokens[-1]] for r in self.active]),
            positions=self._tensor(positions),
            longest=max(positions) + 1,
        )

    def record(
        self, sampled: Tensor, kept: Tensor | None, *, stop: StopRule
    ) -> list[tuple[int, int]]:
        """Add the sampled tokens, retire what has ended, close the gaps.

        Args:
            sampled: [3, in flight] float64: tokens, log-probs, and log-probs before filters.
            kept: [in flight, width] which tokens the filters kept; None where it is not recorded.
            stop: ends a response.

        Returns:
            (source, target) slots whose caches have to be copied, in this order.
        """
        tokens, logprobs, full_logprobs = sampled.tolist()
        for index, response in enumerate(self.in_flight):
            response.tokens.append(int(tokens[index]))
            response.logprobs.append(logprobs[index])
            response.full_logprobs.append(full_logprobs[index])
            if kept is not None:
                response.kept.append(kept[index])
            response.finished = stop.is_met(response.tokens)
        self.in_flight = []
        moves = []
        for slot in range(len(self.active) - 1, -1, -1):
            response = self.active[slot]
            if response.finished or len(response.tokens) == response.max_tokens:
                last = len(self.active) - 1
                if slot != last:
                    self.active[slot] = self.active[last]
                    moves.append((last, slot))
                self.active.pop()
        return moves

    def _admit(self, free: int) -> Prefill:
        first = len(self.active)
        width = len(self.waiting[0].prompt)
        most_rows = max(1, PREFILL_TOKENS // width)
        rows: dict[tuple[int, ...], int] = {}
        row_of = []
        self.in_flight = []
        while self.waiting and len(self.in_flight) < free:
            prompt = tuple(self.waiting[0].prompt)
            if prompt not in rows and len(rows) == most_rows:
                break
            row_of.append(rows.setdefault(prompt, len(rows)))
            self.in_flight.append(self.waiting.popleft())
        self.active += self.in_flight
        return Prefill(
            tokens=self._tensor([[*p] + [0] * (width - len(p)) for p in rows]),
            rows=self._tensor(row_of),
            lengths=self._tensor([len(r.prompt) for r in self.in_flight]),
            first_slot=first,
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self.device)
