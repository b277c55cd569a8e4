"""vLLM beside our decoder, with the same weights before and after updates, on 4 ranks: OUT CASES."""

import json
import random
import sys
from functools import partial
from math import prod
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import logprob_forward, make_batches, run_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import build_generator
from tests.distributed.layouts_ranks import EOS, by_sample, texts

BATCH, LIMIT = 8, 12


def config_for(case):
    return Config.model_validate(
        {
            "model": case["model"],
            "parallel": case["parallel"],
            "precision": {"dtype": "float32"},
            "data": {"max_prompt_tokens": 12},
            "rollout": {
                "batch_size": BATCH,
                "max_response_tokens": LIMIT,
                "engine": "vllm",
                "vllm": {"enforce_eager": True},
                **case["rollout"],
            },
        }
    )


def random_states():
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


class Run:
    """One policy, our decoder and the engine."""

    def __init__(self, config, mesh, stop):
        self.mesh = mesh
        self.policy = build_chunks(config.model, config.precision, mesh, head="language")
        fill_random(self.policy, mesh, seed=1)
        before, set_threads = random_states(), torch.set_num_threads
        self.generator, self.moves = build_generator(self.policy, config, mesh, stop=stop)
        self.own = Generator(self.policy, mesh, stop=stop)
        self.indices = local_indices(BATCH, BATCH, mesh)
        everyone = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
        self.prompts = [everyone[i] for i in self.indices]
        self.untouched = before == random_states() and torch.set_num_threads is set_threads

    def rollout(self, generator, **options):
        limits = options.pop("limits", LIMIT)
        rule = SamplingRule(**options)
        options = RolloutOptions(rule=rule, max_response_tokens=limits, seed=11, step=3)
        return generator.generate(self.prompts, self.indices, options)

    def gap(self, rollout, temperature=1.0):
        """Largest difference of the sampler's log-probs from those of a training pass."""
        limit = MicrobatchLimit(sequences=4)
        batches = make_batches(rollout.prompts, rollout.responses, limit=limit, mesh=self.mesh)
        forward = partial(logprob_forward, temperature=temperature)
        found = run_forward(self.policy, batches, forward, leading=(2,))[0]
        mask = rollout.response_mask(found.device)
        gap = ((found - rollout.logprobs) * mask).abs().max()
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
        return gap.item()

    def gathered(self, values):
        return by_sample(self.indices, values, self.mesh)


def compare(run):
    """Greedy answers of both, and how far log-probs are from training's."""
    greedy = run.rollout(run.generator, temperature=0.0)
    wanted = run.rollout(run.own, temperature=0.0)
    sampled = run.rollout(run.generator, temperature=0.7)
    return {
        "greedy": run.gathered(greedy.responses),
        "greedy_own": run.gathered(wanted.responses),
        "finished": run.gathered(greedy.finished),
        "finished_own": run.gathered(wanted.finished),
        "sampled": run.gathered(sampled.responses),
        "gap": max(run.gap(greedy), run.gap(sampled, 0.7)),
    }


def ended(run):
    """Answers without an end, then with a text that one has, then with limits, all the same draws.

    Filters keep the most likely token alone.
    """
    inner = run.generator._generator
    inner.stop = StopRule()
    whole = run.gathered(run.rollout(run.generator, temperature=0.7).responses)
    text = bytes(whole[2][3:6])
    inner.stop = StopRule(texts=(text,), token_bytes=[bytes([i]) for i in range(50)])
    at_text = run.rollout(run.generator, temperature=0.7)
    inner.stop = StopRule()
    limits = {sample: 3 + sample for sample in range(BATCH)}
    limited = run.rollout(run.generator, temperature=0.7, limits=limits)
    likeliest = run.rollout(run.generator, temperature=0.7, top_k=1)
    return {
        "whole": whole,
        "text": list(text),
        "at_text": run.gathered(at_text.responses),
        "finished": run.gathered(at_text.finished),
        "text_gap": run.gap(at_text, 0.7),
        "limited": run.gathered(limited.responses),
        "likeliest": run.gathered(likeliest.responses),
        "greedy": run.gathered(run.rollout(run.generator, temperature=0.0).responses),
    }


def whole(case, config, mesh):
    run = Run(config, mesh, StopRule(frozenset({EOS})))
    states = [compare(run)]
    for seed in (2, 3):
        fill_random(run.policy, mesh, seed=seed)
        states.append(compare(run))
    again = run.gathered(run.rollout(run.generator, temperature=0.7).responses)
    found = {
        "states": states,
        "again": again,
        "ended": ended(run),
        "untouched": run.untouched,
        "bytes": run.moves.total_bytes,
        "seconds": run.moves.seconds,
        "whole_bytes": 4 * sum(map(prod, WeightTable(config.model, "causal_lm").tensors.values())),
    }
    end_engine(run.generator)
    return found


def end_engine(generator):
    """Free an engine, as no run needs to: a process has one."""
    generator._generator.engine.end()


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for case in cases:
        config = config_for(case)
        mesh = create_mesh(config.parallel)
        results.append(whole(case, config, mesh))
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
