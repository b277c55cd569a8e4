"""The length penalty of a whole batch, through microbatches: the gradient of the formula itself."""

import pytest
import torch

from marlhf_mega.algorithm.losses import preference_loss
from marlhf_mega.algorithm.reward_models import correlation, head_overlap, odin_penalty
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.models.forward import both_scores_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.train.length_head import add_length_terms, two_head_loss
from marlhf_mega.train.reward_pairs import pair_microbatch

MODEL = ModelConfig(hidden_size=32, ffn_hidden_size=64, vocab_size=40, init_std=0.2)
SETTINGS = RewardModelConfig(length_coef=0.5, overlap_coef=0.25, grad_clip=0)


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def two_heads(mesh):
    precision = PrecisionConfig(dtype="float32")
    chunks = build_chunks(MODEL, precision, mesh, head="scalar", length_head=True)
    fill_random(chunks, mesh, seed=3)
    return chunks


def pairs():
    draw = torch.Generator().manual_seed(1)

    def text(length):
        return torch.randint(3, 40, (length,), generator=draw).tolist()

    return [
        PreferencePair(prompt_ids=text(3), chosen_ids=text(a), rejected_ids=text(b), margin=0.0)
        for a, b in ((2, 6), (5, 3), (7, 1), (4, 8), (3, 2))
    ]


def test_microbatches_add_up_to_the_gradient_of_the_formula(mesh):
    whole = pair_microbatch(pairs(), mesh, packed=False)
    (chunk,) = two_heads(mesh)
    batch, head = whole.batch, chunk.output_layer
    quality, length = batch.at_last(both_scores_forward(chunk, batch))
    lengths = (batch.prompt_lengths + batch.response_lengths).float()
    found = preference_loss(*(quality + length).chunk(2))
    penalty = odin_penalty(lengths, quality, length)
    overlap = head_overlap(head.weight, head.length_weight)
    expected = found.loss_sum / 5 + 0.5 * penalty + 0.25 * overlap
    expected.backward()

    chunks = two_heads(mesh)
    state = TrainState(chunks, SETTINGS, total_steps=1)
    state.zero_grad()
    microbatches = [
        pair_microbatch(part, mesh, packed=False) for part in (pairs()[:2], pairs()[2:])
    ]
    losses = pipeline_forward_backward(
        state.chunks,
        add_length_terms(state, microbatches, mesh=mesh),
        both_scores_forward,
        lambda output, m: two_head_loss(
            output, m, SETTINGS, chunks[0].output_layer, adds_overlap=True
        ),
    )
    assert sum(x.loss_sum for x in losses).item() / 5 == pytest.approx(expected.item(), rel=1e-6)
    for name, value in {
        "length_correlation": correlation(lengths, quality),
        "length_head_correlation": correlation(lengths, length),
        "head_overlap": overlap,
    }.items():
        shown, count = losses[0].metrics[name]
        assert (shown / count).item() == pytest.approx(value.item(), rel=1e-5)
    reference = dict(chunk.named_parameters())
    for name, parameter in chunks[0].named_parameters():
        close = {"rtol": 1e-4, "atol": 1e-6}
        assert torch.allclose(parameter.main_grad, reference[name].grad, **close), name
    assert reference["output_layer.length_weight"].grad.abs().max() > 1e-3
