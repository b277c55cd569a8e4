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

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.checkpoint.hf.parameters import adapter_parameters, find_shards
from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.weights import (
    adapter_table_of,
    elements_of,
    fill_adapters,
    fill_random,
    layout_of,
)
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

BATCH, LIMIT, DRAWS = 8, 12, 512


def config_for(case):
    return Config.model_validate(
        {
            "model": case["model"],
            "parallel": case["parallel"],
            "precision": {"dtype": case.get("dtype", "float32")},
            "data": {"max_prompt_tokens": 12},
            "rollout": {
                "batch_size": BATCH,
                "max_response_tokens": LIMIT,
                "engine": "vllm",
                "vllm": {"enforce_eager": True, "verify_interval": 1},
                **case["rollout"],
            },
        }
    )


@torch.no_grad()
def fill(policy, mesh, seed):
    """Draw weights, and adapters that change them: their second factor starts at zero."""
    fill_random(policy, mesh, seed=seed)
    fill_adapters(policy, mesh, seed=seed)
    table, layout = adapter_table_of(policy), layout_of(mesh, policy[0].model)
    for local, shard in find_shards(adapter_parameters(policy), table, layout):
        if local.name.endswith(".b"):
            for values, key, index in elements_of(local.tensor, shard, table):
                values.copy_(0.1 * (uniform(fold(seed, key, index)) - 0.5))


def random_states():
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


class Run:
    """One policy, our decoder and the engine."""

    def __init__(self, config, mesh, stop):
        self.mesh = mesh
        self.policy = build_chunks(config.model, config.precision, mesh, head="language")
        fill(self.policy, mesh, 1)
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
        limit, filtered = MicrobatchLimit(sequences=4), rollout.kept is not None
        batches = make_batches(
            rollout.prompts, rollout.responses, limit=limit, mesh=self.mesh, kept=rollout.kept
        )
        forward = partial(logprob_forward, temperature=temperature, filtered=filtered)
        found = run_forward(self.policy, batches, forward, leading=(3 if filtered else 2,))[0]
        mask = rollout.response_mask(found.device)
        gap = ((found - rollout.logprobs) * mask).abs().max()
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
        return gap.item()

    def gathered(self, values):
        return by_sample(self.indices, values, self.mesh)


def kept_counts(rollout):
    """Return how many tokens were kept for each token of each response."""
    counts = (rollout.kept >= 0).sum(-1)
    return [row[: len(r)].tolist() for row, r in zip(counts, rollout.responses, strict=True)]


def compare(run):
    """Greedy answers of both, and how far log-probs are from training's."""
    greedy = run.rollout(run.generator, temperature=0.0)
    wanted = run.rollout(run.own, temperature=0.0)
    sampled = run.rollout(run.generator, temperature=0.7)
    some = run.rollout(run.generator, temperature=0.7, top_k=6, record_kept=True)
    fewer = run.rollout(run.generator, temperature=0.7, top_k=6, top_p=0.6, record_kept=True)
    return {
        "kept": [run.gathered(kept_counts(rollout)) for rollout in (some, fewer)],
        "kept_gap": max(run.gap(some, 0.7), run.gap(fewer, 0.7)),
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


def drawn(run, vocab_size):
    """Return how often each token follows a prompt, and its probability by a training pass."""
    prompt, indices = [7, 9, 11], local_indices(DRAWS, DRAWS, run.mesh)
    rule = SamplingRule(temperature=0.7)
    options = RolloutOptions(rule=rule, max_response_tokens=1, seed=11, step=3)
    found = run.generator.generate([prompt] * len(indices), indices, options)
    tokens = by_sample(indices, [response[0] for response in found.responses], run.mesh)
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab_size)
    responses = [[token] for token in range(vocab_size)]
    limit = MicrobatchLimit(sequences=vocab_size)
    batches = make_batches([prompt] * vocab_size, responses, limit=limit, mesh=run.mesh)
    forward = partial(logprob_forward, temperature=0.7)
    logprobs = run_forward(run.policy, batches, forward, leading=(2,))[0][:, 0]
    return {"counts": counts.tolist(), "probabilities": logprobs.exp().tolist()}


def whole(case, config, mesh):
    run = Run(config, mesh, StopRule(frozenset({EOS})))
    states = [compare(run)]
    for seed in (2, 3):
        fill(run.policy, mesh, seed)
        states.append(compare(run))
    again = run.gathered(run.rollout(run.generator, temperature=0.7).responses)
    found = {
        "states": states,
        "again": again,
        "ended": ended(run),
        "drawn": drawn(run, config.model.vocab_size) if case["draws"] else None,
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
