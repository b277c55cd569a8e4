"""Time a PPO step: rollout, experience and update, as `marlhf ppo` runs them.

    python tools/benchmark/ppo_step.py --ranks 4 --tensor-size 2 --pipeline-size 2

Policy, critic, reference and reward model have random weights and the same shape; macro actions are
5-grams. The end token stops nothing, so every response has exactly its requested length. Like other
frameworks, scoring takes all of a rank's sequences at once by default. Prints readable lines and
one JSON object.
"""

import argparse
import statistics
import sys
from typing import cast

import common
from macro_ops import measure as measure_macro_ops
from macro_ops import rules

from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.flops import forward_flops, training_flops
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.assignment import balance, local_indices
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import build_generator
from marlhf_mega.update import ppo as update

PHASES = ("generation", "scoring", "update")


class Iteration:
    """The parts of one PPO step, connected as in the ppo job, without text or files."""

    def __init__(self, args: argparse.Namespace, config: Config, mesh: Mesh) -> None:
        self.args, self.config, self.mesh = args, config, mesh
        self.roles = build_roles(config, mesh, seed=args.seed, overlap=args.overlap)
        policy = [ddp.module for ddp in self.roles.policy.chunks]
        self.generator, _ = build_generator(policy, config, mesh, stop=StopRule())
        self.builder = experience_builder(config, self.roles, mesh, seed=args.seed)
        self.own = local_indices(args.batch, config.ppo.minibatch_size, mesh)
        prompts = [args.prompt_len] * args.batch
        self.prompts = common.random_tokens(args.seed, prompts, config.model.vocab_size or 0)
        self.lengths = common.response_lengths(
            args.lengths, count=args.batch, fixed=args.response_len, seed=args.seed
        )
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def run(self, step: int) -> None:
        """Run the three phases and record the slowest rank's seconds of each."""
        timers = PhaseTimers(self.mesh.platform.synchronize)
        sums = step_sums()
        with timers("generation"):
            rollout = self.generator.generate(
                [self.prompts[i] for i in self.own],
                self.own,
                RolloutOptions(
                    rule=SamplingRule(temperature=self.config.rollout.temperature),
                    max_response_tokens={i: self.lengths[i] for i in self.own},
                    seed=self.args.seed,
                    step=step,
                    slots=self.args.slots,
                ),
            )
            if self.config.ppo.microbatch_tokens is not None:
                size = self.config.ppo.minibatch_size
                rollout = balance(rollout, minibatch_size=size, mesh=self.mesh)
        with timers("scoring"):
            experience, _ = self.builder.build(
                rollout, [{}] * len(self.own), step=step, kl_coef=0.05, sums=sums
            )
        with timers("update"):
            update.ppo_update(
                self.roles,
                experience,
                self.config,
                self.mesh,
                step=step,
                sums=sums,
                timers=PhaseTimers(),
            )
        for phase in PHASES:
            self.seconds[phase].append(common.slowest(self.mesh, timers.seconds(phase)))


def build_roles(config: Config, mesh: Mesh, *, seed: int, overlap: bool = False) -> Roles:
    """Return four random models, policy and critic with optimizers."""
    reference = common.build(config, mesh, "language", seed=seed + 2)
    reward = common.build(config, mesh, "scalar", seed=seed + 3)
    for chunk in (*reference, *reward):
        chunk.requires_grad_(False).eval()
    policy = common.build(config, mesh, "language", seed=seed)
    critic = common.build(config, mesh, "scalar", seed=seed + 1)
    return Roles(
        policy=TrainState(policy, config.policy, total_steps=1000, overlap=overlap),
        critic=TrainState(critic, config.critic, total_steps=1000, overlap=overlap),
        reference=reference,
        rewards=[reward],
    )


def experience_builder(config: Config, roles: Roles, mesh: Mesh, *, seed: int) -> ExperienceBuilder:
    """Build the experience phase without a tokenizer: reward models and n-grams need no text."""
    tokenizer = cast(Tokenizer, None)
    scorer = Scorer(config.reward, roles.rewards, tokenizer, mesh)
    segmenter = Segmenter(config.macro, tokenizer, mesh, seed=seed)
    return ExperienceBuilder(config, roles, scorer, segmenter, mesh)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Time PPO steps, and the macro-action operations on their own."""
    config = with_batches(args, config, mesh)
    iteration = Iteration(args, config, mesh)
    mesh.platform.reset_memory_peak()
    whole = common.timed(mesh, iteration.run, warmup=args.warmup, iters=args.iters)
    seconds = {p: iteration.seconds[p][args.warmup :] for p in PHASES}
    longest = max(iteration.lengths)
    macro_ms, _ = measure_macro_ops(
        rules(config.macro.n)["fixed_ngram"], len(iteration.own), longest, 0.3
    )
    tokens = sum(iteration.lengths)
    median = statistics.median(whole)
    return {
        "seconds": {
            "iter_s": common.spread(whole),
            **{f"{p}_s": common.spread(seconds[p]) for p in PHASES},
        },
        "flops": phase_flops(args, config, iteration.lengths),
        "tokens_per_s": {
            "iter": tokens / median,
            **{p: tokens / statistics.median(seconds[p]) for p in PHASES},
        },
        "macro_ops_fraction": macro_ms / 1000 / median,
        "minibatch_size": config.ppo.minibatch_size,
        "microbatch_size": config.ppo.microbatch_size,
        "microbatch_tokens": config.ppo.microbatch_tokens,
        "scoring_microbatch_factor": config.ppo.scoring_microbatch_factor,
        "rollout_layout": iteration.generator.mesh.describe(),
        "lines": [
            f"{tokens / median:.0f} response tokens per second, "
            f"{tokens / statistics.median(seconds['generation']):.0f} while generating",
            f"macro actions {macro_ms:.2f} ms, {macro_ms / 1000 / median:.3%} of an iteration",
        ],
    }


def with_batches(args: argparse.Namespace, config: Config, mesh: Mesh) -> Config:
    """Split the batch into minibatches, and those into microbatches that fill the pipeline."""
    minibatch = args.batch // args.minibatches
    if args.batch % args.minibatches or minibatch % mesh.dp_size:
        raise ValueError(
            f"--minibatches={args.minibatches}: must split --batch={args.batch} into equal parts "
            f"that {mesh.dp_size} data-parallel ranks can share. Change one of them."
        )
    share = minibatch // mesh.dp_size
    parts = 2 * mesh.pp_size if mesh.pp_size > 1 else 1
    size = args.microbatch_size or max(1, share // parts)
    most = args.batch // mesh.dp_size // parts
    whole = 1 if args.microbatch_tokens else max(1, -(-most // size))
    factor = args.scoring_microbatch_factor or whole
    ppo = {
        "epochs": args.ppo_epochs,
        "minibatch_size": minibatch,
        "microbatch_size": size,
        "microbatch_tokens": args.microbatch_tokens,
        "scoring_microbatch_factor": factor,
        "old_logprobs": args.old_logprobs,
    }
    rollout = {
        "tensor_size": args.rollout_tensor_size,
        "pipeline_size": args.rollout_pipeline_size,
    }
    return config.model_copy(
        update={
            "ppo": config.ppo.model_copy(update=ppo),
            "rollout": config.rollout.model_copy(update=rollout),
        }
    )


def phase_flops(args: argparse.Namespace, config: Config, lengths: list[int]) -> dict[str, float]:
    """Return the FLOPs of each phase over all ranks."""
    model, whole = config.model, [args.prompt_len + n for n in lengths]
    vocabulary, tokens = model.vocab_size or 0, sum(lengths)
    language = forward_flops(model, whole, output_size=vocabulary, output_tokens=tokens)
    scalar = forward_flops(model, whole, output_size=1, output_tokens=tokens)
    # The last token of a response is never an input.
    generation = forward_flops(
        model, [n - 1 for n in whole], output_size=vocabulary, output_tokens=tokens
    )
    again = config.ppo.old_logprobs == "trainer"
    scoring = (1 + again) * language + 2 * scalar
    training = training_flops(config.model, language + scalar) * config.ppo.epochs
    total = generation + scoring + training
    return {"iter": total, "generation": generation, "scoring": scoring, "update": training}


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.add_argument("--minibatches", type=int, default=4, help="optimizer steps per epoch")
    options.add_argument("--ppo-epochs", type=int, default=1, help="epochs over the batch")
    options.add_argument(
        "--microbatch-size",
        type=int,
        help="sequences per forward pass of a rank; None means its share of a minibatch, split "
        "further under pipeline parallelism",
    )
    options.add_argument("--microbatch-tokens", type=int, help="limit tokens instead of sequences")
    options.add_argument(
        "--scoring-microbatch-factor", type=int, help="None means all of a rank's sequences at once"
    )
    options.add_argument(
        "--old-logprobs", choices=("trainer", "sampler"), default="trainer", help="their source"
    )
    options.add_argument("--overlap", action="store_true", help=common.OVERLAP_HELP)
    for axis in ("tensor", "pipeline"):
        about = f"{axis}-parallel ranks of the rollout; None means as in training"
        options.add_argument(f"--rollout-{axis}-size", type=int, help=about)
    options.add_argument("--lengths", help=common.LENGTHS_HELP)
    options.add_argument(
        "--slots", type=int, help="sequences decoded together on a rank; None means all"
    )
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
