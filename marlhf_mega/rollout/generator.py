"""Generate responses with the policy as it stands, at any tensor and pipeline layout.

Continuous batching: a response that ends hands its slot to the next prompt. With a pipeline the
slots are split into as many groups as there are stages, and the groups follow each other through
the stages. All ranks of a replica keep the same books, so the only messages are activations and
the sampled tokens.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.algorithm.replay_mask import mask_width
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import (
    any_rank,
    receive_hidden,
    send_hidden,
    share_sampled,
)
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.drawing import Drawn, draw
from marlhf_mega.rollout.recorded import KeptSteps, RecordedSteps
from marlhf_mega.rollout.routing import recording, whole_routing
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.slots import Response, SlotGroup
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import Rollout, RolloutOptions
from marlhf_mega.rollout.work import Decode, Prefill, Work


class Generator:
    """Generates with one model's chunks; reads their weights at every call."""

    def __init__(
        self,
        chunks: Sequence[StageModel],
        mesh: Mesh,
        *,
        stop: StopRule,
        cuda_graphs: bool = False,
        second: Sequence[StageModel] = (),
    ) -> None:
        """Take the model; nothing is allocated before a call.

        Args:
            chunks: this rank's part of the policy.
            mesh: this rank's mesh.
            stop: ends a response.
            cuda_graphs: launch a decode step as one; on CUDA devices only. Graphs and caches then
                stay between calls.
            second: this rank's part of another model of the same shape, for rules that ask it.
        """
        self.chunks = list(chunks)
        self.second = list(second)
        self.mesh = mesh
        self.stop = stop
        self.kept = [KeptSteps(each, mesh) for each in (self.chunks, self.second) if cuda_graphs]
        """The recorded steps of both models."""

    def models(self, rule: SamplingRule) -> list[list[StageModel]]:
        """Return the chunks of all that reads the tokens: the policy, and what the rule asks."""
        assert self.second or not rule.has_second, "a second model was given"
        return [self.chunks, self.second] if rule.has_second else [self.chunks]

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        options: RolloutOptions,
    ) -> Rollout:
        """Generate one response to each of this replica's prompts.

        Every rank of the replica calls it with the same arguments; replicas are independent.

        Args:
            prompts: token ids, none empty.
            sample_indices: global index of every sample within the step.
            options: how they are drawn.

        Returns:
            The responses in the order of the prompts, the same on every rank of the replica.
        """
        responses = [
            Response(i, list(prompt), options.limit_of(sample))
            for i, (prompt, sample) in enumerate(zip(prompts, sample_indices, strict=True))
        ]
        order = sorted(responses, key=lambda r: (-len(r.prompt), r.sample))
        indices = torch.tensor(list(sample_indices), dtype=torch.int64)
        keys = fold(options.seed, options.step, indices.to(self.mesh.device))
        run = _Run(self, deque(order), keys, options)
        with ExitStack() as stack:
            for chunks in self.models(options.rule):
                stack.enter_context(generating(chunks))
            stack.enter_context(recording(self.chunks, is_on=options.record_routing))
            run.complete()
        routing = None
        if options.record_routing:
            rows = [r.routing for r in responses if r.routing is not None]
            routing = whole_routing(rows, self.chunks, self.mesh)
        rollout = _to_rollout(
            responses,
            list(sample_indices),
            self.mesh.device,
            run.kept_row,
            is_filtered=options.rule.is_filtered,
        )
        return replace(rollout, routing=routing)


_Steps = RecordedSteps | ChunkDecoder


class _Run:
    """The state of one call of `generate`."""

    def __init__(
        self,
        generator: Generator,
        waiting: deque[Response],
        keys: Tensor,
        options: RolloutOptions,
    ) -> None:
        self.mesh, self.stop = generator.mesh, generator.stop
        self.rule, self.keys = options.rule, keys
        if self.rule.has_mask:
            self.rule = replace(self.rule, always_kept=tuple(sorted(self.stop.end_ids)))
        models = generator.models(self.rule)
        slots = min(options.slots or len(waiting), len(waiting))
        longest = max((len(r.prompt) + r.max_tokens for r in waiting), default=1)
        # Replicas that share experts pass through them equally often, however few their prompts.
        most_groups = self.mesh.pp_size if self.mesh.ep_size > 1 else slots
        num_groups = max(1, min(self.mesh.pp_size, most_groups))
        share = max(1, -(-slots // num_groups))
        self.groups = [SlotGroup(share, waiting, self.mesh.device) for _ in range(num_groups)]
        most = max((r.max_tokens for r in waiting), default=1)
        self.positions = torch.arange(most, device=self.mesh.device)
        self.numbers = [keys.new_zeros(share, most, dtype=torch.float64) for _ in self.groups]
        """[slots, longest response] of each group: in [0, 1), what decides a slot's tokens."""
        sizes = {"num_slots": share, "max_tokens": longest}
        # For each group, the decoders of all models chunk by chunk.
        if generator.kept:
            assert not options.record_routing, "graphs do not work with experts"
            kept = [steps.take(num_groups, **sizes) for steps in generator.kept[: len(models)]]
            recorded = [[*zip(*groups, strict=True)] for groups in zip(*kept, strict=True)]
            self.decoders = [[tuple(s.decoder for s in x) for x in each] for each in recorded]
            self.steps: list[list[tuple[_Steps, ...]]] = [[*each] for each in recorded]
        else:
            # The policy's routing is recorded, not that of other models.
            decoder = partial(ChunkDecoder, num_slots=share, max_tokens=longest)
            self.decoders = [
                [
                    (
                        decoder(own, record_routing=options.record_routing),
                        *map(decoder, others),
                    )
                    for own, *others in zip(*models, strict=True)
                ]
                for _ in self.groups
            ]
            self.steps = [[*each] for each in self.decoders]
        self.hidden_size = len(models) * generator.chunks[0].config.hidden_size
        self.dtype = generator.chunks[0].config.params_dtype
        self.sends: deque[tuple[Tensor, object]] = deque()
        self.kept_row: tuple[int, torch.dtype] | None = None
        """Width and format of the record of what filters kept; None: there is none."""
        if self.rule.records_kept:
            vocab_size = generator.chunks[0].model.vocab_size or 0
            self.kept_row = mask_width(top_k=self.rule.top_k, vocab_size=vocab_size)

    def complete(self) -> None:
        """Run until every response has ended."""
        busy: dict[int, Drawn] = {}
        while self._anyone_left(busy):
            for index, group in enumerate(self.groups):
                if index in busy:
                    self._collect(index, group, busy.pop(index))
                work = group.next_work()
                if work is not None:
                    busy[index] = self._pass(index, group, work)
                elif self.mesh.ep_size > 1:
                    self._pass(index, group, self._idle_work())
        while self.sends:
            self._finish_oldest_send()

    def _anyone_left(self, busy: dict[int, Drawn]) -> bool:
        mine = bool(busy or self.groups[0].waiting or any(g.active for g in self.groups))
        if self.mesh.ep_size == 1:
            return mine
        # Experts are shared by replicas: nobody stops before all of them have finished.
        return any_rank(mine, self.mesh.device, self.mesh.groups.tp_ep_pp)

    def _idle_work(self) -> Work:
        """One token of no response, for a rank whose experts others still need."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.mesh.device)
        return Decode(tokens=zero[None], positions=zero, longest=1)

    def _pass(self, index: int, group: SlotGroup, work: Work) -> Drawn:
        """Send one piece of work through all chunks; returns what the last stage samples."""
        mesh, sampled = self.mesh, None
        assert len(self.decoders[index]) == mesh.num_chunks
        for number, decoders in enumerate(self.decoders[index]):
            chunk = decoders[0].chunk
            hidden: list[Tensor | None] = [None] * len(decoders)
            if not chunk.pre_process:
                # The models' states travel beside each other.
                hidden = [h.contiguous() for h in self._receive(work).chunk(len(decoders), -1)]
            steps, numbers = self.steps[index][number], None
            if chunk.post_process and group.in_flight:
                numbers = self._next_numbers(index, group)
            first, *others = steps
            if (
                numbers is not None
                and not others
                and isinstance(first, RecordedSteps)
                and isinstance(work, Decode)
            ):
                sampled = first.draw(work, hidden[0], numbers, self.rule)
                continue
            outputs = [step.run(work, h) for step, h in zip(steps, hidden, strict=True)]
            if not chunk.post_process:
                self._send(torch.cat(outputs, -1))
            elif numbers is not None:
                sampled = draw(decoders, outputs, numbers, self.rule)
        return sampled or self._room_for(len(group.in_flight))

    def _room_for(self, count: int) -> Drawn:
        """Return where a stage that draws nothing gets what another draws."""
        device = self.mesh.device
        columns = torch.zeros(3, count, dtype=torch.float64, device=device)
        if self.kept_row is None:
            return columns, None
        width, dtype = self.kept_row
        return columns, torch.zeros(count, width, dtype=dtype, device=device)

    def _next_numbers(self, index: int, group: SlotGroup) -> Tensor:
        """Return [slots] of those that decide the tokens of the responses in flight."""
        slots = slice(group.first_slot, group.first_slot + len(group.in_flight))
        rows = self.numbers[index][slots]
        if group.are_new:
            rows.copy_(uniform(fold(self.keys[group.samples][:, None], self.positions)))
        return rows.gather(1, group.counts[:, None])[:, 0]

    def _collect(self, index: int, group: SlotGroup, sampled: Drawn) -> None:
        columns, kept = sampled
        columns = share_sampled(columns, self.mesh)
        if kept is not None:
            kept = share_sampled(kept, self.mesh)
        slots = list(group.active)
        moves = group.record(columns, kept, stop=self.stop)
        for slot, response in enumerate(slots):
            if response.is_complete:
                self._keep_routing(index, slot, response)
        for source, target in moves:
            self.numbers[index][target] = self.numbers[index][source]
            for decoder in chain.from_iterable(self.decoders[index]):
                decoder.move_slot(source, target)

    def _keep_routing(self, index: int, slot: int, response: Response) -> None:
        """Read the record of a response that has ended; its last token was not passed."""
        length = len(response.prompt) + len(response.tokens) - 1
        records = [own.routing for own, *_ in self.decoders[index] if own.routing is not None]
        if records:
            response.routing = torch.cat([r.read(slot, length) for r in records], dim=1)

    def _send(self, hidden: Tensor) -> None:
        mesh = self.mesh
        work = send_hidden(hidden.contiguous(), mesh, to_stage=(mesh.pp_rank + 1) % mesh.pp_size)
        self.sends.append((hidden, work))
        if len(self.sends) > len(self.groups):
            self._finish_oldest_send()

    def _finish_oldest_send(self) -> None:
        _, work = self.sends.popleft()
        work.wait()  # type: ignore[attr-defined]

    def _receive(self, work: Work) -> Tensor:
        mesh = self.mesh
        seq = work.tokens.shape[1] if isinstance(work, Prefill) else 1
        buffer = torch.empty(
            seq, len(work.tokens), self.hidden_size, dtype=self.dtype, device=mesh.device
        )
        return receive_hidden(buffer, mesh, from_stage=(mesh.pp_rank - 1) % mesh.pp_size)


def _to_rollout(
    responses: list[Response],
    sample_indices: list[int],
    device: torch.device,
    kept_row: tuple[int, torch.dtype] | None,
    *,
    is_filtered: bool,
) -> Rollout:
    width = max((len(r.tokens) for r in responses), default=1)

    def grid(rows: list[list[float]]) -> Tensor:
        padded = [row + [0.0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, device=device).view(len(responses), width)

    kept = None
    if kept_row is not None:
        kept = torch.zeros(len(responses), width, kept_row[0], dtype=kept_row[1])
        for number, response in enumerate(responses):
            kept[number, : len(response.tokens)] = torch.stack(response.kept)
    return Rollout(
        prompts=[r.prompt for r in responses],
        responses=[r.tokens for r in responses],
        finished=[r.finished for r in responses],
        sample_indices=sample_indices,
        logprobs=grid([r.logprobs for r in responses]),
        full_logprobs=grid([r.full_logprobs for r in responses]) if is_filtered else None,
        kept=kept,
    )
