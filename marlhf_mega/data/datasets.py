"""Tokenised examples for supervised fine-tuning, preferences, prompts and offline RL.

A prompt that is too long is an error, is dropped, or loses its beginning; a response that is too
long loses its end. `LengthReport` counts both.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from marlhf_mega.config.sections.data import ControlTokens, LongPrompts
from marlhf_mega.config.sections.training import Turns
from marlhf_mega.data.files import SAFE, Row, Rows, is_conversation
from marlhf_mega.data.tokenizer import Messages, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to generate from."""

    prompt_ids: list[int]
    prompt: str
    """Text of the prompt, a chat after its template; code and HTTP rewards get this text."""
    row: Row
    """All fields of the row in the data file; rewards may need the others."""


@dataclass(frozen=True, kw_only=True)
class SupervisedExample:
    """A prompt with the response to imitate."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Ends with an end token unless it was cut off."""
    unlearned: list[int] = field(default_factory=list)
    """First and end position of each span of the response that the assistant did not write."""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    """By how much the chosen response is better; 0 if the row has no margin."""
    chosen_probability: float = 1.0
    """How likely the chosen response is the better one; 1 if the row has no soft label."""
    safe: list[bool] = field(default_factory=list)
    """Whether the chosen and the rejected response are harmless; empty if the row does not say."""
    from_reference: str = ""
    """The one that the reference gave, `chosen` or `rejected`; empty if the row does not say."""
    others: list[list[int]] = field(default_factory=list)
    """Token ids of still worse responses, in their order; of a ranking only."""
    rewards: list[float] = field(default_factory=list)
    """Of all its responses; of a ranking only."""
    user: str = ""
    """Whose preference it is; empty if the row does not say."""
    number: int = 0
    """Of a pair in a context: which one of the data it is."""
    context: list["PreferencePair"] = field(default_factory=list)
    """Other pairs of the same user, for a reward model that reads them."""

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of all responses, the best first."""
        return [self.chosen_ids, self.rejected_ids, *self.others]


@dataclass(frozen=True, kw_only=True)
class OfflineExample:
    """A response with its known reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    line: int
    """Of its row in the data file."""


_Answered = TypeVar("_Answered", SupervisedExample, OfflineExample)


@dataclass(kw_only=True)
class LengthReport:
    """What the length limits did to a dataset."""

    num_rows: int = 0
    num_dropped_prompts: int = 0
    num_truncated_prompts: int = 0
    num_truncated_responses: int = 0
    num_unscored: int = 0
    """Rows left out because their reward is null."""
    num_empty_responses: int = 0
    """Rows left out because generation was cut off before any token that has a text."""
    num_control_tokens: int = 0
    """Control tokens spelled out in messages and inside responses."""
    num_equal_pairs: int = 0
    """Preference pairs that were dropped because truncation made them equal."""

    @property
    def has_changes(self) -> bool:
        """Whether anything was dropped or truncated."""
        return any(count for name, count in asdict(self).items() if name != "num_rows")

    def __str__(self) -> str:
        """Give every count in one line."""
        text = (
            f"{self.num_rows} rows, {self.num_dropped_prompts} dropped (prompt too long), "
            f"{self.num_truncated_prompts} prompts truncated, "
            f"{self.num_truncated_responses} responses truncated"
        )
        if self.num_equal_pairs:
            text += f", {self.num_equal_pairs} equal pairs dropped"
        if self.num_unscored:
            text += f", {self.num_unscored} dropped (no reward)"
        if self.num_empty_responses:
            text += f", {self.num_empty_responses} dropped (no response)"
        if self.num_control_tokens:
            text += f", {self.num_control_tokens} control tokens spelled out in texts"
        return text


class NothingLeftError(ValueError):
    """None of the rows becomes an example."""


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """What a template wrote."""

    marked: str
    """With a mark inside every control token that a message spells out."""
    mark: str = ""
    """Empty where no message does."""

    @property
    def text(self) -> str:
        return self.marked.replace(self.mark, "") if self.mark else self.marked


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Turns checked rows into token ids within the length limits."""

    tokenizer: Tokenizer
    max_prompt_tokens: int
    max_response_tokens: int
    """Limit of a response, its end token included."""
    long_prompts: LongPrompts
    control_tokens: ControlTokens = "text"
    turns: Turns = "last"
    source: str
    """File name for messages."""
    report: LengthReport = field(default_factory=LengthReport)
    """Counts of everything built so far."""

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """Tokenise prompts; chats go through the tokenizer's template.

        Raises:
            ValueError: a prompt is empty, or too long with `long_prompts` = `error`, or no row is
                left.
        """
        return [prompt for prompt, _ in self._prompts(rows)]

    def _prompts(self, rows: Sequence[Row]) -> list[tuple[Prompt, str]]:
        """Tokenise prompts; returns each with its file and line."""
        places = [f"{self.source}:{line}" for line in _lines(rows)]
        rendered = [self._prompt_text(*pair) for pair in zip(rows, places, strict=True)]
        encoded = self._encode_rendered(rendered)
        bos = self.tokenizer.prompt_prefix
        prompts = []
        for row, chat, ids, where in zip(rows, rendered, encoded, places, strict=True):
            # The template of a chat holds the special tokens, and so does a text made with it.
            is_complete = not isinstance(row["prompt"], str) or ids[: len(bos)] == bos
            self._check_known(ids, f"{where}: prompt")
            kept = self._limit_prompt(ids if is_complete else [*bos, *ids], where)
            if kept is not None:
                prompts.append((Prompt(prompt_ids=kept, prompt=chat.text, row=row), where))
        self.report.num_rows += len(prompts)
        if not prompts:
            raise NothingLeftError(
                f"data.max_prompt_tokens={self.max_prompt_tokens}: must leave at least one row of "
                f"{self.source}; all {len(rows)} were dropped. Raise it, or change "
                "data.long_prompts."
            )
        return prompts

    def supervised(self, rows: Sequence[Row]) -> list[SupervisedExample]:
        """Tokenise `{prompt, response}` and `{messages}` rows.

        Raises:
            ValueError: as of `prompts`, or all turns of a chat are to be learned and the template
                writes earlier ones in another way than the last.
        """
        places = [f"{self.source}:{line}" for line in _lines(rows)]
        answered = [self._answered(*pair) for pair in zip(rows, places, strict=True)]
        prompts = self._prompts(Rows(answered, _lines(rows)))
        first = self._encode_answers([self._ending(p.row, "response") for p, _ in prompts])
        later = [turn for prompt, _ in prompts for turn in prompt.row["later"]]
        contexts = iter(self._encode_rendered([context for context, _ in later]))
        answers = iter(self._encode_answers([self._turn_ending(answer) for _, answer in later]))
        examples = []
        for (prompt, where), response in zip(prompts, first, strict=True):
            unlearned: list[int] = []
            for context in (next(contexts) for _ in prompt.row["later"]):
                unlearned += [len(response), len(response) + len(context)]
                response += [*context, *next(answers)]
            self._check_known(response, f"{where}: response")
            response = self._limit_response(response)
            examples.append(
                SupervisedExample(
                    prompt_ids=prompt.prompt_ids, response_ids=response, unlearned=unlearned
                )
            )
        return self._with_response(examples)

    def preferences(self, rows: Sequence[Row]) -> list[PreferencePair]:
        """Tokenise `{prompt, chosen, rejected}` rows; raises as `prompts` does.

        Pairs that differ only behind the limit of a response say nothing and are dropped.
        """
        prompts = self._prompts(rows)
        chosen = self._responses(prompts, "chosen")
        rejected = self._responses(prompts, "rejected")
        pairs = [
            PreferencePair(
                prompt_ids=prompt.prompt_ids,
                chosen_ids=chosen_ids,
                rejected_ids=rejected_ids,
                margin=float(_number(prompt.row, "margin", 0.0)),
                chosen_probability=float(_number(prompt.row, "chosen_probability", 1.0)),
                safe=[prompt.row[name] for name in SAFE if name in prompt.row],
                from_reference=prompt.row.get("from_reference", ""),
                user=str(prompt.row.get("user", "")),
            )
            for (prompt, _), chosen_ids, rejected_ids in zip(prompts, chosen, rejected, strict=True)
        ]
        different = [pair for pair in pairs if pair.chosen_ids != pair.rejected_ids]
        self.report.num_equal_pairs += len(pairs) - len(different)
        if pairs and not different:
            raise NothingLeftError(
                f"data.max_response_tokens={self.max_response_tokens}: makes the two responses of "
                f"every pair of {self.source} equal, so none is left. Raise it."
            )
        return different

    def ranked(self, rows: Sequence[Row]) -> list[PreferencePair]:
        """Tokenise `{prompt, responses, rewards}` rows, best first; raises as `prompts` does."""
        rankings, answers = [], []
        for prompt, where in self._prompts(rows):
            pairs = zip(prompt.row["rewards"], prompt.row["responses"], strict=True)
            ranking = sorted(pairs, key=lambda pair: -pair[0])
            rankings.append((prompt, [float(reward) for reward, _ in ranking]))
            asked = {"prompt": prompt.row["prompt"]}
            for _, text in ranking:
                answers.append((replace(prompt, row=asked | {"response": text}), where))
        encoded = iter(self._responses(answers, "response"))
        examples = []
        for prompt, rewards in rankings:
            chosen, rejected, *others = [next(encoded) for _ in rewards]
            examples.append(
                PreferencePair(
                    prompt_ids=prompt.prompt_ids,
                    chosen_ids=chosen,
                    rejected_ids=rejected,
                    margin=rewards[0] - rewards[1],
                    others=others,
                    rewards=rewards,
                )
            )
        return examples

    def offline(self, rows: Sequence[Row]) -> list[OfflineExample]:
        """Tokenise `{prompt, response, reward}` rows that have a reward; raises as `prompts` does.

        A null reward is that of a response that could not be scored.
        """
        (examples,) = self._rewarded(rows, response="reward")
        return self._with_response(examples)

    def offline_pairs(self, rows: Sequence[Row]) -> list[OfflineExample]:
        """Tokenise pairs that have both rewards; chosen and rejected responses alternate."""
        columns = self._rewarded(rows, chosen="chosen_reward", rejected="rejected_reward")
        return [example for pair in zip(*columns, strict=True) for example in pair]

    def _rewarded(self, rows: Sequence[Row], **rewards: str) -> list[list[OfflineExample]]:
        """Tokenise the responses of each field, given with the field of its rewards."""
        prompts = self._prompts(self._scored(rows, rewards.values()))
        return [
            [
                OfflineExample(
                    prompt_ids=prompt.prompt_ids,
                    response_ids=response,
                    reward=float(prompt.row[reward]),
                    line=int(where.rpartition(":")[2]),
                )
                for (prompt, where), response in zip(
                    prompts, self._responses(prompts, name), strict=True
                )
            ]
            for name, reward in rewards.items()
        ]

    def _with_response(self, examples: list[_Answered]) -> list[_Answered]:
        """Leave out and count examples whose response has no token, which teach nothing."""
        kept = [example for example in examples if example.response_ids]
        self.report.num_empty_responses += len(examples) - len(kept)
        if not kept:
            raise ValueError(
                f"{self.source}: response: must have a token in at least one row; all "
                f"{len(examples)} are empty and not finished. Give other rows."
            )
        return kept

    def _scored(self, rows: Sequence[Row], names: Collection[str]) -> Rows:
        """Leave out and count the rows without a reward in each of these fields."""
        pairs = zip(rows, _lines(rows), strict=True)
        kept = [(row, line) for row, line in pairs if all(row[n] is not None for n in names)]
        self.report.num_unscored += len(rows) - len(kept)
        if not kept:
            raise NothingLeftError(
                f"{self.source}: {', '.join(names)}: must be a number in at least one row; all "
                f"{len(rows)} are null. Find out why none could be scored."
            )
        return Rows([row for row, _ in kept], [line for _, line in kept])

    def _prompt_text(self, row: Row, where: str) -> _Rendered:
        prompt: str | list[dict[str, Any]] = row["prompt"]
        if isinstance(prompt, str):
            return _Rendered(marked=prompt)
        messages, mark = self._marked(prompt)
        return _Rendered(marked=self._render(messages, where), mark=mark)

    def _marked(self, messages: Messages) -> tuple[Messages, str]:
        """Put a mark into the control tokens that messages spell out, unless these are parsed."""
        if self.control_tokens == "parse":
            return messages, ""
        return self.tokenizer.mark_control_tokens(messages)

    def _encode_rendered(self, rendered: Sequence[_Rendered]) -> list[list[int]]:
        """Encode what a template wrote; control tokens that messages spell out are text."""
        encoded = self.tokenizer.encode_batch([chat.marked for chat in rendered])
        for index, chat in enumerate(rendered):
            if chat.mark and chat.mark in chat.marked:
                self.report.num_control_tokens += chat.marked.count(chat.mark)
                encoded[index] = self.tokenizer.encode_marked(chat.marked, chat.mark)
        return encoded

    def _check_known(self, ids: Sequence[int], where: str) -> None:
        """Refuse a text with a token that the tokenizer has and the model does not."""
        size = self.tokenizer.num_known
        if size < self.tokenizer.vocab_size and max(ids, default=0) >= size:
            index = next(i for i in ids if i >= size)
            raise ValueError(
                f"{where}: must have tokens of the model only, of which there are {size}; "
                f"{self.tokenizer.piece(index)!r} is id {index}. Remove it, or use a model that "
                "has it."
            )

    def _render(self, messages: Messages, where: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _limit_prompt(self, ids: list[int], where: str) -> list[int] | None:
        limit = self.max_prompt_tokens
        if not ids:
            raise ValueError(
                f"{where}: prompt: must have at least one token; it is empty, and this tokenizer "
                "adds none. Write a prompt, or remove the row."
            )
        if len(ids) <= limit:
            return ids
        match self.long_prompts:
            case "error":
                raise ValueError(
                    f"data.max_prompt_tokens={limit}: must fit every prompt; that of "
                    f"{where} has {len(ids)} tokens. Raise it, or set data.long_prompts to "
                    "drop or truncate."
                )
            case "drop":
                self.report.num_dropped_prompts += 1
                return None
            case "truncate":
                self.report.num_truncated_prompts += 1
                # Models trained with a begin-of-sequence token rely on it.
                num_kept_in_front = int(ids[0] == self.tokenizer.bos_id)
                return ids[:num_kept_in_front] + ids[len(ids) - limit + num_kept_in_front :]

    def _answered(self, row: Row, where: str) -> Row:
        """Return what is asked, the first response to learn, and later pairs (context, answer)."""
        if not is_conversation(row):
            kept = {name: row[name] for name in ("prompt", "response", "finished") if name in row}
            return kept | {"later": []}
        messages, last = row["messages"], len(row["messages"]) - 1
        answers = [i for i in range(1, last + 1) if messages[i]["role"] == "assistant"]
        first, *rest = answers if self.turns == "all" else [last]
        marked, mark = self._marked(messages)
        later, previous = [], first
        for index in rest:
            between = self._between(marked, previous, index, where)
            later.append((_Rendered(marked=between, mark=mark), _content(messages[index])))
            previous = index
        return {"prompt": messages[:first], "response": _content(messages[first]), "later": later}

    def _between(self, messages: Messages, previous: int, index: int, where: str) -> str:
        """Return what the template writes between two answers of a chat."""
        before, whole = (self._render(messages[:count], where) for count in (previous, index))
        end, answer = self.tokenizer.turn_end, _content(messages[previous])
        for text in (answer, answer.strip()):
            written = before + text + end.text + self.tokenizer.piece(end.id)
            if whole.startswith(written):
                return whole.removeprefix(written)
        raise ValueError(
            f"{where}: messages[{previous}]: sft.turns=all needs a chat template that writes "
            "earlier answers as the last one; this one changes it. Use sft.turns=last."
        )

    def _responses(self, prompts: Sequence[tuple[Prompt, str]], name: str) -> list[list[int]]:
        encoded = self._encode_answers([self._ending(prompt.row, name) for prompt, _ in prompts])
        for ids, (_, where) in zip(encoded, prompts, strict=True):
            self._check_known(ids, f"{where}: {name}")
        return [self._limit_response(ids) for ids in encoded]

    def _limit_response(self, ids: list[int]) -> list[int]:
        limit = self.max_response_tokens
        self.report.num_truncated_responses += len(ids) > limit
        return ids[:limit]

    def _encode_answers(self, answers: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
        """Encode texts, each followed by the token that ends it, if any."""
        texts = [text for text, _ in answers]
        as_text, as_tokens = (
            self.tokenizer.encode_batch(texts, control_tokens=parsed) for parsed in (False, True)
        )
        count = self.tokenizer.count_control_tokens
        self.report.num_control_tokens += sum(map(count, as_tokens)) - sum(map(count, as_text))
        encoded = as_tokens if self.control_tokens == "parse" else as_text
        return [[*ids, *end] for ids, (_, end) in zip(encoded, answers, strict=True)]

    def _ending(self, row: Row, name: str) -> tuple[str, list[int]]:
        """Return a response's text, and the token that ends it; none ends what was cut off."""
        text: str = row[name]
        if name == "response" and row.get("finished") is False:
            return text, []
        if not isinstance(row["prompt"], str):
            return self._turn_ending(text)
        text, written_out = self.tokenizer.split_end(text)
        return text, [self.tokenizer.eos_id if written_out is None else written_out]

    def references(self, prompt: Prompt, name: str) -> list[list[int]]:
        """Tokenise the responses that a prompt's row holds in a field: a text, a list, or none."""
        found = prompt.row.get(name) or []
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"reward.reference_field={name}: must name a text or a list of texts in every row; "
                f"one has {found!r:.60}. Fix the data, or name another field."
            )
        endings = [self._ending({**prompt.row, name: text}, name) for text in texts]
        return [ids[: self.max_response_tokens] for ids in self._encode_answers(endings)]

    def _turn_ending(self, text: str) -> tuple[str, list[int]]:
        """Return an answer in a chat, and the token that ends it."""
        text, written_out = self.tokenizer.split_end(text)
        if written_out is not None:
            return text, [written_out]
        end = self.tokenizer.turn_end
        return text + end.text, [end.id]


def _lines(rows: Sequence[Row]) -> Sequence[int]:
    return rows.lines if isinstance(rows, Rows) else range(1, len(rows) + 1)


def _number(row: Row, name: str, default: float) -> float:
    value: float | None = row.get(name)
    return default if value is None else value


def _content(message: Mapping[str, Any]) -> str:
    content: str = message["content"]
    return content
