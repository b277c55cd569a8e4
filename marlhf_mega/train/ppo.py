"""Macro-action PPO. The loop is `run_ppo`; one step of it is `PpoRun.step`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.rewards import RunningMoments, adaptive_kl_coef
from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience import builder
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.experience.types import Experience
from marlhf_mega.metrics import rates
from marlhf_mega.metrics.memory import PHASE_PEAKS
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.metrics.writers import Sample
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.offload import TRAINING
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.build import build_roles, check_scalar_models, policy_origin
from marlhf_mega.train.evaluate import Evaluator, Judged, make_sample, prompt_examples, prompt_row
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.output import RunOutput
from marlhf_mega.train.resume import CONFIG, make_saver, resume, settings_of
from marlhf_mega.train.rollouts import create_rollouts, serve_rollouts
from marlhf_mega.train.stop import StopRequest, count_attempt
from marlhf_mega.update import ppo as update
from marlhf_mega.update.divergence import PrecisionGuard
from marlhf_mega.update.ppo import ppo_update

_STATE = ("step", "stream", "kl_coef", "reward_moments", "first_scores")
"""What a checkpoint holds besides the models and the configuration."""

PHASES = ("rollout", "experience", "policy", "critic")


def ppo_inputs(config: Config, world_size: int) -> Inputs[Prompt]:
    """Read what ppo needs; raises ValueError for anything the user has to mend."""
    inputs = read_inputs(
        config, "ppo", world_size=world_size, kind="prompts", build=prompt_examples
    )
    config, tokenizer = inputs.config, inputs.tokenizer
    policy_origin(config)
    num_ranks = world_size - rollout_ranks(config, "ppo")
    check_scalar_models(config, tokenizer, num_ranks, critic=True)
    return inputs


def run_ppo(inputs: Inputs[Prompt], mesh: Mesh) -> tuple[dict[str, float], dict[str, float]]:
    """Train the policy against the reward. All ranks call it; some may only generate.

    Returns:
        Held-out results before the first step (empty after a resume) and at the end; nothing on
        ranks that only generate.
    """
    if mesh.only_generates:
        serve_rollouts(inputs, mesh)
        return {}, {}
    run = PpoRun(inputs, mesh)
    config, first = inputs.config, run.first_step
    before: dict[str, float] = {}
    with run.output as output, run.rollouts.open():
        count_attempt(config, first, mesh)
        request = StopRequest(config, mesh)
        if first == 0:
            before = run.evaluate(step=0)
        for step in range(first, run.num_steps):
            with output.step(step + 1):
                metrics = run.step(step)
            done, last = step + 1, step + 1 == run.num_steps
            if last or (config.evaluate.interval and done % config.evaluate.interval == 0):
                metrics |= run.evaluate(step=done)
            output.finish_step(done, metrics)
            stopping = request.is_made() and not last
            interval = config.checkpoint.interval
            with output.timers("checkpoint"):
                run.saver.poll()
                if stopping or last or (interval and done % interval == 0):
                    run.save(done)
                if stopping or last:
                    run.saver.finish()
            if stopping:
                raise request.end(done)
        run.close()
        output.write_report()
    return before, run.last_results


class PpoRun:
    """The parties of a run: models, generator, scorer, streams, writers."""

    def __init__(self, inputs: Inputs[Prompt], mesh: Mesh) -> None:
        """Build everything and, where there is a checkpoint, go on from it."""
        config, tokenizer = inputs.config, inputs.tokenizer
        self.config, self.inputs, self.mesh, self.tokenizer = config, inputs, mesh, tokenizer
        rollout, ppo = config.rollout, config.ppo
        prompts_per_step = rollout.batch_size // rollout.samples_per_prompt
        self.num_steps = config.run.steps or max(1, len(inputs.train) // prompts_per_step)
        self.roles = build_roles(config, tokenizer, mesh, num_steps=self.num_steps)
        self.policy: list[StageModel] = [ddp.module for ddp in self.roles.policy.chunks]
        self.rollouts = create_rollouts(inputs, mesh, self.policy, num_steps=self.num_steps)
        self.scorer = Scorer(
            config.reward.source,
            self.roles.rewards,
            tokenizer,
            mesh,
            limit=MicrobatchLimit.of_scoring(ppo),
        )
        segmenter = Segmenter(config.macro, tokenizer, mesh, seed=config.run.seed)
        self.builder = ExperienceBuilder(config, self.roles, self.scorer, segmenter, mesh)
        self.evaluator = (
            Evaluator(
                config,
                inputs.validation,
                tokenizer,
                self.scorer,
                self.rollouts.generator,
                mesh,
                offload=self.roles.offload,
            )
            if inputs.validation
            else None
        )
        self.role_timers = PhaseTimers(mesh.platform.synchronize_computation)
        self.kl_coef = ppo.kl_coef
        self.first_scores: list[float] | None = None
        self.precision = PrecisionGuard(
            config,
            mesh,
            [*self.roles.policy.chunks, *self.roles.critic.chunks, *self.rollouts.generator.chunks],
        )
        self.last_results: dict[str, float] = {}
        self.trained = {"policy": self.roles.policy, "critic": self.roles.critic}
        self.saver = make_saver(config, mesh)
        self.first_step = self._resume()
        self.roles.offload.start()
        self.output = RunOutput(
            "ppo", inputs, mesh, num_steps=self.num_steps, first_step=self.first_step
        )

    def step(self, step: int) -> dict[str, float]:
        """Take one PPO step: rollout, experience, update. Returns the reduced metrics."""
        config, timers, peaks = self.config, self.output.timers, self.output.peaks
        sums = MetricSums(
            mean=[*builder.MEANS, *update.MEANS],
            total=rates.declared(PHASES),
            maximum=[*builder.MAXIMA, *PHASE_PEAKS],
        )
        with timers("rollout"), peaks("rollout"):
            prompts, rollout = self.rollouts.next(step)
        self.saver.poll()
        with timers("experience"), peaks("experience"):
            experience, scores = self.builder.build(
                rollout,
                [prompt_row(p) for p in prompts],
                step=step,
                kl_coef=self.kl_coef,
                sums=sums,
            )
        self.saver.poll()
        with timers("update"), peaks("update"), self.roles.offload.present(*TRAINING):
            divergence = self.precision.check(self.roles.policy, experience, step=step)
            ppo_update(
                self.roles,
                experience,
                config,
                self.mesh,
                step=step,
                sums=sums,
                timers=self.role_timers,
            )
        peaks.drain(sums)
        self._count_work(sums, rollout)
        metrics = _derived(self.output.reduce(sums)) | divergence
        metrics["policy/kl_coef"] = self.kl_coef
        self._add_rates(metrics)
        if config.ppo.kl_target is not None and "policy/kl" in metrics:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                metrics["policy/kl"],
                target=config.ppo.kl_target,
                horizon=config.ppo.kl_horizon,
                num_samples=config.rollout.batch_size,
            )
        if step % config.logging.samples_interval == 0:
            self.output.write_samples(step + 1, self._samples(prompts, experience, scores))
        return metrics

    def evaluate(self, *, step: int) -> dict[str, float]:
        """Judge the policy on held-out prompts and note it; nothing without a validation file."""
        if self.evaluator is None:
            return {}
        with self.output.timers("evaluate"):
            judged = self.evaluator.judge(self.policy, self.roles.reference)
        results = judged.metrics | self._win_rate(judged)
        self.last_results = results
        if step == 0:
            self.output.write_evaluation(step, results)
        return results

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` PPO steps."""
        moments = self.builder.moments
        self.rollouts.settle()
        state = {
            "step": done,
            **self.rollouts.state_dict(),
            "kl_coef": self.kl_coef,
            "reward_moments": [moments.count, moments.mean, moments.square_deviation],
            "first_scores": self.first_scores,
            "fp8_left": self.precision.has_left,
            CONFIG: settings_of(self.config),
        }
        with self.roles.offload.present(*TRAINING):
            self.saver.save(done, self.trained, state)

    def close(self) -> None:
        """Export the models and end the rules' processes."""
        run_dir = self.config.run.dir
        if self.config.checkpoint.export_hf:
            write = partial(export_hf, config=self.config, mesh=self.mesh, tokenizer=self.tokenizer)
            critic = [ddp.module for ddp in self.roles.critic.chunks]
            self.roles.offload.end()
            with self.output.timers("export"):
                write(self.policy, target=run_dir / "hf")
                write(critic, target=run_dir / "hf_critic")
        self.scorer.close()
        if self.evaluator is not None:
            self.evaluator.close()

    def _resume(self) -> int:
        state = resume(self.config, "ppo", self.trained, self.mesh, required=_STATE)
        if state is None:
            return 0
        self.rollouts.load_state_dict(state)
        # A changed one counts from here on.
        if state[CONFIG]["ppo"]["kl_coef"] == self.config.ppo.kl_coef:
            self.kl_coef = float(state["kl_coef"])
        count, mean, square_deviation = state["reward_moments"]
        self.builder.moments = RunningMoments(
            count=count, mean=mean, square_deviation=square_deviation
        )
        self.first_scores = state["first_scores"]
        if state.get("fp8_left"):
            self.precision.leave()
        return int(state["step"])

    def _samples(
        self, prompts: Sequence[Prompt], experience: Experience, scores: Tensor
    ) -> list[Sample]:
        ids = experience.actions.ids.cpu()
        before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]
        starts = (ids != before) & (ids >= 0)
        return [
            make_sample(
                prompts[i].prompt,
                experience.responses[i],
                self.tokenizer,
                action_starts=starts[i].nonzero()[:, 0].tolist(),
                score=scores[i].item(),
            )
            for i in range(min(self.config.logging.samples, len(prompts)))
        ]

    def _win_rate(self, judged: Judged) -> dict[str, float]:
        """Share of prompts on which the score is above that of the first evaluation."""
        if self.first_scores is None:
            self.first_scores = judged.scores
            return {}
        pairs = [
            (now, then)
            # A resume may judge more or fewer of the prompts.
            for now, then in zip(judged.scores, self.first_scores, strict=False)
            if not (math.isnan(now) or math.isnan(then))
        ]
        wins = sum((now > then) + 0.5 * (now == then) for now, then in pairs)
        return {"eval/win_rate": wins / len(pairs)} if pairs else {}

    def _count_work(self, sums: MetricSums, rollout: Rollout) -> None:
        if self.mesh.is_reporter:
            work = rates.ppo_work(
                self.config.model,
                [len(p) for p in rollout.prompts],
                [len(r) for r in rollout.responses],
                epochs=self.config.ppo.epochs,
                # The reference, and the policy unless the sampler has said it.
                num_language=1 + (self.config.ppo.old_logprobs == "trainer"),
                num_rewards=len(self.roles.rewards),
            )
            rates.add(sums, work)

    def _add_rates(self, metrics: dict[str, float]) -> None:
        """Turn work and seconds into rates, and into MFU where the peak is known."""
        timers, roles = self.output.timers, self.role_timers
        generating, num_generating = self.rollouts.work_seconds(timers.seconds("rollout"))
        training = {"experience": timers.seconds("experience")}
        whole = sum(map(timers.seconds, ("rollout", "experience", "update")))
        training |= {role: roles.seconds(role) for role in ("policy", "critic")}
        roles.drain()
        metrics["perf/tokens_per_second"] = metrics["experience/work_tokens"] / whole
        for seconds, num_devices in (
            ({"rollout": generating}, num_generating),
            (training, self.mesh.world_size),
        ):
            metrics |= rates.rates(
                metrics,
                seconds,
                num_devices=num_devices,
                device_name=self.mesh.platform.device_name,
            )
        metrics["rollout/tokens_per_second"] = metrics.pop("perf/tokens_per_second_rollout")
        metrics |= self.rollouts.metrics()
        if self.roles.offload.is_on:
            metrics["time/offload_seconds"] = self.roles.offload.drain_seconds()


def _derived(metrics: dict[str, Any]) -> dict[str, float]:
    """Turn moments into standard deviation and explained variance."""

    def variance(mean: str, square: str) -> float:
        return max(metrics.pop(square, 0.0) - metrics[mean] ** 2, 0.0) if mean in metrics else 0.0

    score_variance = variance("rollout/score_mean", "rollout/score_square")
    if "rollout/score_mean" in metrics:
        metrics["rollout/score_std"] = score_variance**0.5
    total = variance("critic/return_mean", "critic/return_square")
    left = variance("critic/error_mean", "critic/error_square")
    metrics.pop("critic/error_mean", None)
    if total > 0:
        metrics["critic/explained_variance"] = 1 - left / total
    return metrics
