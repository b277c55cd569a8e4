"""Labels that move between epochs, in blocks, with a state to go on from."""

import json

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.train import moving_labels
from marlhf_mega.train.moving_labels import MovingLabels

PAIRS = [
    PreferencePair(prompt_ids=[1], chosen_ids=[i], rejected_ids=[9], margin=0.0)
    for i in range(2, 7)
]


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def score(state, own):
    """A model that says by how much a chosen response is better: its only token, less 4."""
    chosen = torch.tensor([p.chosen_ids[0] - 4.0 for p in own], dtype=torch.float64)
    return torch.stack((chosen, torch.zeros_like(chosen)))


def test_labels_move_once_in_an_epoch_and_are_kept(mesh, monkeypatch):
    monkeypatch.setattr(moving_labels, "_BLOCK", 2)
    labels = MovingLabels(PAIRS, score, mesh, rate=0.25)
    labels.enter(0, None)
    assert labels[:] == PAIRS
    assert len(labels) == 5
    for _ in range(2):  # the second call finds the labels of this epoch
        labels.enter(1, None)
    expected = [0.75 + 0.25 / (1 + 2.718281828459045 ** (2 - i)) for i in range(5)]
    assert [pair.chosen_probability for pair in labels] == pytest.approx(expected, abs=1e-12)
    assert labels[1].chosen_ids == [3]
    resumed = MovingLabels(PAIRS, score, mesh, rate=0.25)
    resumed.load_state_dict(json.loads(json.dumps(labels.state_dict())))
    for each in (labels, resumed):
        each.enter(2, None)
    assert resumed[:] == labels[:] != PAIRS
