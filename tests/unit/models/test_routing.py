"""Replay of routing: what a router is told, what it counts, and where a choice lies in a batch."""

import pytest
import torch
from torch import nn

from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.packing import Packing
from marlhf_mega.models.routing import Replay, drain, record_dtype, replays_of

CPU = torch.device("cpu")
SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.0, 0.2], [0.0, 0.3, 0.3, 0.4]])


def choose(scores, topk, num_groups=None, group_topk=None):
    return scores.topk(topk, dim=1)


class Layer(nn.Module):
    """Routes as Megatron's layers do; experts are told from the scores alone."""

    def __init__(self, index):
        super().__init__()
        self.mlp, self.mlp.router = nn.Module(), nn.Module()
        Replay(self, index)

    def forward(self, scores, packed_seq_params=None):
        return self.mlp.router.router_replay.get_replay_topk(scores, 2, None, None, choose)


def chunk(layers=2):
    whole = nn.Module()
    whole.decoder = nn.Module()
    whole.decoder.layers = nn.ModuleList(Layer(index) for index in range(layers))
    return whole


def packed(routing):
    packing = Packing((3,), torch.tensor([0, 3]), routing=routing)
    return {"packed_seq_params": packing}


def test_recorded_choices_replace_the_routers_own():
    (layer,) = chunk(1).decoder.layers
    # Numbers plus one; of the second token none was recorded, of the third it is the router's own.
    routing = torch.tensor([[[2, 1], [0, 0], [4, 3]]], dtype=torch.uint8)
    scores = SCORES.clone().requires_grad_()
    values, experts = layer(scores, **packed(routing))
    assert experts.tolist() == [[1, 0], [0, 3], [3, 2]]
    assert torch.equal(values, SCORES.gather(1, experts))
    values.sum().backward()  # the trainer's own weights of these experts learn
    assert scores.grad.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]
    own = layer(SCORES, **packed(None))[1]
    assert torch.equal(own, choose(SCORES, 2)[1])
    # A later call that does not go through the layer, as in generation, is free as well.
    assert layer.mlp.router.router_replay._wanted is None


def test_tokens_are_counted_once_for_each_layer_that_would_choose_otherwise():
    model = chunk()
    routing = torch.tensor([[[2, 1], [1, 4], [0, 0]], [[3, 2], [0, 0], [1, 2]]], dtype=torch.uint8)
    assert drain([model]) is None
    for layer in model.decoder.layers:
        layer(SCORES, **packed(routing))
    # The first layer: one of two; the second: the order of experts is no difference.
    differing, replayed = drain([model])
    assert (int(differing), int(replayed)) == (2, 4)
    assert drain([model]) is None


def test_choices_are_kept_only_while_they_are_recorded():
    model = chunk(1)
    (replay,) = replays_of(model)
    model.decoder.layers[0](SCORES)
    assert replay.chosen is None
    replay.records = True
    model.decoder.layers[0](SCORES)
    assert replay.chosen.tolist() == choose(SCORES, 2)[1].tolist()


@pytest.mark.parametrize(("experts", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_numbers_plus_one_fit_the_format(experts, dtype):
    assert record_dtype(experts) == dtype
    assert experts <= torch.iinfo(dtype).max


def rows(lengths, width):
    """[sequences, width, 1 layer, 2 experts]: what each token was told, from its place."""
    found = torch.zeros(len(lengths), width, 1, 2, dtype=torch.uint8)
    for number, length in enumerate(lengths):
        for place in range(length - 1):  # the last one was not passed
            found[number, place, 0] = torch.tensor([10 * number + place + 1, 99])
    return found


def test_choices_lie_where_the_tokens_do():
    prompts, responses, routing = [[1, 1], [1]], [[2], [2, 2, 2]], rows([3, 4], 6)
    options = {"multiple": 4, "device": CPU, "routing": routing}
    padded = SequenceBatch.create(prompts, responses, **options).routing
    assert padded[..., 0, 0].tolist() == [[1, 2, 0, 0], [11, 12, 13, 0]]
    one = SequenceBatch.create(prompts, responses, packed=True, context_multiple=4, **options)
    assert one.routing[..., 0, 0].tolist() == [[1, 2, 0, 0, 11, 12, 13, 0]]
    assert one.routing.shape[:2] == one.tokens.shape
    assert SequenceBatch.create(prompts, responses, multiple=4, device=CPU).routing is None
