"""Which response sits in which cache slot. Every rank of a replica keeps the same books."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlhf_mega.config.limits import PREFILL_TOKENS
from marlhf_mega.platform.transfers import fetch, upload
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
    routing: Tensor | None = None
    """[prompt and response - 1, layers of this rank, top_k] on the CPU, if it is recorded."""
    finished: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether it has ended or is as long as it may be."""
        return self.finished or len(self.tokens) == self.max_tokens


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
        self.first_slot = 0
        """Of these."""
        self.are_new = False
        """Whether they get their first token."""
        self._state: Tensor | None = None
        """Of their slots, int64 [4, slots] on the device, see `_from_books`. None: it must come
        from the books, since the slots are others than in the last step."""

    def next_work(self) -> Work | None:
        """Choose what to run now: new prompts once enough slots are free, else one more token."""
        free = self.num_slots - len(self.active)
        if self.waiting and free and (free * 8 >= self.num_slots or not self.active):
            return self._admit(free)
        if not self.active:
            return None
        self.in_flight, self.first_slot, self.are_new = list(self.active), 0, False
        if self._state is None:
            self._state = self._from_books()
        longest = max(len(r.prompt) + len(r.tokens) for r in self.active)
        return Decode(tokens=self._state[0, :, None], positions=self._state[2], longest=longest)

    @property
    def samples(self) -> Tensor:
        """[slots] int64: of the responses in flight, by `Response.sample`."""
        assert self._state is not None
        return self._state[1]

    @property
    def counts(self) -> Tensor:
        """[slots] int64: tokens that they have."""
        assert self._state is not None
        return self._state[3]

    def _from_books(self) -> Tensor:
        """Return last token, sample, its place in the sequence, and tokens so far of each slot."""
        rows = [
            (
                r.tokens[-1] if r.tokens else 0,
                r.sample,
                len(r.prompt) + len(r.tokens) - 1,
                len(r.tokens),
            )
            for r in self.in_flight
        ]
        return upload([*zip(*rows, strict=True)], self.device)

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
        # The only time that the host waits for a step.
        columns, *rows = fetch(sampled) if kept is None else fetch(sampled, kept)
        tokens, logprobs, full_logprobs = columns.tolist()
        for index, response in enumerate(self.in_flight):
            response.tokens.append(int(tokens[index]))
            response.logprobs.append(logprobs[index])
            response.full_logprobs.append(full_logprobs[index])
            response.kept += [part[index] for part in rows]
            response.finished = stop.is_met(response.tokens)
        number = len(self.in_flight)
        self.in_flight = []
        moves, are_all = [], number == len(self.active)
        for slot in range(len(self.active) - 1, -1, -1):
            response = self.active[slot]
            if response.is_complete:
                last = len(self.active) - 1
                if slot != last:
                    self.active[slot] = self.active[last]
                    moves.append((last, slot))
                self.active.pop()
        if self._state is not None and are_all and number == len(self.active):
            self._state[0] = sampled[0]
            self._state[2:].add_(1)
        else:
            self._state = None
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
        self.first_slot, self.are_new = first, True
        self._state = self._from_books()
        return Prefill(
            tokens=upload([[*p] + [0] * (width - len(p)) for p in rows], self.device),
            rows=upload(row_of, self.device),
            lengths=self._state[2] + 1,
            first_slot=first,
        )
