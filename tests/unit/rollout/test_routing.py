"""The record of routing follows sequences from slot to slot."""

from types import SimpleNamespace

import torch

from marlhf_mega.rollout.routing import RoutingRecord, whole_routing
from marlhf_mega.rollout.work import Decode, Prefill

LAYERS, TOP = 2, 2


def record(slots=3):
    routers = [SimpleNamespace(chosen=None) for _ in range(LAYERS)]
    layers = [
        SimpleNamespace(
            layer_number=number + 3, mlp=SimpleNamespace(router=SimpleNamespace(router_replay=r))
        )
        for number, r in enumerate(routers)
    ]
    chunk = SimpleNamespace(
        model=SimpleNamespace(num_experts=8, experts_per_token=TOP, num_layers=5),
        rotary_speeds=torch.zeros(1),
        decoder=SimpleNamespace(layers=layers),
    )
    return RoutingRecord(chunk, num_slots=slots, max_tokens=4), routers, chunk


def told(routers, experts):
    """Let the routers choose: [tokens] of the first expert; the second is one less."""
    for number, router in enumerate(routers):
        first = torch.tensor(experts) + number
        router.chosen = torch.stack((first, first - 1), dim=1)


def test_prompts_and_tokens_by_hand():
    kept, routers, _ = record()
    # Two prompts, the first for slots 0 and 2; hidden states lie position after position.
    told(routers, [1, 4, 2, 5])
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    kept.store(
        Prefill(
            tokens=tokens,
            rows=torch.tensor([0, 1, 0]),
            lengths=torch.tensor([2, 2, 2]),
            first_slot=0,
        )
    )
    told(routers, [3, 6])
    positions = torch.tensor([2, 2])
    kept.store(Decode(tokens=torch.zeros(2, 1, dtype=torch.int64), positions=positions, longest=3))
    assert kept.read(0, 3).tolist() == [[[2, 1], [3, 2]], [[3, 2], [4, 3]], [[4, 3], [5, 4]]]
    assert kept.read(1, 3)[:, 0].tolist() == [[5, 4], [6, 5], [7, 6]]
    assert kept.read(2, 3)[:, 0].tolist() == [[2, 1], [3, 2], [0, 0]]
    kept.move_slot(1, 0)
    assert torch.equal(kept.read(0, 4), kept.read(1, 4))


def test_layers_have_their_place_in_the_whole_model():
    _, _, chunk = record()
    mesh = SimpleNamespace(groups=SimpleNamespace(pp=SimpleNamespace(size=lambda: 1)))
    rows = [torch.ones(2, LAYERS, TOP, dtype=torch.uint8), torch.ones(3, LAYERS, TOP).byte()]
    whole = whole_routing(rows, [chunk], mesh)
    assert whole.shape == (2, 3, 5, TOP)
    assert whole.sum((1, 3)).tolist() == [[0, 0, 4, 4, 0], [0, 0, 6, 6, 0]]
