"""Train at one layout, generate at another: rollouts, weights and an update, on 4 ranks."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.reshard import connect, described
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.checkpoint.whole_tensors import WholeTensors
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.evaluation import Evaluator
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh, use_mesh
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import build_generator
from tests.distributed.layouts_ranks import EOS, by_sample, texts, trimmed
from tests.distributed.tiny_model import TINY

BATCH = 10
SMALL_BUCKETS = 1 << 12


def config_for(case):
    return Config.model_validate(
        {
            "model": TINY | {"qk_norm": True, "qkv_bias": True} | case["model"],
            "parallel": case["parallel"],
            "precision": {"dtype": "float32"},
            "rollout": {"batch_size": BATCH, "max_response_tokens": 10, **case["rollout"]},
        }
    )


def filled(config, mesh, seed):
    with use_mesh(mesh):
        chunks = build_chunks(config.model, config.precision, mesh, head="language")
        if seed is not None:
            fill_random(chunks, mesh, seed=seed)
    return chunks


def values(chunks):
    return [p.detach().clone() for chunk in chunks for p in chunk.parameters()]


def equal_bits(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def there_and_back(config, mesh, second):
    """Move weights to the rollout's layout and back: whether both ends are as if filled there."""
    trained, away = filled(config, mesh, 1), filled(config, second, None)
    wanted, before = values(filled(config, second, 1)), values(trained)
    there = connect((trained, mesh), (away, second), bucket_bytes=SMALL_BUCKETS)
    back = connect((away, second), (trained, mesh), bucket_bytes=SMALL_BUCKETS)
    there.release()
    with there.fresh_weights():
        arrived = equal_bits(values(away), wanted)
        back.release()
        back.move()
    arrived_whole = whole_tensors_equal(trained, mesh, filled(config, second, 1), second)
    released = all(p.untyped_storage().size() == 0 for chunk in away for p in chunk.parameters())
    return {
        "arrived": arrived,
        "came_back": equal_bits(values(trained), before),
        "arrived_whole": arrived_whole,
        "released": released,
        "rounds": len(there._rounds),
        "sent": there.total_bytes,
        "main_mesh_rules": mesh.groups.tp.size() == mesh.parallel.tensor_size,
    }


def whole_tensors_equal(trained, mesh, others, second):
    """Whether whole tensors that come from a layout hold what ranks of another one hold."""
    weights = WholeTensors(
        (trained, mesh), trained[0].model, mesh, receives=True, bucket_bytes=SMALL_BUCKETS
    )
    first, found = dict(weights), dict(weights)
    blocks, parameters = described(others, second)
    shapes = WeightTable(trained[0].model, "causal_lm").tensors
    return (
        len(weights._buckets) > 3
        and list(found) == list(shapes)
        and all(tuple(found[name].shape) == shape for name, shape in shapes.items())
        and all(map(torch.equal, first.values(), found.values()))
        and all(first[name].data_ptr() != found[name].data_ptr() for name in found)
        and all(
            torch.equal(
                found[b.tensor].narrow(b.dim, b.lo, b.hi - b.lo),
                parameters[b.parameter].narrow(b.dim, b.start, b.hi - b.lo),
            )
            for b in blocks
        )
    )


def rollouts(config, mesh):
    """Generate, change the weights as an optimizer step would, generate again."""
    policy = filled(config, mesh, 1)
    generator, resharder = build_generator(policy, config, mesh, stop=StopRule(frozenset({EOS})))
    own = local_indices(BATCH, BATCH, mesh)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6, 2, 9])
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0), ("after_update", 1.0)):
        if name == "after_update":
            fill_random(policy, mesh, seed=2)
        rollout = generator.generate(
            [prompts[i] for i in own],
            own,
            RolloutOptions(
                rule=SamplingRule(temperature=temperature),
                max_response_tokens=10,
                seed=11,
                step=3,
                slots=2,
            ),
        )
        assert rollout.sample_indices == own
        assert rollout.prompts == [prompts[i] for i in own]
        found[name] = {
            "responses": by_sample(own, rollout.responses, mesh),
            "finished": by_sample(own, rollout.finished, mesh),
            "logprobs": by_sample(own, trimmed(rollout.logprobs, rollout.responses), mesh),
        }
    judged = {number: judge(number, prompts, policy, generator, config, mesh) for number in (3, 1)}
    return found, judged, generator.mesh if resharder is not None else None


def stopped(config, mesh):
    """Generate to the limit, then to two end tokens, then to a text, with the same weights."""
    policy = filled(config, mesh, 1)
    prompts = texts(5, [3, 6, 4, 5])

    def sampled(stop):
        rollout = Generator(policy, mesh, stop=stop).generate(
            prompts,
            range(4),
            RolloutOptions(
                rule=SamplingRule(temperature=1.0),
                max_response_tokens=12,
                seed=11,
                step=3,
                slots=3,
            ),
        )
        return {"responses": rollout.responses, "finished": rollout.finished}

    whole = sampled(StopRule())
    ids = [EOS, whole["responses"][1][4]]
    text = bytes(whole["responses"][2][5:8])
    return {
        "ids": ids,
        "text": list(text),
        "whole": whole,
        "at_ids": sampled(StopRule(frozenset(ids))),
        "at_text": sampled(StopRule(texts=(text,), token_bytes=[bytes([i]) for i in range(50)])),
    }


class Letters:
    """A tokenizer that writes one letter for a token."""

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)

    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]

    def end_text(self, ids):
        return None


def judge(number, prompts, policy, generator, config, mesh):
    """Evaluate on fewer prompts than there are stages and replicas."""
    held_out = [Prompt(prompt_ids=ids, prompt="", row={}) for ids in prompts[:number]]
    evaluator = Evaluator(
        config, held_out, Letters(), None, generator, mesh, limit=MicrobatchLimit(sequences=4)
    )
    found = evaluator.judge(policy, None)
    return {"metrics": found.results.metrics, "answers": ["".join(s.tokens) for s in found.samples]}


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for case in cases:
        config = config_for(case)
        mesh = create_mesh(config.parallel)
        found, judged, second = rollouts(config, mesh)
        weights = None
        if second is not None:
            mine = there_and_back(config, mesh, second)
            parts = [mine] * mesh.world_size
            dist.all_gather_object(parts, mine)
            weights = {name: [part[name] for part in parts] for name in mine}
        result = {"rollouts": found, "judged": judged, "weights": weights}
        if case.get("stops"):
            result["stopped"] = stopped(config, mesh)
        results.append(result)
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
