"""What a checkpoint keeps of samples that wait, and what the training ranks generate themselves."""

import json
from types import SimpleNamespace

import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.rollout.transport import Answer, LocalTransport, Request
from marlhf_mega.rollout.types import Rollout


def rollout(samples, responses, logprobs):
    width = max(map(len, responses))
    padded = [row + [0.0] * (width - len(row)) for row in logprobs]
    return Rollout(
        prompts=[[sample] for sample in samples],
        responses=responses,
        finished=[len(response) < 3 for response in responses],
        sample_indices=samples,
        logprobs=torch.tensor(padded),
        # As many tokens as the longest has, prompt included; other parts may have fewer.
        routing=torch.full((len(samples), width + 1, 2, 1), samples[0] + 1, dtype=torch.int16),
    )


def test_an_answer_comes_back_from_json_in_the_order_of_the_samples_to_the_last_bit():
    odd = torch.rand(4, generator=torch.Generator().manual_seed(1)).log()
    first = rollout([0, 2], [[7], [8, 9]], [[odd[0].item()], odd[1:3].tolist()])
    second = rollout([1], [[5, 6, 4]], [[-0.5, odd[3].item(), -2.0]])
    state = json.loads(json.dumps(Answer(parts=[first, second], seconds=1.5).state_dict()))
    found = Answer.from_state(state, [[0], [1], [2]])
    assert found.seconds == 1.5
    (whole,) = found.parts
    assert whole.responses == [[7], [5, 6, 4], [8, 9]]
    assert whole.finished == [True, False, True]
    assert whole.sample_indices == [0, 1, 2]
    wanted = torch.tensor([[odd[0], 0, 0], [-0.5, odd[3], -2.0], [odd[1], odd[2], 0]])
    assert torch.equal(whole.logprobs, wanted)
    assert whole.routing.dtype == torch.int16
    assert whole.routing[..., 0, 0].tolist() == [[1, 1, 1, 0], [2, 2, 2, 2], [1, 1, 1, 0]]


def test_a_replica_generates_its_share_of_every_minibatch():
    asked = {}

    def generate(prompts, indices, options):
        asked.update(prompts=prompts, indices=indices, step=options.step)
        return rollout(indices, prompts, [[0.0]] * len(prompts))

    config = Config.model_validate({"rollout": {"batch_size": 8}, "ppo": {"minibatch_size": 4}})
    mesh = SimpleNamespace(dp_rank=1, dp_size=2, world_size=2)
    transport = LocalTransport(SimpleNamespace(generate=generate), config, mesh)
    transport.ask(Request(step=5, prompts=[[10 + i] for i in range(8)]))
    answer = transport.answer()
    assert asked == {"prompts": [[12], [13], [16], [17]], "indices": [2, 3, 6, 7], "step": 5}
    assert answer.parts[0].sample_indices == [2, 3, 6, 7]
    assert (transport.num_ranks, transport.metrics()) == (2, {})
