"""Macro-action PPO. The loop is `run_ppo`; one step of it is `PpoRun.step`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from marlhf_mega.algorithm.rewards import RunningMoments, adaptive_kl_coef
from marlhf_mega.checkpoint.sharded import Saveable
from marlhf_mega.checkpoint.store import load
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.evaluation import Evaluator, prompt_row
from marlhf_mega.experience.samples import experience_actions, experience_samples
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.experience.types import Details, Experience
from marlhf_mega.metrics import rates
from marlhf_mega.metrics.held_out import SinceStart
from marlhf_mega.metrics.memory import PHASE_PEAKS
from marlhf_mega.metrics.ppo import finish, step_rates, step_sums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.offload import TRAINING
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import Rollout, RolloutOptions
from marlhf_mega.train.build import build_roles
from marlhf_mega.train.checkpoints import make_saver, resume
from marlhf_mega.train.export import export_hf
from marlhf_mega.train.filtering import RolloutFilter
from marlhf_mega.train.generation import build_transport, warn_of_gap
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.loop import Loop
from marlhf_mega.train.mask_policy import MaskPolicy
from marlhf_mega.train.output import RunOutput
from marlhf_mega.train.resume import CONFIG, settings_of
from marlhf_mega.train.rollout_server import serve_rollouts
from marlhf_mega.train.rollouts import Rollouts
from marlhf_mega.train.steps import num_steps
from marlhf_mega.update.fp8_guard import Fp8Guard
from marlhf_mega.update.ppo import ppo_update

_STATE = ("step", "stream", "kl_coef", "reward_moments")
"""What a checkpoint holds besides the models and the configuration."""


def run_ppo(
    inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog
) -> tuple[dict[str, float], dict[str, float]]:
    """Train the policy against the reward. All ranks call it; some may only generate.

    Returns:
        Held-out results before the first step (empty after a resume) and at the end; nothing on
        ranks that only generate.
    """
    if mesh.only_generates:
        serve_rollouts(inputs, mesh, watchdog)
        return {}, {}
    run = PpoRun(inputs, mesh, watchdog)
    with run.output, run.rollouts.open():
        loop = Loop(run)
        before = loop.start()
        for step in loop.steps():
            with run.output.step(step + 1):
                metrics = run.step(step)
            loop.finish_step(step + 1, metrics)
        loop.finish()
        run.evaluator.close()
    return before, run.last_results


class PpoRun:
    """What a run consists of: models, rollouts, scorer, checkpoints, writers."""

    def __init__(self, inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog) -> None:
        """Build everything and, where there is a checkpoint, resume from it."""
        config, tokenizer = inputs.config, inputs.tokenizer
        self.config, self.inputs, self.mesh, self.tokenizer = config, inputs, mesh, tokenizer
        prompts_per_step = config.rollout.batch_size // config.rollout.samples_per_prompt
        self.num_steps = num_steps(
            config, inputs.epoch_size, prompts_per_step, key="prompts of rollout.batch_size"
        )
        self.roles = build_roles(config, tokenizer, mesh, num_steps=self.num_steps)
        self.policy: list[StageModel] = [ddp.module for ddp in self.roles.policy.chunks]
        stop, self.mask = StopRule.of(tokenizer), None
        if config.rollout.mask_interval is not None:
            self.mask = MaskPolicy(self.policy, config, mesh)
        mask = self.mask.chunks if self.mask else ()
        self.generator, transport = build_transport(self.policy, config, mesh, stop=stop, mask=mask)
        self.rollouts = Rollouts(inputs, transport, mesh, num_steps=self.num_steps)
        self.scorer = Scorer(config.reward, self.roles.rewards, tokenizer, mesh)
        segmenter = Segmenter(config.macro, tokenizer, mesh, seed=config.run.seed)
        self.builder = ExperienceBuilder(
            config, self.roles, self.scorer, segmenter, mesh, generator=self.generator
        )
        self.filter = None
        if config.rollout.filter is not None:
            score = self.builder.score
            self.filter = RolloutFilter(config, self.rollouts, score, mesh, watchdog)
        self.evaluator = Evaluator(
            config,
            inputs.validation,
            tokenizer,
            self.scorer,
            self.generator,
            mesh,
            limit=MicrobatchLimit.of_scoring(config.ppo),
            offload=self.roles.offload,
        )
        self.role_timers = PhaseTimers(mesh.platform.synchronize_computation)
        self.kl_coef = config.ppo.kl_coef
        self.since_start = SinceStart(inputs.validation_hash)
        self.trained = self.roles.learning
        learning = [chunk for state in self.trained.values() for chunk in state.chunks]
        self.fp8_guard = Fp8Guard(config, mesh, [*learning, *self.generator.chunks])
        self.last_results: dict[str, float] = {}
        self.saver = make_saver(config, mesh)
        self.first_step = self._resume()
        self.roles.offload.start()
        self.output = RunOutput(
            "ppo", inputs, mesh, watchdog, num_steps=self.num_steps, first_step=self.first_step
        )

    def step(self, step: int) -> dict[str, float]:
        """Take one PPO step. Returns the metrics, reduced over all ranks."""
        timers, peaks, roles = self.output.timers, self.output.peaks, self.roles
        config, mesh = self.config, self.mesh
        sums = step_sums(maximum=PHASE_PEAKS)

        # 1. Rollout: this replica's prompts and the policy's responses.
        with timers("rollout"), peaks("rollout"):
            if self.mask is not None:
                self.mask.refresh(step)
            prompts, rollout = self.rollouts.next(step)
            scores = None
            if self.filter is not None:
                prompts, rollout, scores = self.filter.choose(step, prompts, rollout)
            greedy = self._greedy(rollout, step) if config.ppo.estimator == "remax" else None
        self.saver.poll()

        # 2. Experience: scores, log-probs, values, macro actions, advantages.
        with timers("experience"), peaks("experience"):
            rows = [prompt_row(prompt) for prompt in prompts]
            experience, details = self.builder.build(
                rollout,
                rows,
                step=step,
                kl_coef=self.kl_coef,
                sums=sums,
                scores=scores,
                greedy=greedy,
                references=self.inputs.references(prompts),
            )
        self.saver.poll()

        # 3. Update: epochs of minibatches, an optimizer step each for all that learn.
        with timers("update"), peaks("update"), roles.offload.on_device(*TRAINING):
            divergence = self.fp8_guard.check(roles.policy, experience, step=step)
            ppo_update(
                roles, experience, config, mesh, step=step, sums=sums, timers=self.role_timers
            )
        peaks.drain(sums)

        # 4. Metrics: one collective.
        if mesh.reports_metrics:
            lengths = [len(p) for p in rollout.prompts], [len(r) for r in rollout.responses]
            generated = None if self.filter is None else self.filter.own_lengths
            rates.add(sums, rates.ppo_work(config, *lengths, generated=generated))
        metrics = finish(self.output.reduce(sums)) | divergence
        metrics |= {"policy/kl_coef": self.kl_coef, **self._rates(metrics)}

        warn_of_gap(config, mesh, metrics)

        # 5. What the next step starts from, and samples to read.
        self._adapt_kl_coef(metrics)
        if step % config.logging.samples_interval == 0:
            self._show(step + 1, prompts, rollout, experience, details)
        return metrics

    def _greedy(self, rollout: Rollout, step: int) -> Rollout:
        """Answer the prompts of a rollout with the likeliest tokens."""
        options = RolloutOptions.of(self.config, step=step)
        options = replace(options, rule=SamplingRule(temperature=0.0))
        return self.generator.generate(rollout.prompts, rollout.sample_indices, options)

    def _show(
        self,
        done: int,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        experience: Experience,
        details: Details,
    ) -> None:
        """Write samples and statistics of macro actions, of rank 0's replica."""
        count = min(self.config.logging.samples, len(prompts))
        texts = [prompt.prompt for prompt in prompts[:count]]
        samples = experience_samples(texts, rollout, experience, details, self.tokenizer)
        self.output.write_samples(done, samples)
        self.output.write_macro_actions(done, experience_actions(experience, details))

    def _adapt_kl_coef(self, metrics: Mapping[str, float]) -> None:
        """Steer the divergence from the reference to `ppo.kl_target`, if there is one."""
        ppo = self.config.ppo
        if ppo.kl_target is not None and "policy/kl" in metrics:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                metrics["policy/kl"],
                target=ppo.kl_target,
                horizon=ppo.kl_horizon,
                num_samples=self.config.rollout.trained_size,
            )

    def evaluate(self) -> dict[str, float]:
        """Judge the policy on held-out prompts and note it; nothing without a validation file."""
        if not self.inputs.validation:
            return {}
        with self.output.timers("evaluate"):
            judged = self.evaluator.judge(self.policy, self.roles.reference)
        self.last_results = self.since_start.metrics(judged.results)
        return self.last_results

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` PPO steps."""
        moments = self.builder.rewarder.shaper.moments
        self.rollouts.wait()
        state = {
            "step": done,
            **self.rollouts.state_dict(),
            "kl_coef": self.kl_coef,
            "reward_moments": [moments.count, moments.mean, moments.square_deviation],
            "first_results": self.since_start.state(),
            "fp8_left": self.fp8_guard.has_left,
            CONFIG: settings_of(self.config),
        }
        with self.roles.offload.on_device(*TRAINING):
            self.saver.save(done, self.kept, state)

    @property
    def kept(self) -> dict[str, Saveable]:
        """The models of a checkpoint: those that learn, and the weights of the mask policy."""
        mask: dict[str, Saveable] = {"mask": self.mask.chunks} if self.mask else {}
        return {**self.trained, **mask}

    def load(self, folder: Path) -> None:
        """Take policy and critic from a checkpoint of this run."""
        with self.roles.offload.on_device(*TRAINING):
            load(folder, self.trained, self.mesh)

    def export(self) -> None:
        """Write the policy and, if there is one, the critic as Hugging Face folders."""
        write = partial(export_hf, config=self.config, mesh=self.mesh, tokenizer=self.tokenizer)
        self.roles.offload.end()
        write(self.policy, target=self.config.run.dir / "hf")
        if self.roles.critic is not None:
            critic = [ddp.module for ddp in self.roles.critic.chunks]
            write(critic, target=self.config.run.dir / "hf_critic")

    def _resume(self) -> int:
        state = resume(self.config, "ppo", self.kept, self.mesh, required=_STATE)
        if state is None:
            return 0
        self.rollouts.load_state_dict(state)
        # A changed one counts from here on.
        if state[CONFIG]["ppo"]["kl_coef"] == self.config.ppo.kl_coef:
            self.kl_coef = float(state["kl_coef"])
        count, mean, square_deviation = state["reward_moments"]
        self.builder.rewarder.shaper.moments = RunningMoments(
            count=count, mean=mean, square_deviation=square_deviation
        )
        self.since_start.load_state(state.get("first_results"))
        if state.get("fp8_left"):
            self.fp8_guard.leave()
        return int(state["step"])

    def _rates(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return what the step's work and seconds make of it; takes the work out of `metrics`."""
        found = step_rates(
            metrics,
            self.output.timers,
            self.role_timers,
            generation_seconds=self.rollouts.generation_seconds,
            num_generating=self.rollouts.num_generating_ranks,
            num_training=self.mesh.world_size,
            device_name=self.mesh.platform.device_name,
        )
        self.role_timers.drain()
        found |= self.rollouts.metrics()
        if self.filter is not None:
            found |= self.filter.metrics
        if self.roles.offload.is_on:
            found["time/offload_seconds"] = self.roles.offload.drain_seconds()
        return found
