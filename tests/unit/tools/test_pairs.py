"""Pairs and demonstrations from scored responses, by hand and against all pairs of a group."""

import gzip
import json
import random
from itertools import combinations

import pytest

from marlhf_mega.data.files import read_rows
from tools.pairs import Answer, best_worst, every_pair, main, threshold_of, tree


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(prompt, *answers, **fields):
    return [
        {"prompt": prompt, "response": text, "finished": True, "reward": reward, **fields}
        for text, reward in answers
    ]


@pytest.fixture
def convert(tmp_path, capsys):
    """Return what converts files; it returns the rows and what was said."""

    def run(*arguments):
        out = tmp_path / "out.jsonl"
        assert main([str(out), *map(str, arguments)]) == 0
        said = capsys.readouterr().out.strip().removeprefix(f"{out}: ")
        return [json.loads(line) for line in out.read_text().splitlines()], said

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Return what converts files that it must refuse; it returns the line that it says."""

    def run(*arguments, out="out.jsonl"):
        (tmp_path / "out.jsonl").write_text("old")
        assert main([str(tmp_path / out), *map(str, arguments)]) == 2
        assert (tmp_path / "out.jsonl").read_text() == "old"
        assert not list(tmp_path.glob("*.tmp"))
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.strip().replace(f"{tmp_path}/", "")

    return run


@pytest.fixture
def answers(tmp_path):
    return write(
        tmp_path / "answers.jsonl",
        [
            *answered("one", ("a", 1.0), ("b", 3.0), ("c", None), ("d", 2.0), final="7"),
            *answered("two", ("e", 0.5), ("f", 0.5)),
            *answered([{"role": "user", "content": "three"}], ("g", -1.0), ("h", 0.0)),
        ],
    )


def test_the_best_and_the_worst_of_each_prompt(convert, answers, tmp_path):
    rows, said = convert(answers)
    assert rows == [
        {"prompt": "one", "final": "7", "chosen": "b", "rejected": "a"},
        {"prompt": [{"role": "user", "content": "three"}], "chosen": "h", "rejected": "g"},
    ]
    assert said == "2 pairs from 3 prompts; 1 gave none; 1 responses had no score"
    assert len(read_rows(tmp_path / "out.jsonl", "preferences")) == 2


def test_all_pairs_of_a_least_difference_with_their_margins(convert, answers):
    rows, _ = convert("--rule", "all", "--min-gap", "1.5", "--margins", answers)
    assert rows == [{"prompt": "one", "final": "7", "chosen": "b", "rejected": "a", "margin": 2.0}]
    rows, _ = convert("--rule", "all", answers)
    assert [row["chosen"] + row["rejected"] for row in rows] == ["ba", "da", "bd", "hg"]


def test_demonstrations_are_the_best_or_all_above_a_score(convert, answers, tmp_path):
    rows, said = convert("--rule", "best", answers)
    assert [(row["response"], row["reward"]) for row in rows] == [("b", 3), ("e", 0.5), ("h", 0)]
    assert said == "3 demonstrations from 3 prompts; 0 gave none; 1 responses had no score"
    assert len(read_rows(tmp_path / "out.jsonl", "sft")) == 3
    rows, said = convert("--rule", "above", "--threshold", "1", answers)
    assert [row["response"] for row in rows] == ["a", "b", "d"]
    assert said.startswith("3 demonstrations of at least 1 from 3 prompts; 2 gave none;")
    # Of -1 0 0.5 0.5 1 2 3 half, 3.5, are left out: three are.
    rows, said = convert("--rule", "above", "--threshold", "50%", answers)
    assert [row["response"] for row in rows] == ["a", "b", "d", "e", "f"]
    assert "of at least 0.5 from" in said


@pytest.mark.parametrize(
    ("text", "score"), [("0%", 1), ("25%", 2), ("74%", 3), ("75%", 4), ("100%", 4), ("-2.5", -2.5)]
)
def test_a_percentage_leaves_so_many_out(tmp_path, text, score):
    path = write(
        tmp_path / "a.jsonl", answered("p", *zip("abcd", (3.0, 1.0, 4.0, 2.0), strict=True))
    )
    assert threshold_of(text, [path]) == score


def said(pairs):
    return [(better.text, worse.text) for better, worse in pairs]


def test_pairs_where_responses_part_by_hand():
    """The (red fox (ran 5, slept 1), blue bird 2), A dog 0: three places where words differ."""
    found = said(
        tree(
            [
                Answer("The red fox ran", 5),
                Answer("The red  fox slept", 1),
                Answer("The blue bird", 2),
                Answer("A dog", 0),
            ]
        )
    )
    assert found == [
        ("The red fox ran", "A dog"),  # The: mean 8/3, A: 0
        ("The red fox ran", "The blue bird"),  # red: mean 3, blue: 2
        ("The red fox ran", "The red  fox slept"),
    ]


def test_branches_are_judged_by_their_mean():
    """Not by their best response."""
    lucky = [Answer("a x", 9), Answer("a y", -9), Answer("b", 1)]
    # The mean of b, 1, is above that of a, 0; a is the worse branch, and y the worst of it.
    assert said(tree(lucky)) == [("b", "a y"), ("a x", "a y")]


@pytest.mark.parametrize(
    ("texts", "pairs"),
    [(["a b", "a b c"], 1), (["a b", "a  b"], 0), (["same"], 0), ([], 0), (["", "a"], 1)],
)
def test_an_end_is_a_branch_and_blanks_are_none(texts, pairs):
    assert len(list(tree([Answer(text, i) for i, text in enumerate(texts)]))) == pairs


def test_without_a_shared_word_a_tree_is_best_and_worst_of_random_scores():
    draw = random.Random(3)
    for size in range(1, 6):
        group = [Answer(f"{i} word", draw.choice([0, 1, 2, draw.random()])) for i in range(size)]
        assert list(tree(group)) == list(best_worst(group))
        expected = {
            tuple(sorted((a, b), key=lambda answer: -answer.score))
            for a, b in combinations(group, 2)
            if a.score != b.score
        }
        assert set(every_pair(group)) == expected


def test_a_text_that_comes_twice_counts_once(convert, tmp_path):
    path = write(tmp_path / "a.jsonl", answered("p", ("a", 1.0), ("b", 0.0), ("a", 5.0)))
    rows, _ = convert("--margins", path)
    assert rows == [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0}]


def chat(*contents):
    return [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant"), contents, strict=True)
    ]


def test_known_layouts_become_pairs(convert, tmp_path):
    ultra = {
        "instruction": "ask",
        "completions": [
            {"response": "bad", "overall_score": 2.0, "model": "m"},
            {"response": "good", "overall_score": "8.5"},
            {"response": "unknown", "overall_score": None},
        ],
    }
    binarized = {
        "prompt": "ask",
        "chosen": chat("ask", "yes"),
        "rejected": chat("ask", "no"),
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }
    skywork = {"chosen": chat("q", "fine"), "rejected": chat("q", "poor"), "source": "helpsteer2"}
    okapi = {"prefered_output": "gut", "rejected_output": "schlecht", "instruction": "Frage"}
    rows = [ultra, binarized, skywork, okapi | {"input": ""}, okapi | {"input": "Text"}]
    found, said = convert("--margins", write(tmp_path / "a.jsonl", rows))
    assert found == [
        {"prompt": "ask", "chosen": "good", "rejected": "bad", "margin": 6.5},
        {"prompt": chat("ask", "")[:1], "chosen": "yes", "rejected": "no", "margin": 3.0},
        {
            "prompt": chat("q", "")[:1],
            "chosen": "fine",
            "rejected": "poor",
            "source": "helpsteer2",
        },
        {"prompt": "Frage", "chosen": "gut", "rejected": "schlecht"},
        {"prompt": "Frage\n\nText", "chosen": "gut", "rejected": "schlecht"},
    ]
    assert said == "5 pairs from 5 prompts; 0 gave none; 1 responses had no score"
    listed, packed = tmp_path / "okapi.json", tmp_path / "b.jsonl.gz"
    listed.write_text(json.dumps([okapi]))
    packed.write_bytes(gzip.compress(json.dumps(binarized).encode()))
    found, said = convert("--min-gap", "4", listed, packed)
    assert found == [{"prompt": "Frage", "chosen": "gut", "rejected": "schlecht"}]
    assert said.startswith("1 pairs from 2 prompts; 1 gave none")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [{"question": "q", "answer": "a"}],
            "a.jsonl:1: must have prompt, response and reward, or the fields of UltraFeedback, "
            "Skywork or Okapi; the row has: answer, question. Rename them.",
        ),
        (
            answered("p", ("a", "high")),
            "a.jsonl:1: reward: must be a finite number; got 'high'. Fix it.",
        ),
        (
            answered("p", ("a", 1.0), (3, 0.0)),
            "a.jsonl:2: response: must be text; got 3. Fix the row.",
        ),
        (
            [{"chosen": "a", "rejected": "b"}],
            "a.jsonl:1: prompt: missing; chosen and rejected are texts. Add it.",
        ),
        (
            [{"instruction": "i", "completions": ["text"]}],
            "a.jsonl:1: completions: must be objects; got 'text'. Fix the row.",
        ),
        (
            [{"instruction": "i", "prefered_output": None, "rejected_output": "b"}],
            "a.jsonl:1: prefered_output: must be text; got None. Fix the row.",
        ),
        (
            answered("p", ("a", 1.0), ("b", 1.0), ("c", None)),
            "out.jsonl: no row to write; 1 prompts gave none, and 1 responses have no score. "
            "Generate more, or lower the limits.",
        ),
    ],
)
def test_bad_rows_are_refused_in_a_line_and_the_old_file_stays(refused, tmp_path, rows, line):
    assert refused(write(tmp_path / "a.jsonl", rows)) == line


def test_bad_files_and_options_are_refused_in_a_line(refused, tmp_path):
    pair = write(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert refused("--rule", "tree", pair) == (
        "--rule=tree: needs scored responses; p.jsonl:1 is a pair. Remove it."
    )
    assert refused(pair, out="p.jsonl") == (
        "p.jsonl: must not be read and written. Name another file."
    )
    (tmp_path / "o.json").write_text("{}")
    assert refused(tmp_path / "o.json") == (
        "o.json: must be a list of objects; it is something else. Convert it."
    )
    assert refused(tmp_path / "none.json").startswith("none.json: must be a JSON file; ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--rule", "above"], "--rule above and --threshold go together"),
        (["--threshold", "3"], "--rule above and --threshold go together"),
        (
            ["--rule", "above", "--threshold", "much"],
            "--threshold=much: must be a score or a percentage",
        ),
        (["--rule", "best", "--margins"], "--min-gap and --margins are for pairs"),
    ],
)
def test_options_that_contradict_each_other(capsys, options, line):
    with pytest.raises(SystemExit, match="2"):
        main(["out.jsonl", "a.jsonl", *options])
    assert line in capsys.readouterr().err
