"""A reward model with a latent per user: what a user has preferred tells how to score (VPL).

The states of the context are computed once per step, without gradients, as in the released code;
the networks of the head read them and learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from marlhf_mega.algorithm.counter_rng import fold, normal
from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.algorithm.reward_models import annealed, latent_kl
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import last_states, make_batches
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.latent_head import LatentHead
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import broadcast_from_last_stage
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.reward_pairs import PairTargets, last_loss, pair_microbatch
from marlhf_mega.train.supervised import Microbatch

LATENT_METRICS = ("latent_kl",)


@dataclass(frozen=True)
class OfUsers:
    """What the loss of a microbatch needs beside the states; first which pairs, then their states.

    Until `UserLatents.prepare` there are no states.
    """

    examples: Sequence[PreferencePair]
    pairs: PairTargets
    kl_coef: float = 0.0
    noise: Tensor | None = None
    """[pairs, latent]."""
    context: Tensor | None = None
    """[pairs, context, 2, hidden]."""
    mask: Tensor | None = None
    """Bool [pairs, context]."""


class UserLatents:
    """Training and scoring of one reward model, on one rank."""

    def __init__(
        self, chunks: Sequence[StageModel], settings: RewardModelConfig, mesh: Mesh, *, seed: int
    ) -> None:
        """Take the model, whose last chunk has a `LatentHead`.

        Args:
            chunks: this rank's chunks.
            settings: of the reward model.
            mesh: this rank's mesh.
            seed: of the run, for the noise.
        """
        self._chunks, self._settings, self._mesh, self._seed = chunks, settings, mesh, seed
        self._limit = MicrobatchLimit(
            sequences=2 * settings.microbatch_size, packed=bool(settings.packing)
        )

    def microbatch(self, pairs: Sequence[PreferencePair]) -> Microbatch:
        """Lay out pairs that know their context."""
        laid_out = pair_microbatch(pairs, self._mesh, packed=bool(self._settings.packing))
        return replace(laid_out, extra=OfUsers(pairs, laid_out.extra))

    def prepare(self, state: TrainState, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """Add the states of the contexts and the noise of this step. All ranks call it."""
        settings, step = self._settings, state.schedule.num_steps
        every = [pair for m in microbatches for pair in m.extra.examples]
        states = self._states(state.chunks, [other for pair in every for other in pair.context])
        if states is None:
            return list(microbatches)
        columns = torch.arange(settings.latent_size)
        found = []
        for microbatch in microbatches:
            extra: OfUsers = microbatch.extra
            context, mask = states.contexts(extra.examples)
            numbers = torch.tensor([pair.number for pair in extra.examples])
            keys = fold(self._seed, step, numbers[:, None], columns)
            extra = replace(
                extra,
                kl_coef=settings.latent_kl_coef * annealed(step, cycle=settings.latent_kl_cycle),
                noise=normal(keys).to(self._mesh.device),
                context=context,
                mask=mask,
            )
            found.append(replace(microbatch, extra=extra))
        return found

    def loss(self, output: Tensor, microbatch: Microbatch) -> LossOutput:
        """Compare pairs by what their users prefer; the KL term keeps the latents near N(0, 1).

        Args:
            output: [2 * pairs, hidden] states at last tokens.
            microbatch: as `prepare` returned it.
        """
        extra: OfUsers = microbatch.extra
        head = self._head().latent
        # Ranks that share a sequence all have the whole gradient of the head, and their sum counts.
        share = 1 / self._mesh.cp_size
        weights = {
            name: weight.float() * share + weight.detach().float() * (1 - share)
            for name, weight in head.named_parameters()
        }
        inputs = (torch.stack(output.chunk(2)), extra.context, extra.mask, extra.noise)
        scores, mean, log_variance = functional_call(head, weights, inputs)
        found = last_loss(scores.flatten(), extra.pairs, self._settings)
        kl = latent_kl(mean, log_variance).sum()
        return LossOutput(
            loss_sum=found.loss_sum + extra.kl_coef * kl,
            count=found.count,
            metrics=found.metrics | {"latent_kl": (kl.detach(), found.count)},
        )

    @torch.no_grad()
    def score(self, state: TrainState, pairs: Sequence[PreferencePair]) -> Tensor:
        """Return scores of pairs that know their context, [chosen and rejected, pairs]."""
        own = [replace(pair, number=-1 - i) for i, pair in enumerate(pairs)]
        others = {other.number: other for pair in pairs for other in pair.context}
        states = self._states(state.chunks, [*own, *others.values()])
        scores = None
        if states is not None:
            scores = torch.zeros(2, len(own), device=self._mesh.device)
            size = self._settings.microbatch_size
            for start in range(0, len(own), size):
                part = own[start : start + size]
                inputs = (states.of(part).transpose(0, 1), *states.contexts(part), None)
                scores[:, start : start + size] = self._head().latent(*inputs)[0]
        return broadcast_from_last_stage(scores, (2, len(own)), self._mesh)

    def _head(self) -> LatentHead:
        head = self._chunks[-1].output_layer
        assert isinstance(head, LatentHead)
        return head

    def _states(
        self, chunks: Sequence[torch.nn.Module], pairs: Sequence[PreferencePair]
    ) -> "_States | None":
        unique = list({pair.number: pair for pair in pairs}.values())
        prompts = [pair.prompt_ids for pair in unique] * 2
        responses = [p.chosen_ids for p in unique] + [p.rejected_ids for p in unique]
        batches = make_batches(prompts, responses, limit=self._limit, mesh=self._mesh)
        states = last_states(chunks, batches)
        if states is None:
            return None
        rows = {pair.number: row for row, pair in enumerate(unique)}
        return _States(states.unflatten(0, (2, len(unique))).transpose(0, 1), rows)


@dataclass(frozen=True)
class _States:
    """The states at the last tokens of some pairs."""

    both: Tensor
    """[pairs, 2, hidden] of chosen and rejected responses."""
    rows: dict[int, int]
    """Number of a pair -> its row."""

    def of(self, pairs: Sequence[PreferencePair]) -> Tensor:
        """Return [pairs, 2, hidden]."""
        return self.both[torch.tensor([self.rows[pair.number] for pair in pairs])]

    def contexts(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Return [pairs, context, 2, hidden], and bool [pairs, context], True on real ones."""
        lengths = torch.tensor([len(pair.context) for pair in pairs])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.both.device)
        real = self.of([other for pair in pairs for other in pair.context])
        context = real.new_zeros(*mask.shape, *real.shape[1:])
        return context.index_put(mask.nonzero(as_tuple=True), real), mask
