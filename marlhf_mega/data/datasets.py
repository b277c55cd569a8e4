"""Tokenised examples for supervised fine-tuning, preferences, prompts and offline RL.

A prompt that is too long is an error, is dropped, or loses its beginning; a response that is too
long loses its end. Both are counted in the `LengthReport` that comes with every data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from marlhf_mega.data.files import Row
from marlhf_mega.data.tokenizer import Tokenizer

LongPrompts = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to generate from."""

    prompt_ids: list[int]
    prompt: str
    """Text of the prompt, a chat after its template; reward rules get this text."""
    row: Row
    """All fields of the row; reward rules may need the others."""


@dataclass(frozen=True, kw_only=True)
class SupervisedExample:
    """A prompt with the response to imitate."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Ends with the end-of-sequence id unless it was truncated."""

    @property
    def sequence(self) -> list[int]:
        """Prompt and response ids."""
        return self.prompt_ids + self.response_ids

    @property
    def response_mask(self) -> list[bool]:
        """True at the tokens of `sequence` that the loss counts."""
        return [False] * len(self.prompt_ids) + [True] * len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    """How much better the chosen response is said to be; 0 where the row says nothing."""


@dataclass(frozen=True, kw_only=True)
class OfflineExample:
    """A response with its known reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float


@dataclass(kw_only=True)
class LengthReport:
    """What the length limits did to a data set."""

    num_rows: int = 0
    num_dropped_prompts: int = 0
    num_truncated_prompts: int = 0
    num_truncated_responses: int = 0

    @property
    def has_changes(self) -> bool:
        """Whether any row was left out or cut."""
        changed = self.num_dropped_prompts + self.num_truncated_prompts
        return changed + self.num_truncated_responses > 0

    def __str__(self) -> str:
        """Name every count in one line."""
        return (
            f"{self.num_rows} rows, {self.num_dropped_prompts} dropped (prompt too long), "
            f"{self.num_truncated_prompts} prompts truncated, "
            f"{self.num_truncated_responses} responses truncated"
        )


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Turns checked rows into token ids under the length limits."""

    tokenizer: Tokenizer
    max_prompt_tokens: int
    max_response_tokens: int
    """Limit of a response, its end-of-sequence token included."""
    long_prompts: LongPrompts
    source: str
    """File name for messages."""
    report: LengthReport = field(default_factory=LengthReport)
    """Counts over everything built so far."""

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """Tokenise prompt rows; chats go through the tokenizer's template.

        Raises:
            ValueError: when a prompt is empty, or too long and the policy is `error`, or no row is
                left.
        """
        texts = [self._prompt_text(row["prompt"]) for row in rows]
        encoded = self.tokenizer.encode_batch(texts)
        bos = self.tokenizer.prompt_prefix
        prompts = []
        for number, (row, text, ids) in enumerate(zip(rows, texts, encoded, strict=True), start=1):
            is_chat = not isinstance(row["prompt"], str)  # its template holds the special tokens
            kept = self._limit_prompt(ids if is_chat else [*bos, *ids], number)
            if kept is not None:
                prompts.append(Prompt(prompt_ids=kept, prompt=text, row=row))
        self.report.num_rows += len(prompts)
        if not prompts:
            raise ValueError(
                f"data.max_prompt_tokens={self.max_prompt_tokens}: must leave at least one row of "
                f"{self.source}; all {len(rows)} were dropped. Raise it, or change "
                "data.long_prompts."
            )
        return prompts

    def supervised(self, rows: Sequence[Row]) -> list[SupervisedExample]:
        """Tokenise `{prompt, response}` rows; raises as `prompts` does."""
        prompts = self.prompts(rows)
        responses = self._responses(prompts, "response")
        return [
            SupervisedExample(prompt_ids=prompt.prompt_ids, response_ids=response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def preferences(self, rows: Sequence[Row]) -> list[PreferencePair]:
        """Tokenise `{prompt, chosen, rejected}` rows; raises as `prompts` does."""
        prompts = self.prompts(rows)
        chosen = self._responses(prompts, "chosen")
        rejected = self._responses(prompts, "rejected")
        return [
            PreferencePair(
                prompt_ids=prompt.prompt_ids,
                chosen_ids=chosen_ids,
                rejected_ids=rejected_ids,
                margin=float(prompt.row.get("margin", 0.0)),
            )
            for prompt, chosen_ids, rejected_ids in zip(prompts, chosen, rejected, strict=True)
        ]

    def offline(self, rows: Sequence[Row]) -> list[OfflineExample]:
        """Tokenise `{prompt, response, reward}` rows; raises as `prompts` does."""
        prompts = self.prompts(rows)
        responses = self._responses(prompts, "response")
        return [
            OfflineExample(
                prompt_ids=prompt.prompt_ids,
                response_ids=response,
                reward=float(prompt.row["reward"]),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _prompt_text(self, prompt: str | list[dict[str, str]]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.apply_chat_template(prompt)

    def _limit_prompt(self, ids: list[int], number: int) -> list[int] | None:
        limit = self.max_prompt_tokens
        if not ids:
            raise ValueError(
                f"{self.source}: the prompt of row {number} must have at least one token; it is "
                "empty, and this tokenizer puts none in front. Write a prompt, or drop the row."
            )
        if len(ids) <= limit:
            return ids
        match self.long_prompts:
            case "error":
                raise ValueError(
                    f"data.max_prompt_tokens={limit}: must hold every prompt; row {number} of "
                    f"{self.source} has {len(ids)} tokens. Raise it, or set data.long_prompts to "
                    "drop or truncate."
                )
            case "drop":
                self.report.num_dropped_prompts += 1
                return None
            case "truncate":
                self.report.num_truncated_prompts += 1
                # Models trained with a begin-of-sequence token rely on finding it in front.
                num_kept_in_front = int(ids[0] == self.tokenizer.bos_id)
                return ids[:num_kept_in_front] + ids[len(ids) - limit + num_kept_in_front :]

    def _responses(self, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
        responses = self.tokenizer.encode_batch([p.row[name] for p in prompts], add_eos=True)
        limit = self.max_response_tokens
        self.report.num_truncated_responses += sum(len(ids) > limit for ids in responses)
        return [ids[:limit] for ids in responses]
