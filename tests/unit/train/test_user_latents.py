"""A latent per user, through microbatches: loss, gradient and scores of a loop over pairs."""

import pytest
import torch
from torch.nn import functional as F

from marlhf_mega.algorithm.counter_rng import fold, normal
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.data.contexts import InContext
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.models.forward import last_state_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.train.reward_pairs import pair_microbatch
from marlhf_mega.train.user_latents import UserLatents

MODEL = ModelConfig(hidden_size=32, ffn_hidden_size=64, vocab_size=40, init_std=0.2)
SETTINGS = RewardModelConfig(
    latent_size=6, latent_kl_coef=0.5, latent_kl_cycle=0, grad_clip=0, microbatch_size=2
)


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def with_latents(mesh):
    precision = PrecisionConfig(dtype="float32")
    chunks = build_chunks(MODEL, precision, mesh, head="scalar", latent_size=6)
    fill_random(chunks, mesh, seed=3)
    return chunks


def pairs():
    draw = torch.Generator().manual_seed(1)

    def text(length):
        return torch.randint(3, 40, (length,), generator=draw).tolist()

    return [
        PreferencePair(
            prompt_ids=text(3), chosen_ids=text(a), rejected_ids=text(b), margin=0.1, user=user
        )
        for a, b, user in ((2, 6, "x"), (5, 3, "y"), (7, 1, "x"), (4, 8, "y"), (3, 2, "x"))
    ]


def by_hand(chunk, mesh, known, noise):
    """Scores of one pair's responses, and its KL term: the formulas, one number after the other."""
    head = chunk.output_layer.latent

    def states(pair):
        batch = pair_microbatch([pair], mesh, packed=False).batch
        return last_state_forward(chunk, batch)

    seen = [head.pair(states(other).flatten().detach()) for other in known.context]
    rows = []
    for one in seen:
        scores = torch.stack([head.query(one) @ head.key(other) for other in seen]) / 6**0.5
        rows.append(sum(w * head.value(v) for w, v in zip(scores.softmax(0), seen, strict=True)))
    whole = torch.stack(rows).mean(0)
    mean, log_variance = head.mean(whole).clamp(-1, 1), head.log_variance(whole).clamp(-1, 1)
    latent = mean
    if noise is not None:
        drawn = mean + log_variance.exp().sqrt() * noise
        latent = drawn / drawn.norm() * 6**0.5
    chosen, rejected = (head.reward(torch.cat((s, latent))) for s in states(known))
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return chosen, rejected, kl


def test_microbatches_add_up_to_the_gradient_of_the_formula(mesh):
    known = InContext(pairs(), size=2, seed=4, key="")
    noise = normal(fold(7, 0, torch.arange(5)[:, None], torch.arange(6)))
    (chunk,) = with_latents(mesh)
    total, divergence = 0.0, 0.0
    for pair, row in zip(known, noise, strict=True):
        chosen, rejected, kl = by_hand(chunk, mesh, pair, row)
        total = total - F.logsigmoid(chosen - rejected - 0.1) + 0.5 * kl
        divergence += kl.item()
    (total / 5).backward()

    chunks = with_latents(mesh)
    state = TrainState(chunks, SETTINGS, total_steps=1)
    users = UserLatents(chunks, SETTINGS, mesh, seed=7)
    state.zero_grad()
    microbatches = [users.microbatch(known[:2]), users.microbatch(known[2:])]
    losses = pipeline_forward_backward(
        state.chunks, users.prepare(state, microbatches), last_state_forward, users.loss
    )
    assert sum(x.loss_sum for x in losses).item() == pytest.approx(total.item(), rel=1e-5)
    shown = sum(x.metrics["latent_kl"][0] for x in losses)
    assert shown.item() == pytest.approx(divergence, rel=1e-4)
    assert all(x.metrics["latent_kl"][1] == x.count for x in losses)
    reference = dict(chunk.named_parameters())
    for name, parameter in chunks[0].named_parameters():
        close = {"rtol": 1e-4, "atol": 1e-6}
        assert torch.allclose(parameter.main_grad, reference[name].grad, **close), name
    for part in ("pair.0", "query", "key", "value", "mean", "log_variance", "reward.4"):
        assert reference[f"output_layer.latent.{part}.weight"].grad.abs().max() > 1e-6, part


def test_held_out_pairs_are_scored_by_the_mean_of_the_latent(mesh):
    known = InContext(pairs(), size=2, seed=4, key="")
    chunks = with_latents(mesh)
    with torch.no_grad():
        found = [by_hand(chunks[0], mesh, pair, None)[:2] for pair in known]
    expected = torch.tensor(found).T
    state = TrainState(chunks, SETTINGS, total_steps=1)
    users = UserLatents(chunks, SETTINGS, mesh, seed=7)
    assert torch.allclose(users.score(state, known[:]), expected, rtol=1e-4, atol=1e-5)
    assert users.score(state, []).shape == (2, 0)
    assert expected[0, 0] != expected[0, 2]
