"""What a prompt is worth to offline RL: a head on a frozen model learns it from greedy answers."""

import copy
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.data.datasets import OfflineExample
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.stream import SampleStream, SourcePart
from marlhf_mega.experience.evaluation import Evaluator
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import prompt_batches, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.prompt_value import PromptValue
from marlhf_mega.models.train_state import lr_schedule
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.build import build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import critic_origin, policy_origin, reward_origins
from marlhf_mega.update.skipped import keep_skipped

logger = logging.getLogger(__name__)


def frozen_body(
    inputs: Inputs[OfflineExample], policy: Sequence[StageModel], mesh: Mesh
) -> Sequence[StageModel]:
    """Return the model of `critic.init`, whose states tell what a prompt is worth."""
    config = inputs.config
    origin = critic_origin(config, inputs.tokenizer, reward_origins(config, inputs.tokenizer))
    if origin is None or origin == policy_origin(config):
        return policy
    return build_model(origin.model, config, mesh, origin=origin, name="critic", frozen=True)


def learn_values(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    body: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
    watchdog: Watchdog,
) -> PromptValue:
    """Learn the scores of the policy's greedy answers from the states of the prompts alone."""
    config, settings = inputs.config, inputs.config.offline
    watchdog.enter("rollout", times=-(-len(inputs.validation) // config.rollout.batch_size))
    scores = torch.tensor(_greedy_scores(inputs, policy, evaluator, mesh))
    scored = (~scores.isnan()).nonzero()[:, 0]
    if not len(scored):
        path = show_sources(config.data.validation_path)
        raise RuntimeError(
            f"data.validation_path={path}: must have a prompt whose answer can be scored; none of "
            f"{len(scores)} has a score. Look at reward.source."
        )
    values = PromptValue(
        body[0].model.hidden_size,
        low=scores[scored].min().item(),
        high=scores[scored].max().item(),
        seed=config.run.seed,
        device=mesh.device,
    )

    def states_of(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        prompts = [inputs.validation[i].prompt_ids for i in scored[list(chosen)].tolist()]
        return _prompt_states(body, prompts, MicrobatchLimit.of(config.offline), mesh)

    num_steps = settings.value_epochs * -(-len(scored) // settings.batch_size)
    watchdog.enter("update", times=num_steps)
    fit(values, scores[scored], states_of, config, mesh)
    return values


def fit(
    values: PromptValue,
    scores: Tensor,
    states_of: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    config: Config,
    mesh: Mesh,
) -> None:
    """Fit values to scores by squared error; leaves the weights of the epoch with the least.

    An epoch's error is that of its steps, as in the paper's code. All ranks call it.

    Args:
        values: changed, in the same way on all ranks.
        scores: [prompts] on the CPU.
        states_of: numbers of prompts -> their states [chosen, prompt, hidden] and mask.
        config: of the run; `critic` has the optimizer.
        mesh: this rank's mesh.
    """
    settings, critic, count = config.offline, config.critic, len(scores)
    optimizer = torch.optim.AdamW(
        values.parameters(),
        betas=(critic.beta1, critic.beta2),
        eps=critic.eps,
        weight_decay=critic.weight_decay,
    )
    steps_per_epoch = -(-count // settings.batch_size)
    schedule = lr_schedule(optimizer, critic, settings.value_epochs * steps_per_epoch)
    epochs = SampleStream(
        [SourcePart(count)], batch_size=count, seed=config.run.seed, shuffle=True, data_hash=""
    )
    least, kept, best = math.inf, 0, values.state_dict()
    num_steps = num_skipped = 0
    for epoch in range(1, settings.value_epochs + 1):
        total, num_counted = 0.0, 0
        for chosen in epochs.next_batch().split(settings.batch_size):
            optimizer.zero_grad()
            error = _add_gradients(values, scores, chosen, states_of, mesh)
            norm = clip_grad_norm_(values.parameters(), critic.grad_clip or math.inf)
            num_steps += 1
            if not norm.isfinite():
                num_skipped += 1
                rows = {"prompts": chosen}
                keep_skipped(num_skipped, rows, config, mesh, role="critic", step=num_steps - 1)
                continue
            num_skipped = 0
            schedule.step(increment=1)
            optimizer.step()
            total, num_counted = total + error, num_counted + len(chosen)
        mean = total / num_counted if num_counted else math.inf
        logger.info("offline: values, epoch %d: mean squared error %.4g", epoch, mean)
        if mean < least:
            least, kept, best = mean, epoch, copy.deepcopy(values.state_dict())
    values.load_state_dict(best)
    logger.info(
        "offline: values of epoch %d are kept, mean squared error %.4g over %d greedy answers",
        kept,
        least,
        count,
    )


def _add_gradients(
    values: PromptValue,
    scores: Tensor,
    chosen: Tensor,
    states_of: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    mesh: Mesh,
) -> float:
    """Set the gradients of the mean squared error of all ranks; returns the sum of the squares."""
    own = chosen[mesh.dp_rank :: mesh.dp_size]
    states, mask = states_of(own.tolist())
    error = torch.zeros((), device=mesh.device)
    if len(own):  # the last batch of an epoch may have fewer prompts than there are replicas
        error = (values(states, mask) - scores[own].to(mesh.device)).square().sum()
        error.backward()
    for parameter in values.parameters():
        own_part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = sum_over_data(own_part, mesh) / len(chosen)
    return float(sum_over_data(error.detach(), mesh))


def _prompt_states(
    body: Sequence[StageModel], prompts: Sequence[list[int]], limit: MicrobatchLimit, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Return the states of prompts, float32 [prompts, prompt, hidden], and their mask."""

    def forward(chunk: StageModel, batch: SequenceBatch) -> Tensor:
        states = chunk.states(batch)
        return states.permute(2, 0, 1) if chunk.post_process else states

    batches = prompt_batches(prompts, limit=limit, mesh=mesh)
    states = run_forward(body, batches, forward, leading=(body[0].model.hidden_size,))
    lengths = torch.tensor(batches.response_lengths, dtype=torch.int64, device=mesh.device)
    mask = torch.arange(states.shape[-1], device=mesh.device) < lengths[:, None]
    return states.permute(1, 2, 0), mask


def values_of(
    body: Sequence[StageModel],
    values: PromptValue,
    prompts: Sequence[list[int]],
    limit: MicrobatchLimit,
    mesh: Mesh,
) -> Tensor:
    """Return what prompts are worth, float32 [prompts, 1]."""

    def forward(chunk: StageModel, batch: SequenceBatch) -> Tensor:
        states = chunk.states(batch)
        if not chunk.post_process:
            return states
        return values(states.float(), batch.response_mask)[:, None]

    return run_forward(body, prompt_batches(prompts, limit=limit, mesh=mesh), forward)[:, :1]


def _greedy_scores(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
) -> list[float]:
    """Return the score of the most likely answer to every validation prompt, NaN without one."""
    settings = inputs.config.evaluate.model_copy(
        update={
            "temperature": 0.0,
            "num_prompts": len(inputs.validation),
            "samples_per_prompt": 1,
            "gold": None,
        }
    )
    config = inputs.config.model_copy(update={"evaluate": settings})
    greedy = Evaluator(
        config,
        inputs.validation,
        inputs.tokenizer,
        evaluator.scorer,
        evaluator.generator,
        mesh,
        limit=evaluator.limit,
    )
    return greedy.judge(policy, None).scores
