"""Turn scored responses into preference pairs or demonstrations, and known data sets into pairs.

    python tools/pairs.py pairs.jsonl runs/answers/responses/*.jsonl
    python tools/pairs.py pairs.jsonl --rule all --min-gap 0.5 --margins answers.jsonl
    python tools/pairs.py demos.jsonl --rule above --threshold 90% answers.jsonl
    python tools/pairs.py pairs.jsonl hf://Skywork/Skywork-Reward-Preference-80K-v0.2:train

The fields of a row tell what it is: an answer that `marlhf generate` has scored (those to a prompt
adjacent); a prompt with all its completions as in UltraFeedback; or a pair as in Skywork's data and
the binarized UltraFeedback (message lists) or Okapi (instruction, input and two outputs).

Rules for scored responses: best_worst, a pair of each prompt; all, every pair of different scores;
tree, a pair wherever responses that began with the same words part (the best response of the best
branch and the worst of the worst one, branches judged by their mean score); best, the best response
to each prompt as a demonstration for sft; above, every response with at least a score.

Responses without a score take no part. Exit codes: 0 done, 2 wrong usage or data.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from marlhf_mega import durable
from marlhf_mega.config.checks import check_folder
from marlhf_mega.data.files import read_objects
from marlhf_mega.data.messages import with_text_answers

Row = dict[str, Any]
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|\d+(\.\d+)?%")


class Answer(NamedTuple):
    """A response with a score."""

    text: str
    score: float


class Group(NamedTuple):
    """The scored responses to a prompt."""

    fields: Row
    """Of the prompt, besides responses and scores."""
    answers: list[Answer]
    num_unscored: int


class Pair(NamedTuple):
    """A chosen and a rejected response with what else is in their row."""

    row: Row
    gap: float | None
    """Difference of their scores, where these are known."""
    place: str
    """Where it is from."""


def read(path: str) -> Iterator[tuple[str, Row]]:
    """Yield the place and the content of every row, also of a .json file that holds one list.

    Raises:
        ValueError: the file cannot be read.
    """
    if not path.endswith(".json"):
        yield from ((f"{path}:{line}", row) for line, row in read_objects(path))
        return
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: must be a JSON file; {error}. Check the path.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: must be a list of objects; it is something else. Convert it.")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def read_groups(path: str) -> Iterator[Group | Pair]:
    """Yield the responses to every prompt, or the pairs, of a file.

    Raises:
        ValueError: a row is of no known layout.
    """
    # Rows with several responses are groups of their own.
    rows = enumerate(read(path))
    for _, found in groupby(rows, key=lambda item: _group_key(*item)):
        adjacent = [place_and_row for _, place_and_row in found]
        place, row = adjacent[0]
        if "completions" in row:
            completions = row["completions"]
            answers = [_answer(c, place, "response", "overall_score") for c in completions]
            yield _group({"prompt": _text(row, place, "instruction")}, answers)
        elif {"response", "reward", "prompt"} <= row.keys():
            answers = [_answer(r, p, "response", "reward") for p, r in adjacent]
            left = {"response", "reward", "finished"}
            fields = {name: value for name, value in row.items() if name not in left}
            yield _group(fields, answers)
        else:
            yield _known_pair(row, place)


def _group_key(number: int, item: tuple[str, Row]) -> object:
    row = item[1]
    return json.dumps(row["prompt"]) if "reward" in row and "prompt" in row else number


def _known_pair(row: Row, place: str) -> Pair:
    if "prefered_output" in row:  # spelled so in Okapi's files
        asked = [_text(row, place, "instruction"), row.get("input") or ""]
        pair = {"prompt": "\n\n".join(filter(None, asked))}
        for name, theirs in (("chosen", "prefered_output"), ("rejected", "rejected_output")):
            pair[name] = _text(row, place, theirs)
        return Pair(pair, None, place)
    if not {"chosen", "rejected"} <= row.keys():
        raise ValueError(
            f"{place}: must have prompt, response and reward, or the fields of UltraFeedback, "
            f"Skywork or Okapi; the row has: {', '.join(sorted(row)) or 'none'}. Rename them."
        )
    pair = with_text_answers(row, where=place)
    for name in ("chosen", "rejected"):
        _text(pair, place, name)
    if "prompt" not in pair:
        raise ValueError(f"{place}: prompt: missing; chosen and rejected are texts. Add it.")
    gap, scores = None, ("score_chosen", "score_rejected")
    if set(scores) <= row.keys():
        chosen, rejected = (_number(row, place, name) for name in scores)
        gap = chosen - rejected
    kept = ("prompt", "chosen", "rejected", "source", "margin")
    return Pair({name: pair[name] for name in kept if name in pair}, gap, place)


def _answer(row: object, place: str, text: str, score: str) -> Answer | None:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: completions: must be objects; got {row!r:.40}. Fix the row.")
    if row.get(score) is None:
        return None
    return Answer(_text(row, place, text), _number(row, place, score))


def _group(fields: Row, answers: Sequence[Answer | None]) -> Group:
    """Leave out what has no score, and what another response says too: the first score counts."""
    found = [answer for answer in answers if answer is not None]
    different = {answer.text: answer for answer in reversed(found)}
    kept = [answer for answer in found if different[answer.text] is answer]
    return Group(fields, kept, len(answers) - len(found))


def _text(row: Row, place: str, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"{place}: {name}: must be text; got {row.get(name)!r:.40}. Fix the row.")
    return str(row[name])


def _number(row: Row, place: str, name: str) -> float:
    value = row[name]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}: {name}: must be a finite number; got {value!r:.40}. Fix it.")
    return number


Two = tuple[Answer, Answer]
"""A better and a worse response."""


def best_worst(answers: Sequence[Answer]) -> Iterator[Two]:
    """Yield the best and the worst response."""
    yield from _two(answers, answers)


def every_pair(answers: Sequence[Answer]) -> Iterator[Two]:
    """Yield all pairs of different scores."""
    for pair in combinations(answers, 2):
        yield from _two(pair, pair)


def tree(answers: Sequence[Answer]) -> Iterator[Two]:
    """Yield a pair for every place where responses that began with the same words part.

    After reward models of tree-structured preferences (arXiv 2402.10184), whose responses are
    generated as a tree; here it is the one that independent samples happen to form.
    """
    yield from _part([(answer.text.split(), answer) for answer in answers], 0)


def _part(leaves: Sequence[tuple[list[str], Answer]], depth: int) -> Iterator[Two]:
    """Yield the pairs of responses whose first `depth` words are the same."""
    branches: dict[str | None, list[tuple[list[str], Answer]]] = {}
    while len(branches) < 2:
        if len(leaves) < 2 or None in branches:  # alone, or they differ in blanks only
            return
        branches = {}
        for words, answer in leaves:
            word = words[depth] if depth < len(words) else None
            branches.setdefault(word, []).append((words, answer))
        depth += 1
    values = [[answer for _, answer in branch] for branch in branches.values()]
    yield from _two(max(values, key=_mean), min(values, key=_mean))
    for branch in branches.values():
        yield from _part(branch, depth)


def _two(good: Sequence[Answer], bad: Sequence[Answer]) -> Iterator[Two]:
    """Yield the best of some responses and the worst of others, if it is worse."""
    if good and bad:
        chosen, rejected = max(good, key=_score), min(bad, key=_score)
        if chosen.score > rejected.score:
            yield chosen, rejected


def _mean(answers: Sequence[Answer]) -> float:
    return sum(map(_score, answers)) / len(answers)


def _score(answer: Answer) -> float:
    return answer.score


PAIRING = {"best_worst": best_worst, "all": every_pair, "tree": tree}
RULES = (*PAIRING, "best", "above")


def rows_of(found: Group | Pair, options: argparse.Namespace, threshold: float) -> Iterator[Row]:
    """Yield the rows that a prompt's responses, or a pair, are made into.

    Raises:
        ValueError: a rule for scored responses is asked for, and this is a pair.
    """
    match found, options.rule:
        case Pair(), None:
            yield from _with_gap(found.row, found.gap, options)
        case Pair(), rule:
            raise ValueError(
                f"--rule={rule}: needs scored responses; {found.place} is a pair. Remove it."
            )
        case Group(), "best" | "above" as rule:
            best = max(found.answers, key=_score, default=None)
            for answer in found.answers:
                if answer is best if rule == "best" else answer.score >= threshold:
                    yield found.fields | {"response": answer.text, "reward": answer.score}
        case Group(), rule:
            for chosen, rejected in PAIRING[rule or "best_worst"](found.answers):
                row = found.fields | {"chosen": chosen.text, "rejected": rejected.text}
                yield from _with_gap(row, chosen.score - rejected.score, options)


def _with_gap(row: Row, gap: float | None, options: argparse.Namespace) -> Iterator[Row]:
    if gap is None or gap >= options.min_gap:
        yield row | ({"margin": gap} if options.margins and gap is not None else {})


def threshold_of(text: str, paths: Sequence[str]) -> float:
    """Return a score, or the lowest that belongs to the best responses: `90%` are below it."""
    if not text.endswith("%"):
        return float(text)
    groups = (found for path in paths for found in read_groups(path))
    scores = sorted(a.score for group in groups if isinstance(group, Group) for a in group.answers)
    place = math.floor(float(text[:-1]) / 100 * len(scores))
    return scores[min(place, len(scores) - 1)] if scores else 0.0


def convert(options: argparse.Namespace) -> str:
    """Write the rows; return what has been done.

    Raises:
        ValueError: a file cannot be read or is written to, or there is nothing to write.
    """
    if str(options.out) in options.files:
        raise ValueError(f"{options.out}: must not be read and written. Name another file.")
    check_folder(options.out.parent, key="out")
    above = options.rule == "above"
    threshold = threshold_of(options.threshold, options.files) if above else 0.0
    num_rows = num_groups = num_empty = num_unscored = 0
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("rows read")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with (
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
        durable.replacing(options.out) as partial,
        partial.open("w", encoding="utf-8") as file,
    ):
        for path in options.files:
            task = progress.add_task(path, total=None)
            for found in read_groups(path):
                before = num_rows
                for row in rows_of(found, options, threshold):
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                    num_rows += 1
                num_groups += 1
                num_empty += num_rows == before
                num_unscored += found.num_unscored if isinstance(found, Group) else 0
                progress.advance(task)
        if not num_rows:
            raise ValueError(
                f"{options.out}: no row to write; {num_groups} prompts gave none, and "
                f"{num_unscored} responses have no score. Generate more, or lower the limits."
            )
    what = "demonstrations" if options.rule in ("best", "above") else "pairs"
    reached = f" of at least {threshold:.4g}" if above else ""
    return (
        f"{options.out}: {num_rows} {what}{reached} from {num_groups} prompts; {num_empty} gave "
        f"none; {num_unscored} responses had no score"
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file to write, .jsonl")
    parser.add_argument(
        "files", nargs="+", help=".jsonl, .jsonl.gz, .json, .parquet or hf://NAME:SPLIT"
    )
    parser.add_argument("--rule", choices=RULES, help="see above (default: best_worst)")
    parser.add_argument(
        "--min-gap",
        type=float,
        default=0.0,
        help="pairs: smallest difference of the scores (default: any)",
    )
    parser.add_argument(
        "--margins", action="store_true", help="pairs: write this difference as margin"
    )
    parser.add_argument(
        "--threshold",
        default="",
        metavar="T",
        help="above: least score, or the percentage of responses to leave out (90%%)",
    )
    options = parser.parse_intermixed_args(arguments)
    if (options.rule == "above") != bool(options.threshold):
        parser.error("--rule above and --threshold go together")
    if options.threshold and not NUMBER.fullmatch(options.threshold):
        parser.error(f"--threshold={options.threshold}: must be a score or a percentage")
    if options.rule in ("best", "above") and (options.min_gap or options.margins):
        parser.error("--min-gap and --margins are for pairs")
    return options


def main(arguments: Sequence[str]) -> int:
    """Convert; return the exit code."""
    options = parse_arguments(arguments)
    try:
        print(convert(options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
