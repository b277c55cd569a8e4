"""Steps of ppo, reward and offline, and rollouts, at layouts of one world size: OUT CASES."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
import torch.distributed as dist

from marlhf_mega.algorithm.choices import OfflineAlgorithm, PreferenceLoss
from marlhf_mega.algorithm.macro_actions import NO_ACTION
from marlhf_mega.checkpoint.weights import fill_adapters, fill_random
from marlhf_mega.config import limits
from marlhf_mega.config.schema import Config
from marlhf_mega.data.contexts import InContext
from marlhf_mega.data.datasets import OfflineExample, PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.ppo import finish, step_sums
from marlhf_mega.metrics.reduce import reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.forward import (
    both_scores_forward,
    last_state_forward,
    logprob_forward,
    make_batches,
    run_forward,
    score_forward,
    value_forward,
)
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.prompt_value import PromptValue
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.routing import Replay, drain
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import (
    gather_objects,
    max_over_world,
    sum_over_world,
)
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward, pipeline_forward_backward
from marlhf_mega.rollout.assignment import balance, local_indices
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train import offline, offline_values, preference_pairs
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.generation import generator_in_place
from marlhf_mega.train.length_head import add_length_terms, two_head_loss
from marlhf_mega.train.offline_known import Known
from marlhf_mega.train.reference_sums import pair_batches
from marlhf_mega.train.reward_pairs import pair_loss, pair_microbatch
from marlhf_mega.train.supervised import Microbatch
from marlhf_mega.train.user_latents import UserLatents
from marlhf_mega.update import ppo as update
from tests.distributed.tiny_model import TINY

BATCH, EOS = 8, 7
# Adam divides by the gradient's own size; with a large epsilon rounding noise stays small.
OPTIMIZER = {"lr": 2e-3, "eps": 1e-3}


# Keys of ppo and of macro that each estimator and objective is tried with; the rest has gae.
METHODS = {
    "sae": (
        {
            "estimator": "sae",
            "gae_lambda_critic": 1.0,
            "clip_range_high": 0.3,
            "aggregation": "macro_mean",
        },
        {"rule": "probability", "probability": 0.01, "probability_interval": 2},
    ),
    "rloo": (
        {"estimator": "rloo", "objective": "cispo", "aggregation": "seq_mean_token_mean"},
        {"rule": "entropy", "ratio": "macro_geo"},
    ),
    "grpo": (
        {"estimator": "grpo", "sampler_mask": "sequence", "aggregation": "seq_sum_const"},
        {"ratio": "macro"},
    ),
    "dr_grpo": (
        {"estimator": "dr_grpo", "objective": "p3o", "aggregation": "seq_mean_token_sum"},
        {"rule": "whole_response"},
    ),
    "reinforce_pp": ({"estimator": "reinforce_pp", "objective": "pg"}, {"rule": "token"}),
    "reinforce_pp_baseline": (
        {"estimator": "reinforce_pp_baseline", "likely_mask": 0.02},
        {"rule": "token"},
    ),
    "remax": ({"estimator": "remax"}, {"n": 2}),
    "vine": ({"estimator": "vine", "vine_samples": 2}, {"n": 4}),
    "brain": (
        {
            "estimator": "brain",
            "objective": "pg",
            "aggregation": "seq_mean_token_sum",
            "kl_coef": 1.0,
        },
        {"n": 5},
    ),
}


# Keys of reward that some of them are tried with.
TWO = {"source": [{"source": "model"}, {"source": "other", "weight": 0.5}]}
REWARDS = {
    "sae": TWO | {"combine": "maxmin"},
    "rloo": TWO | {"combine": "robust"},
    "reinforce_pp_baseline": {
        "dense": [
            {"source": "dpo", "kind": "rto", "weight": 0.05, "clip": 0.05},
            {"source": "other", "kind": "sentence", "weight": 0.3},
            {"source": "third", "kind": "clause"},
        ],
    },
    "reinforce_pp": {"constraints": {"source": "other", "threshold": 0.02}},
    "grpo": {"shaping": "center_reference", "kl_max": 5.0},
    "remax": {
        "shaping": ["par", "length_penalty", "overlong", "z_score"],
        "length_coef": 0.01,
        "overlong_buffer": 6,
    },
}


# Of a tokenizer only which tokens end sentences and clauses.
ENDS = SimpleNamespace(
    ends_sentence=torch.arange(64) % 5 == 0, ends_clause=lambda: torch.arange(64) % 3 == 0
)


def config_for(case):
    return Config.model_validate(
        {
            "model": TINY | case["model"],
            "parallel": case["parallel"],
            "precision": {"dtype": "float32", "fp8": case.get("fp8", "off"), "fp8_frozen": True},
            "policy": OPTIMIZER,
            "critic": OPTIMIZER,
            "reward_model": OPTIMIZER,
            "rollout": {"batch_size": BATCH, "max_response_tokens": 10, **case.get("rollout", {})},
            "macro": case.get("macro", {"n": 3, "ratio": "macro"}),
            "ppo": {
                "epochs": 2,
                "minibatch_size": BATCH,
                **case["microbatch"],
                "entropy_coef": 0.01,
                "kl_loss_coef": 0.1,
            },
            "reward": {"source": "model", **case.get("reward", {})},
            # The second of two steps has three prompts, fewer than four replicas.
            "offline": {"batch_size": 5, "value_epochs": 2},
        }
    )


def texts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 50, (n,), generator=generator).tolist() for n in lengths]


def by_sample(own, values, mesh):
    """Collect per-sample lists of all replicas in the order of the global indices."""
    parts = gather_objects(list(zip(own, values, strict=True)), mesh.groups.dp)
    return [value for _, value in sorted(pair for part in parts for pair in part)]


def replica_tokens(rollout, mesh):
    """Tokens that every data-parallel rank holds."""
    tokens = sum(map(len, rollout.prompts)) + sum(map(len, rollout.responses))
    return gather_objects(tokens, mesh.groups.dp)


def trimmed(grid, responses):
    return [row[: len(r)] for row, r in zip(grid.tolist(), responses, strict=True)]


def model(config, mesh, head, seed, **changes):
    shape = config.model.model_copy(update=changes)
    chunks = build_chunks(shape, config.precision, mesh, head=head)
    fill_random(chunks, mesh, seed=seed)
    fill_adapters(chunks, mesh, seed=seed)
    return chunks


def ppo_case(case, config, mesh, folder):
    policy, critic = model(config, mesh, "language", 1), model(config, mesh, "scalar", 2)
    roles = Roles(
        policy=TrainState(policy, config.policy, total_steps=4),
        critic=TrainState(critic, config.critic, total_steps=4),
        reference=model(config, mesh, "language", 3),
        # It does not know the last two ids of the policy, which prompts and responses have.
        rewards=[model(config, mesh, "scalar", 4, vocab_size=48)],
    )
    own = local_indices(BATCH, BATCH, mesh)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
    masked = config.rollout.mask_interval is not None
    generator = generator_in_place(
        policy,
        config,
        mesh,
        stop=StopRule(frozenset({EOS})),
        second=model(config, mesh, "language", 5) if masked else (),
    )
    options = {"max_response_tokens": 10, "seed": 11, "step": 3, "slots": 3}
    options["record_routing"] = config.replays_routing
    drawn = SamplingRule(
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        record_kept=True,
        min_kept=config.rollout.mask_min_tokens if masked else None,
    )
    greedy, rollout = (
        generator.generate([prompts[i] for i in own], own, RolloutOptions(rule=rule, **options))
        for rule in (SamplingRule(temperature=0.0), drawn)
    )
    # Replicas with two, one or no prompts: those that share experts go through them together.
    few = list(range(mesh.dp_rank, 3 if config.model.num_experts else 0, mesh.dp_size))
    options = RolloutOptions(rule=SamplingRule(temperature=0.0), **options)
    uneven = generator.generate([prompts[i] for i in few], few, options)
    if config.ppo.microbatch_tokens is not None:
        rollout = balance(rollout, minibatch_size=BATCH, mesh=mesh)
    balanced = rollout.sample_indices
    scorer = Scorer(config.reward, roles.rewards, None, mesh)
    segmenter = Segmenter(config.macro, None, mesh, seed=0)
    sums = step_sums()
    maker = ExperienceBuilder(config, roles, scorer, segmenter, mesh)
    experience, details = maker.build(rollout, [{}] * len(own), step=3, kl_coef=0.05, sums=sums)
    ratio = first_ratio(roles, experience, config, mesh)
    routing = {} if rollout.routing is None else routing_case(roles, rollout, config, mesh)
    update.ppo_update(roles, experience, config, mesh, step=3, sums=sums, timers=PhaseTimers())
    limit = MicrobatchLimit.of_scoring(config.ppo)
    batches = make_batches(rollout.prompts, rollout.responses, limit=limit, mesh=mesh)
    after = run_forward(roles.policy.chunks, batches, logprob_forward, leading=(2,))
    values = run_forward(roles.critic.chunks, batches, value_forward)
    export_hf(policy, config, mesh, target=folder / "policy")
    export_hf(critic, config, mesh, target=folder / "critic")
    per_sample = {
        "old_logprobs": experience.old_logprobs,
        "ref_logprobs": experience.ref_logprobs,
        "old_values": experience.old_values,
        "advantages": experience.advantages,
        "returns": experience.returns,
        "logprobs_after": after[0],
        "entropy_after": after[1],
        "values_after": values,
    }
    metrics = finish(reduce_metrics(sums, sum_over_world, max_over_world))
    gap = metrics.pop("rollout/logprob_gap_max")
    metrics.pop("rollout/logprob_gap")
    assert gap < 1e-4, gap
    return {
        "methods": {name: method_case(case, name, mesh, roles, rollout, greedy) for name in METHODS}
        if case["methods"]
        else {},
        "greedy": by_sample(own, greedy.responses, mesh),
        "uneven": by_sample(few, uneven.responses, mesh),
        "sampled": by_sample(balanced, rollout.responses, mesh),
        "scores": by_sample(balanced, details.scores.tolist(), mesh),
        "tokens_per_replica": replica_tokens(rollout, mesh),
        "first_ratio": ratio,
        "kept": []
        if rollout.kept is None
        else by_sample(balanced, trimmed(rollout.kept, rollout.responses), mesh),
        "metrics": metrics,
        **routing,
        **{
            name: by_sample(balanced, trimmed(grid, rollout.responses), mesh)
            for name, grid in per_sample.items()
        },
    }


def routing_case(roles, rollout, config, mesh):
    """Log-probs of a policy whose routers choose the worst experts, with replay and without.

    Returns:
        The experts of each token, the largest distances from the sampler's log-probs, and the
        share of choices that replay has changed.
    """
    limit = MicrobatchLimit.of_scoring(config.ppo)
    batches = make_batches(
        rollout.prompts, rollout.responses, limit=limit, mesh=mesh, routing=rollout.routing
    )
    plain, gaps = Replay.get_replay_topk, {}

    def perverse(self, scores, topk, num_groups, group_topk, choose):
        def worst(scores, topk, **options):
            _, experts = choose(-scores, topk, **options)
            return scores.gather(1, experts), experts

        return plain(self, scores, topk, num_groups, group_topk, worst)

    drain(roles.policy.chunks)
    Replay.get_replay_topk = perverse
    for replayed in (True, False):
        forward = partial(logprob_forward, replayed=replayed)
        found = run_forward(roles.policy.chunks, batches, forward, leading=(2,))[0]
        gaps[replayed] = max_over_world((found - rollout.logprobs).abs().max())
    Replay.get_replay_topk = plain
    differing, replayed = sum_over_world(torch.stack(drain(roles.policy.chunks)).float())
    # The last token is not passed through the model.
    lengths = [len(p) + len(r) - 1 for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    experts = rollout.routing.sort(-1).values
    rows = [row[:length].tolist() for row, length in zip(experts, lengths, strict=True)]
    return {
        "routing": by_sample(rollout.sample_indices, rows, mesh),
        "routing_gaps": [float(gaps[True]), float(gaps[False])],
        "routing_changed": float(differing / replayed),
    }


def method_case(case, method, mesh, others, rollout, greedy):
    """Two epochs by another method, from the same samples and the first weights."""
    ppo, macro = METHODS[method]
    reward = REWARDS.get(method, {})
    changes = {"microbatch": case["microbatch"] | ppo, "macro": macro, "reward": reward}
    # One group is the whole batch, on all replicas.
    samples = 2 if ppo.get("objective") == "p3o" else BATCH
    config = config_for(case | changes | {"rollout": {"samples_per_prompt": samples}})
    policy, critic = model(config, mesh, "language", 1), None
    if config.ppo.has_critic:
        critic = TrainState(model(config, mesh, "scalar", 2), config.critic, total_steps=4)
    rewards = [*others.rewards]
    for number, judge in enumerate(config.reward.judges[1:]):
        head = "language" if judge.is_language else "scalar"
        rewards.append(model(config, mesh, head, 7 + number))
    roles = Roles(
        policy=TrainState(policy, config.policy, total_steps=4),
        critic=critic,
        reference=others.reference,
        rewards=rewards,
    )
    scorer = Scorer(config.reward, roles.rewards, ENDS, mesh)
    segmenter = Segmenter(config.macro, None, mesh, seed=0)
    sums = step_sums()
    generator = generator_in_place(policy, config, mesh, stop=StopRule(frozenset({EOS})))
    maker = ExperienceBuilder(config, roles, scorer, segmenter, mesh, generator=generator)
    experience, _ = maker.build(
        rollout,
        [{}] * len(rollout.prompts),
        step=3,
        kl_coef=0.05,
        sums=sums,
        greedy=greedy if method == "remax" else None,
        references=references(rollout) if config.reward.compares_references else None,
    )
    update.ppo_update(roles, experience, config, mesh, step=3, sums=sums, timers=PhaseTimers())
    metrics = finish(reduce_metrics(sums, sum_over_world, max_over_world))
    lines = trimmed(experience.advantages, rollout.responses)
    return {
        "method": [config.ppo.estimator, config.ppo.objective, config.ppo.aggregation],
        "advantages": by_sample(rollout.sample_indices, lines, mesh),
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("rollout/logprob_gap")},
    }


def references(rollout):
    """One, two or three other responses to each prompt."""
    others = texts(10, [4, 2, 5, 3, 6])
    return [others[i % 3 : i % 3 + 1 + i % 2] for i in rollout.sample_indices]


def first_ratio(roles, experience, config, mesh):
    """The mean likelihood ratio of the first update to the sampler's own log-probs."""
    learner = update.policy_learner(
        roles.policy,
        config,
        filtered=experience.kept is not None,
        replayed=experience.routing is not None,
    )
    samples = torch.arange(len(experience.prompts))
    microbatches = update.make_microbatches(experience, samples, config, mesh)
    outputs = pipeline_forward(
        learner.state.chunks, [m.batch for m in microbatches], learner.forward
    )
    pairs = zip(outputs, microbatches, strict=False) if mesh.reports_metrics else ()
    ratios = [learner.objective(output, m).metrics["ratio"] for output, m in pairs]
    sums = torch.tensor([[float(total), float(count)] for total, count in ratios]).sum(0)
    total, count = sum_over_world(sums if ratios else torch.zeros(2)).tolist()
    return total / count


def reward_case(config, mesh, folder, *, two_heads=False):
    """Two optimizer steps of a reward model; the scores afterwards."""
    settings = config.reward_model.model_copy(update={"length_coef": 0.5})
    chunks = build_chunks(
        config.model, config.precision, mesh, head="scalar", length_head=two_heads
    )
    fill_random(chunks, mesh, seed=6)
    fill_adapters(chunks, mesh, seed=6)
    state = TrainState(chunks, settings, total_steps=4)
    pairs = judged_pairs()
    prompts, chosen = [p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs]
    share = BATCH // mesh.dp_size
    own = list(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share))
    size, packed = config.ppo.microbatch_size, config.ppo.packing

    def loss(output, microbatch):
        if not two_heads:
            return pair_loss(output, microbatch, settings)
        head, is_first = chunks[-1].output_layer, mesh.cp_rank == 0
        return two_head_loss(output, microbatch, settings, head, adds_overlap=is_first)

    forward = both_scores_forward if two_heads else score_forward
    losses, norms = [], []
    for step in range(2):
        state.zero_grad()
        microbatches = [
            pair_microbatch([pairs[i] for i in own[k : k + size]], mesh, packed=packed)
            for k in range(0, share, size)
        ]
        if two_heads:
            microbatches = add_length_terms(state, microbatches, mesh=mesh)
        with dropping(state.chunks, step):
            outputs = pipeline_forward_backward(state.chunks, microbatches, forward, loss)
        losses.append(loss_of(outputs, mesh))
        norms.append(state.step().grad_norm)
    batches = make_batches(
        [prompts[i] for i in own],
        [chosen[i] for i in own],
        limit=MicrobatchLimit(sequences=4, packed=packed),
        mesh=mesh,
    )
    leading = (2,) if two_heads else ()
    scores = run_forward(state.chunks, batches, forward, leading=leading)
    export_hf(chunks, config, mesh, target=folder / ("two_heads" if two_heads else "reward"))
    grids = [
        trimmed(grid, [chosen[i] for i in own]) for grid in scores.view(-1, *scores.shape[-2:])
    ]
    return {
        "losses": losses,
        "grad_norms": norms,
        "scores": [by_sample(own, grid, mesh) for grid in grids],
    }


def judged_pairs():
    """Pairs of three users, the same on all ranks."""
    prompts, chosen = texts(7, [4] * BATCH), texts(8, [3, 5, 4, 6, 3, 5, 4, 2])
    rejected = texts(9, [5, 3, 6, 4, 2, 5, 3, 4])
    return [
        PreferencePair(prompt_ids=p, chosen_ids=c, rejected_ids=r, margin=0.1, user="abc"[i % 3])
        for i, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True))
    ]


def latents_case(config, mesh):
    """Two optimizer steps of a reward model with a latent per user; the scores afterwards."""
    size, packed = config.ppo.microbatch_size, config.ppo.packing
    changes = {"latent_size": 6, "latent_kl_coef": 0.1, "packing": packed, "microbatch_size": size}
    settings = config.reward_model.model_copy(update=changes)
    chunks = build_chunks(config.model, config.precision, mesh, head="scalar", latent_size=6)
    fill_random(chunks, mesh, seed=6)
    fill_adapters(chunks, mesh, seed=6)
    state = TrainState(chunks, settings, total_steps=4)
    users = UserLatents(chunks, settings, mesh, seed=2)
    share = BATCH // mesh.dp_size
    own = list(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share))
    pairs = InContext(judged_pairs(), size=2, seed=3, key="")[own[0] : own[-1] + 1]
    losses, norms = [], []
    for _ in range(2):
        state.zero_grad()
        parts = [users.microbatch(pairs[k : k + size]) for k in range(0, share, size)]
        outputs = pipeline_forward_backward(
            state.chunks, users.prepare(state, parts), last_state_forward, users.loss
        )
        losses.append(loss_of(outputs, mesh))
        norms.append(state.step().grad_norm)
    scores = users.score(state, pairs).T.tolist()
    return {"losses": losses, "grad_norms": norms, "scores": [by_sample(own, scores, mesh)]}


def preference_case(config, mesh):
    """One optimizer step by every loss on preference pairs, the tokens discounted."""
    lengths = [3, 5, 4, 6, 3, 5, 4, 2]
    texts_of = zip(texts(7, [4] * BATCH), texts(8, lengths), texts(9, lengths[::-1]), strict=True)
    pairs = [
        PreferencePair(
            prompt_ids=prompt,
            chosen_ids=chosen,
            rejected_ids=rejected,
            margin=0.25 * (i % 3),
            safe=[i % 2 == 0, i % 3 == 0],
            from_reference=["chosen", "rejected"][i % 2],
            chosen_probability=1 - 0.05 * i,
        )
        for i, (prompt, chosen, rejected) in enumerate(texts_of)
    ]
    share = BATCH // mesh.dp_size
    pairs = pairs[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
    sums = -4 * torch.tensor([[len(r) for r in p.responses] for p in pairs]).float()
    known = preference_pairs.KnownPairs.of(pairs, sums)
    ref_logprobs = -3.9 - torch.arange(6.0).expand(share, 2, 6) / 10
    discounts = (0.9 ** torch.arange(6.0)).expand(share, 2, 6)
    known = replace(known, discounts=discounts, ref_logprobs=ref_logprobs)
    rankings = [replace(p, others=[p.prompt_ids], rewards=[2.0, 1.0, 0.5]) for p in pairs]
    ranked = preference_pairs.KnownPairs.of(rankings, torch.zeros(share, 3))
    losses = dict.fromkeys(get_args(PreferenceLoss), (2, pairs, known))
    losses["pro"] = (3, rankings, ranked)
    return {
        loss: preference_step(loss, *given, config=config, mesh=mesh)
        for loss, given in losses.items()
    }


def preference_step(loss, size, pairs, known, *, config, mesh):
    """The sums of one optimizer step, and its gradient's norm."""
    settings = config.preference.model_copy(update={"loss": loss, "nll_coef": 0.1})
    state = TrainState(model(config, mesh, "language", 1), config.policy, total_steps=4)
    state.zero_grad()
    limit = MicrobatchLimit(sequences=2 * size, packed=config.ppo.packing)
    parts = pair_batches(pairs, limit=limit, mesh=mesh, group=size).microbatches
    outputs = pipeline_forward_backward(
        state.chunks,
        [
            Microbatch(batch=p.batch, extra=known.choose(p.indices[::size] // size, mesh.device))
            for p in parts
        ],
        logprob_forward,
        lambda output, m: preference_pairs.preference_output(
            torch.where(m.batch.response_mask, output[0], 0.0), m.extra, settings
        ),
    )
    sums = [[o.loss_sum, o.count, *(x for x, _ in o.metrics.values())] for o in outputs]
    total = torch.tensor(sums).sum(0) if mesh.reports_metrics else torch.zeros(7)
    return [*sum_over_world(total).tolist(), state.step().grad_norm]


def offline_case(config, mesh, *, with_losses):
    """What prompts are worth after two epochs; a step of every loss."""
    body = model(config, mesh, "language", 1)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
    limit = MicrobatchLimit(sequences=config.ppo.microbatch_size, packed=config.ppo.packing)
    values = PromptValue(32, low=-1.0, high=1.0, seed=3, device=mesh.device)

    def states_of(chosen):
        return offline_values._prompt_states(body, [prompts[i] for i in chosen], limit, mesh)

    offline_values.fit(values, torch.linspace(-1, 1, BATCH), states_of, config, mesh)
    own = list(range(mesh.dp_rank, BATCH, mesh.dp_size))
    found = offline_values.values_of(body, values, [prompts[i] for i in own], limit, mesh)
    return {
        "values": by_sample(own, found[:, 0].tolist(), mesh),
        "algorithms": offline_losses(config, mesh, prompts) if with_losses else {},
    }


def offline_losses(config, mesh, prompts):
    """The loss of every algorithm and the size of its gradient, each from the first weights."""
    responses = texts(8, [3, 5, 4, 6, 3, 5, 4, 2])
    examples = [
        OfflineExample(prompt_ids=p, response_ids=r, reward=0.0, line=1)
        for p, r in zip(prompts, responses, strict=True)
    ]
    lengths = torch.tensor([len(r) for r in responses])
    known = Known(
        rewards=torch.linspace(0.0, 1.0, BATCH),
        values=torch.full((BATCH,), 0.3),
        ref_logprobs=torch.full((BATCH, 6), -3.9),
        action_ids=(torch.arange(6) // 2).where(torch.arange(6) < lengths[:, None], NO_ACTION),
    )
    own = list(range(mesh.dp_rank, BATCH, mesh.dp_size))
    found = {}
    for algorithm in get_args(OfflineAlgorithm):
        settings = config.offline.model_copy(
            update={
                "algorithm": algorithm,
                "kl_coef": 0.1,
                "microbatch_size": 2,
                "packing": config.ppo.packing,
            }
        )
        changed = config.model_copy(update={"offline": settings})
        state = TrainState(model(config, mesh, "language", 1), config.policy, total_steps=4)
        state.zero_grad()
        outputs = pipeline_forward_backward(
            state.chunks,
            offline.valued_microbatches(examples, own, known, changed, mesh),
            logprob_forward,
            partial(offline.valued_loss, config=changed),
        )
        found[algorithm] = {"loss": loss_of(outputs, mesh), "norm": state.step().grad_norm}
    return found


def loss_of(outputs, mesh):
    """The sum of all ranks."""
    own = sum(o.loss_sum.item() for o in outputs) if mesh.reports_metrics else 0.0
    return sum_over_world(torch.tensor(own)).item()


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Several chunks in a microbatch, of other sizes at other tensor-parallel sizes.
    limits.LOGITS_CHUNK_ELEMENTS = 640
    results, mesh, parallel = [], None, None
    for case in cases:
        config = config_for(case)
        if case["parallel"] != parallel:
            if mesh is not None:
                destroy_mesh(leave_world=False)
            mesh, parallel = create_mesh(config.parallel), case["parallel"]
        folder = Path(case["weights"])
        results.append(
            {
                "ppo": ppo_case(case, config, mesh, folder),
                "reward": reward_case(config, mesh, folder),
                "two_heads": reward_case(config, mesh, folder, two_heads=True)
                if case["heads"]
                else {},
                "latents": latents_case(config, mesh) if case["heads"] else {},
                "offline": offline_case(config, mesh, with_losses=case["methods"])
                if case["heads"]
                else {},
                "preference": preference_case(config, mesh) if case["methods"] else {},
            }
        )
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
    destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
