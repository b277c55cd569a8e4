"""PPO steps, reward-model steps and rollouts at several layouts of one world size: OUT CASES."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config import limits
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience import builder
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.roles import LogprobStep, Roles, score_step, value_step
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import (
    gather_objects_over_data,
    max_over_world,
    sum_over_world,
)
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import run_forward_backward
from marlhf_mega.rollout.deal import balance
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.train import reward as reward_job
from marlhf_mega.train.build import generator_in_place
from marlhf_mega.train.export import export_hf
from marlhf_mega.update import ppo as update

BATCH, EOS = 8, 7
# Adam divides by the gradient's own size; with a large epsilon rounding noise stays small.
OPTIMIZER = {"lr": 2e-3, "eps": 1e-3}


def config_for(case):
    return Config.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 64,
                "vocab_size": 50,
                "init_std": 0.2,
            }
            | case["model"],
            "parallel": case["parallel"],
            "precision": {"dtype": "float32", "fp8": case.get("fp8", "off"), "fp8_frozen": True},
            "policy": OPTIMIZER,
            "critic": OPTIMIZER,
            "reward_model": OPTIMIZER,
            "rollout": {"batch_size": BATCH, "max_response_tokens": 10},
            "macro": {"n": 3, "ratio": "macro"},
            "ppo": {
                "epochs": 2,
                "minibatch_size": BATCH,
                **case["microbatch"],
                "entropy_coef": 0.01,
                "kl_loss_coef": 0.1,
            },
            "reward": {"source": "model"},
        }
    )


def texts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 50, (n,), generator=generator).tolist() for n in lengths]


def by_sample(own, values, mesh):
    """Collect per-sample lists of all replicas in the order of the global indices."""
    parts = gather_objects_over_data(list(zip(own, values, strict=True)), mesh)
    return [value for _, value in sorted(pair for part in parts for pair in part)]


def replica_tokens(rollout, mesh):
    """Tokens that every data-parallel rank holds."""
    tokens = sum(map(len, rollout.prompts)) + sum(map(len, rollout.responses))
    return gather_objects_over_data(tokens, mesh)


def trimmed(grid, responses):
    return [row[: len(r)] for row, r in zip(grid.tolist(), responses, strict=True)]


def model(config, mesh, head, seed, **changes):
    shape = config.model.model_copy(update=changes)
    chunks = build_chunks(shape, config.precision, mesh, head=head)
    fill_random(chunks, mesh, seed=seed)
    return chunks


def ppo_case(config, mesh, folder):
    policy, critic = model(config, mesh, "language", 1), model(config, mesh, "scalar", 2)
    roles = Roles(
        policy=TrainState(policy, config.policy, total_steps=4),
        critic=TrainState(critic, config.critic, total_steps=4),
        reference=model(config, mesh, "language", 3),
        # It does not know the last two ids of the policy, which prompts and responses have.
        rewards=[model(config, mesh, "scalar", 4, vocab_size=48)],
    )
    own = update.local_indices(BATCH, BATCH, mesh)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
    generator = generator_in_place(policy, config, mesh, eos_id=EOS)
    options = {"max_response_tokens": 10, "seed": 11, "step": 3, "slots": 3}
    greedy, rollout = (
        generator.generate([prompts[i] for i in own], own, rule=rule, **options)
        for rule in (SamplingRule(temperature=0.0), SamplingRule(temperature=1.0))
    )
    # Replicas with two, one or no prompts: those that share experts go through them together.
    few = list(range(mesh.dp_rank, 3 if config.model.num_experts else 0, mesh.dp_size))
    rule = SamplingRule(temperature=0.0)
    uneven = generator.generate([prompts[i] for i in few], few, rule=rule, **options)
    cut = {"mesh": mesh, "limit": MicrobatchLimit.of_scoring(config.ppo)}
    if config.ppo.microbatch_tokens is not None:
        rollout = balance(rollout, minibatch_size=BATCH, mesh=mesh)
    balanced = rollout.sample_indices
    scorer = Scorer(config.reward.source, roles.rewards, None, **cut)
    segmenter = Segmenter(config.macro, None, mesh, seed=0)
    sums = MetricSums(mean=[*builder.MEANS, *update.MEANS], maximum=builder.MAXIMA)
    maker = ExperienceBuilder(config, roles, scorer, segmenter, mesh)
    experience, scores = maker.build(rollout, [{}] * len(own), step=3, kl_coef=0.05, sums=sums)
    update.ppo_update(roles, experience, config, mesh, step=3, sums=sums, timers=PhaseTimers())
    rows = (rollout.prompts, rollout.responses)
    after = forward_rows(roles.policy.chunks, *rows, run=LogprobStep(1.0), leading=(2,), **cut)
    values = forward_rows(roles.critic.chunks, *rows, run=value_step, **cut)
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
    metrics = reduce_metrics(sums, sum_over_world, max_over_world)
    gap = metrics.pop("rollout/logprob_gap_max")
    metrics.pop("rollout/logprob_gap")
    assert gap < 1e-4, gap
    return {
        "greedy": by_sample(own, greedy.responses, mesh),
        "uneven": by_sample(few, uneven.responses, mesh),
        "sampled": by_sample(balanced, rollout.responses, mesh),
        "scores": by_sample(balanced, scores.tolist(), mesh),
        "tokens_per_replica": replica_tokens(rollout, mesh),
        "metrics": metrics,
        **{
            name: by_sample(balanced, trimmed(grid, rollout.responses), mesh)
            for name, grid in per_sample.items()
        },
    }


def reward_case(config, mesh, folder):
    """Two optimizer steps of a reward model; the scores afterwards."""
    chunks = model(config, mesh, "scalar", 6)
    state = TrainState(chunks, config.reward_model, total_steps=4)
    prompts, chosen = texts(7, [4] * BATCH), texts(8, [3, 5, 4, 6, 3, 5, 4, 2])
    rejected = texts(9, [5, 3, 6, 4, 2, 5, 3, 4])
    pairs = [
        PreferencePair(prompt_ids=p, chosen_ids=c, rejected_ids=r, margin=0.1)
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    share = BATCH // mesh.dp_size
    own = list(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share))
    size, packed = config.ppo.microbatch_size, config.ppo.packing
    losses, norms = [], []
    for _ in range(2):
        state.zero_grad()
        microbatches = [
            reward_job._pair_microbatch([pairs[i] for i in own[k : k + size]], mesh, packed=packed)
            for k in range(0, share, size)
        ]
        outputs = run_forward_backward(
            state.chunks,
            microbatches,
            lambda chunk, m: score_step(chunk, m.batch),
            lambda output, m: reward_job._loss(output, m, config),
        )
        total = torch.tensor(sum(o.loss_sum.item() for o in outputs) if mesh.is_reporter else 0.0)
        losses.append(sum_over_world(total).item())
        norms.append(state.step().grad_norm)
    scores = forward_rows(
        state.chunks,
        [prompts[i] for i in own],
        [chosen[i] for i in own],
        mesh=mesh,
        limit=MicrobatchLimit(rows=4, packed=packed),
        run=score_step,
    )
    export_hf(chunks, config, mesh, target=folder / "reward")
    return {
        "losses": losses,
        "grad_norms": norms,
        "scores": by_sample(own, trimmed(scores, [chosen[i] for i in own]), mesh),
    }


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Several chunks in a microbatch, of other sizes at other tensor-parallel sizes.
    limits.LOGITS_CHUNK_ELEMENTS = 640
    results = []
    for case in cases:
        config = config_for(case)
        mesh = create_mesh(config.parallel)
        folder = Path(case["weights"])
        results.append(
            {"ppo": ppo_case(config, mesh, folder), "reward": reward_case(config, mesh, folder)}
        )
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
