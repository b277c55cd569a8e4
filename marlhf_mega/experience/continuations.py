"""Values by trying: the scores of responses that continue from where macro actions start."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.continuations import continuation_values
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.experience.rewarding import Rewarder
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import Rollout, RolloutOptions

CONTINUATION_STEP = 1 << 41
"""Added to the step, keeps the draws of continuations apart from those of samples."""


class Continuations:
    """Tries what the policy makes of the beginnings of its responses, for `vine`."""

    def __init__(
        self, config: Config, generator: ResponseGenerator, rewarder: Rewarder, mesh: Mesh
    ) -> None:
        self.config, self.generator = config, generator
        self.rewarder, self.mesh = rewarder, mesh

    def values(
        self,
        rollout: Rollout,
        rows: Sequence[Mapping[str, Any]],
        actions: MacroActions,
        *,
        compared: Tensor | None,
        step: int,
        sums: MetricSums,
    ) -> Tensor:
        """Return what the starts of macro actions are worth: [batch, macro], NaN if unknown.

        All ranks call it.

        Args:
            rollout: this replica's responses.
            rows: the data row of each prompt.
            actions: of the responses.
            compared: [batch, count] scores of reference responses, if rewards are shaped by them.
            step: of the run.
            sums: takes metrics.
        """
        lengths = actions.lengths
        places = (lengths > 0).flatten().nonzero()[:, 0]
        places = places.repeat_interleave(self.config.ppo.vine_samples)
        samples = (places // max(lengths.size(1), 1)).tolist()
        cuts = (lengths.cumsum(1) - lengths).flatten()[places].tolist()
        begun = [rollout.responses[i][:cut] for i, cut in zip(samples, cuts, strict=True)]
        prompts = [rollout.prompts[i] for i in samples]
        found = self._continue(rollout, prompts, begun, samples, step=step)
        if self.mesh.reports_metrics:
            new = torch.tensor([float(len(response)) for response in found.responses])
            sums.add_mean("rollout/continuation_tokens", new)
        scores = self.rewarder.reward_others(
            replace(
                found,
                prompts=prompts,
                responses=[a + b for a, b in zip(begun, found.responses, strict=True)],
            ),
            [rows[i] for i in samples],
            compared=None if compared is None else compared[samples],
        )
        return continuation_values(scores, places, actions)

    def _continue(
        self,
        rollout: Rollout,
        prompts: Sequence[list[int]],
        begun: Sequence[list[int]],
        samples: Sequence[int],
        *,
        step: int,
    ) -> Rollout:
        """Generate on from what is begun, up to the longest response.

        A draw depends on the sample's global index, on where it is continued and for which time.
        """
        settings, often = self.config.rollout, self.config.ppo.vine_samples
        longest = settings.max_response_tokens
        indices, limits = [], {}
        for number, (sample, tokens) in enumerate(zip(samples, begun, strict=True)):
            cut = rollout.sample_indices[sample] * longest + len(tokens)
            indices.append(cut * often + number % often)
            limits[indices[-1]] = longest - len(tokens)
        # Other replicas may generate them.
        everyones: dict[int, int] = {}
        for part in gather_objects(limits, self.mesh.groups.dp):
            everyones |= part
        slots = settings.slots or -(-settings.batch_size // self.generator.mesh.dp_size)
        step += CONTINUATION_STEP
        options = RolloutOptions.of(self.config, step=step, slots=slots, masked=True)
        options = replace(options, max_response_tokens=everyones)
        together = [prompt + tokens for prompt, tokens in zip(prompts, begun, strict=True)]
        return self.generator.generate(together, indices, options)
