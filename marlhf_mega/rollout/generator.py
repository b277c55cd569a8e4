"""Generate responses with the policy as it stands, at any tensor and pipeline layout.

Continuous batching: a response that ends hands its slot to the next prompt. With a pipeline the
slots are split into as many groups as there are stages, and the groups follow each other through
the stages. All ranks of a replica keep the same books, so the only messages are activations and
the sampled tokens.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import (
    any_over_group,
    receive_hidden,
    send_hidden,
    share_sampled,
)
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.recorded import RecordedSteps
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from marlhf_mega.rollout.slots import Response, SlotGroup
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.rollout.work import Decode, Prefill, Work


class Generator:
    """Generates with one model's chunks; reads their weights at every call."""

    def __init__(
        self,
        chunks: Sequence[StageModel],
        mesh: Mesh,
        *,
        eos_id: int,
        cuda_graphs: bool = False,
    ) -> None:
        """Take the model; nothing is allocated before a call.

        Args:
            chunks: this rank's part of the policy.
            mesh: where this rank stands.
            eos_id: ends a response.
            cuda_graphs: launch a decode step as one; on CUDA devices only.
        """
        self.chunks = list(chunks)
        self.mesh = mesh
        self.eos_id = eos_id
        self.cuda_graphs = cuda_graphs

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        *,
        rule: SamplingRule,
        max_response_tokens: int | Sequence[int],
        seed: int,
        step: int,
        slots: int | None = None,
        stop_at_eos: bool = True,
    ) -> Rollout:
        """Generate one response to each of this replica's prompts.

        Every rank of the replica calls it with the same arguments; replicas are independent.

        Args:
            prompts: token ids, none empty.
            sample_indices: global index of every sample within the step.
            rule: temperature and filters.
            max_response_tokens: longest response, the end token included; or each one's limit.
            seed: of the run.
            step: of the run; (seed, step, sample index, position) decide every draw.
            slots: responses decoded together; none: all.
            stop_at_eos: benchmarks switch it off to generate exactly the asked length.

        Returns:
            The responses in the order of the prompts, the same on every rank of the replica.
        """
        limits = max_response_tokens
        if isinstance(limits, int):
            limits = [limits] * len(prompts)
        responses = [
            Response(i, list(p), n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
        ]
        order = sorted(responses, key=lambda r: (-len(r.prompt), r.sample))
        keys = fold(seed, step, torch.tensor(list(sample_indices), dtype=torch.int64))
        run = _Run(
            self,
            deque(order),
            keys,
            rule=rule,
            slots=min(slots or len(prompts), len(prompts)),
            eos_id=self.eos_id if stop_at_eos else -1,
        )
        with generating(self.chunks):
            run.complete()
        return _to_rollout(responses, list(sample_indices), self.mesh.device)


class _Run:
    """The state of one call of `generate`."""

    def __init__(
        self,
        generator: Generator,
        waiting: deque[Response],
        keys: Tensor,
        *,
        rule: SamplingRule,
        slots: int,
        eos_id: int,
    ) -> None:
        self.mesh, self.rule, self.keys = generator.mesh, rule, keys
        self.eos_id = eos_id
        longest = max((len(r.prompt) + r.max_tokens for r in waiting), default=1)
        # Replicas that share experts pass through them equally often, however few their prompts.
        most_groups = self.mesh.pp_size if self.mesh.ep_size > 1 else slots
        num_groups = max(1, min(self.mesh.pp_size, most_groups))
        share = max(1, -(-slots // num_groups))
        self.groups = [SlotGroup(share, waiting, self.mesh.device) for _ in range(num_groups)]
        self.decoders = [
            [ChunkDecoder(chunk, num_slots=share, max_tokens=longest) for chunk in generator.chunks]
            for _ in self.groups
        ]
        # Between two calls weights move: graphs are recorded anew in each, as the cache is made.
        self.passes = [
            [RecordedSteps(d).run if generator.cuda_graphs else d.run for d in decoders]
            for decoders in self.decoders
        ]
        self.hidden_size = generator.chunks[0].config.hidden_size
        self.dtype = generator.chunks[0].config.params_dtype
        self.sends: deque[tuple[Tensor, object]] = deque()

    def complete(self) -> None:
        """Run until every response has ended."""
        busy: dict[int, Tensor] = {}
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

    def _anyone_left(self, busy: dict[int, Tensor]) -> bool:
        mine = bool(busy or self.groups[0].waiting or any(g.active for g in self.groups))
        if self.mesh.ep_size == 1:
            return mine
        # Experts are shared by replicas: nobody stops before all of them have finished.
        return any_over_group(mine, self.mesh.groups.tp_ep_pp, self.mesh.device)

    def _idle_work(self) -> Work:
        """One token of no response, for a rank whose experts others still need."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.mesh.device)
        return Decode(tokens=zero[None], positions=zero, longest=1)

    def _pass(self, index: int, group: SlotGroup, work: Work) -> Tensor:
        """Send one piece of work through all chunks; returns the last stage's sample [2, slots]."""
        mesh = self.mesh
        sampled = torch.zeros(2, len(group.in_flight), dtype=torch.float64, device=mesh.device)
        for number, decoder in enumerate(self.decoders[index]):
            hidden = None if decoder.chunk.pre_process else self._receive(work)
            output = self.passes[index][number](work, hidden)
            if not decoder.chunk.post_process:
                self._send(output)
            elif group.in_flight:
                sampled = self._sample(decoder, output, group)
            assert number < mesh.num_chunks
        return sampled

    def _sample(self, decoder: ChunkDecoder, hidden: Tensor, group: SlotGroup) -> Tensor:
        samples = torch.tensor([r.sample for r in group.in_flight])
        positions = torch.tensor([len(r.tokens) for r in group.in_flight])
        numbers = uniform(fold(self.keys[samples], positions)).to(self.mesh.device)
        tokens, logprobs = sample_tokens(
            decoder.logits(hidden), numbers, rule=self.rule, shard=decoder.chunk.vocab_shard
        )
        # One message carries both: ids are exact in float64.
        return torch.stack((tokens.double(), logprobs.double()))

    def _collect(self, index: int, group: SlotGroup, sampled: Tensor) -> None:
        tokens, logprobs = share_sampled(sampled, self.mesh).tolist()
        moves = group.record(
            [int(token) for token in tokens],
            logprobs,
            eos_id=self.eos_id,
        )
        for source, target in moves:
            for decoder in self.decoders[index]:
                decoder.cache.move_slot(source, target)

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
    responses: list[Response], sample_indices: list[int], device: torch.device
) -> Rollout:
    width = max((len(r.tokens) for r in responses), default=1)
    logprobs = [r.logprobs + [0.0] * (width - len(r.tokens)) for r in responses]
    return Rollout(
        prompts=[r.prompt for r in responses],
        responses=[r.tokens for r in responses],
        finished=[r.finished for r in responses],
        sample_indices=sample_indices,
        logprobs=torch.tensor(logprobs, device=device).view(len(responses), width),
    )
