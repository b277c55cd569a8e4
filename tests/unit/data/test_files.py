import datetime
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from marlhf_mega.config.sections.data import DataSource
from marlhf_mega.data.files import content_hash, data_hash, read_rows, write_jsonl

CHAT = [{"role": "user", "content": "hi"}]


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a\nb", "response": " caf\u00e9", "id": 1},
        {"prompt": "\u2028 stays in its line", "response": ""},
    ]
    plain, packed, table = (tmp_path / f"rows{s}" for s in (".jsonl", ".jsonl.gz", ".parquet"))
    write_jsonl(plain, rows)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (plain, packed, table):
        assert read_rows(path, "sft") == rows


def test_a_whole_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "\\ud83d\\ude00"}')
    assert read_rows(path, "prompts") == [{"prompt": "\U0001f600"}]


def test_what_json_cannot_hold_is_written_as_text(tmp_path: Path) -> None:
    table, path = tmp_path / "rows.parquet", tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "day": datetime.date(2026, 11, 22)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    write_jsonl(path, read_rows(table, "prompts"))
    assert read_rows(path, "prompts") == [{"prompt": "a", "day": "2026-11-22"}]


def test_chats_are_prompts_in_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": CHAT}]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert read_rows(table, "prompts") == rows
    assert read_rows(write(tmp_path, json.dumps(rows[0])), "prompts") == rows


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "", '{"prompt": "a"}', "  ", '{"prompt": 3}')
    with pytest.raises(ValueError, match=r"rows.jsonl:4: prompt: must be text or a list"):
        read_rows(path, "prompts")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", '{"prompt": "a"', "json: Expecting ',' delimiter at column 15."),
        ("sft", "[1]", "json: must be an object; got a list."),
        (
            "sft",
            '{"prompt": "a", "response": "\\uD83D is cut"}',
            "json: must be Unicode text; \\ud83d is half a character. Fix the line.",
        ),
        ("sft", '{"prompt": "a"}', "response: missing; the row has the fields: prompt."),
        (
            "sft",
            "{}",
            "prompt: missing; the row has the fields: none. Add it, or say which field it is: "
            "data.fields.prompt=FIELD.",
        ),
        ("sft", '{"prompt": "a", "response": null}', "response: must be text; got null."),
        ("sft", '{"prompt": "a", "response": ["b"]}', "response: must be text; got a list."),
        ("sft", '{"prompt": null, "response": ""}', "prompt: must be text or a list of chat"),
        ("prompts", '{"prompt": []}', "chat messages; got an empty list."),
        ("sft", '{"messages": "a"}', "messages: must be a list of chat messages; got text."),
        (
            "sft",
            json.dumps({"messages": CHAT}),
            "messages: must be a chat that ends with an answer of the assistant; its last roles "
            "are: user. Fix the row.",
        ),
        ("prompts", '{"prompt": {"role": "user"}}', "chat messages; got an object."),
        (
            "prompts",
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "user"}]}',
            "prompt[1]: must be an object with texts role and content; got {'role': 'user'}.",
        ),
        ("preferences", '{"prompt": "a", "chosen": "b"}', "rejected: missing"),
        ("preferences", '{"prompt": "a", "chosen": 1, "rejected": "b"}', "chosen: must be text"),
        (
            "preferences",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}',
            "margin: must be a finite number; got '1'.",
        ),
        (
            "preferences",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_probability": 1.5}',
            "chosen_probability: must be a probability from 0 to 1; got 1.5. Fix it.",
        ),
        ("ranked", '{"prompt": "a", "responses": ["b", "c"]}', "rewards: missing"),
        (
            "ranked",
            '{"prompt": "a", "responses": ["b"], "rewards": [1]}',
            "responses: must be a list of two texts or more; got ['b']. Fix it.",
        ),
        (
            "ranked",
            '{"prompt": "a", "responses": ["b", "c"], "rewards": [1]}',
            "rewards: must be a list of 2 numbers, one for each response; got [1]. Fix it.",
        ),
        (
            "ranked",
            '{"prompt": "a", "responses": ["b", "c"], "rewards": [1, null]}',
            "rewards: must be a finite number; got None.",
        ),
        (
            "preferences",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_safe": 1}',
            "chosen_safe: must be true or false; got 1.",
        ),
        (
            "preferences",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "from_reference": "both"}',
            "from_reference: must be chosen or rejected, the response that the reference gave; got "
            "'both'.",
        ),
        ("offline", '{"prompt": "a", "response": "b"}', "reward: missing"),
        (
            "offline_pairs",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 1}',
            "rejected_reward: missing",
        ),
        (
            "offline",
            '{"prompt": "a", "response": "b", "reward": NaN}',
            "reward: must be a finite number; got nan.",
        ),
        (
            "offline",
            '{"prompt": "a", "response": "b", "reward": 1e39}',
            "finite number; got 1e+39.",
        ),
        (
            "offline",
            '{"prompt": "a", "response": "b", "reward": 1%s}' % ("0" * 400),
            "reward: must be a finite number; got 1000",
        ),
        (
            "offline",
            '{"prompt": "a", "response": "b", "finished": 0, "reward": 0}',
            "finished: must be true or false; got 0.",
        ),
        ("sft", '{"prompt": %s}' % ("7" * 5000), "json: must be readable; Exceeds the limit"),
        ("sft", '{"prompt": %s}' % ("[" * 100_000), "json: must be readable; maximum recursion"),
        (
            "preferences",
            '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}',
            "rejected: must be text or a list of chat messages; got text.",
        ),
        (
            "preferences",
            '{"chosen": [{"role": "user", "content": "b"}], "rejected": '
            '[{"role": "user", "content": "b"}]}',
            "chosen: must end with an assistant message; its last role is user.",
        ),
        (
            "preferences",
            '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": '
            '[{"role": "assistant", "content": "b"}]}',
            "prompt: must be the messages that chosen and rejected answer with one message each;",
        ),
        (
            "offline",
            '{"prompt": "a", "response": "b", "reward": true}',
            "reward: must be a finite number; got True.",
        ),
    ],
)
def test_a_bad_row_names_file_line_and_field(
    tmp_path: Path, kind: str, row: str, message: str
) -> None:
    good = json.dumps(
        {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d", "reward": -1}
        | {"chosen_reward": 1, "rejected_reward": None}
        | {"responses": ["c", "d"], "rewards": [1, 0]}
    )
    path = write(tmp_path, good, row, good)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as caught:
        read_rows(path, kind)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FAR_AWAY = pyarrow.scalar(10**18, pyarrow.timestamp("us"))


def write_parquet(path: Path, when: list[pyarrow.Scalar | None]) -> Path:
    times = pyarrow.array(when, when[-1].type)
    table = pyarrow.table({"prompt": ["a"] * len(when), "when": times})
    pyarrow.parquet.write_table(table, path)
    return path


def damaged_parquet(path: Path) -> Path:
    """Overwrite the first page behind the magic bytes."""
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    content = path.read_bytes()
    return write_bytes(path, content[:4] + bytes(30) + content[34:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.jsonl", "none.jsonl: must be a file; not found"),
        (lambda d: d, ": must be a file; not found"),
        (lambda d: write_bytes(d / "x.csv", b"a"), "x.csv: must be a .jsonl, .jsonl.gz or .parq"),
        (lambda d: write_bytes(d / "x.jsonl", b""), "x.jsonl: must hold at least one row"),
        (lambda d: write_bytes(d / "x.jsonl", b"\n \n"), "x.jsonl: must hold at least one row"),
        (lambda d: write_bytes(d / "x.jsonl", b"\xff\xfe"), "x.jsonl:1: must be readable UTF-8"),
        (lambda d: write_bytes(d / "x.jsonl.gz", b"{}"), "x.jsonl.gz:1: must be readable UTF-8"),
        (
            lambda d: write_bytes(d / "x.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9)[:-9]),
            "x.jsonl.gz:10: must be readable UTF-8 text; Compressed file ended",
        ),
        (lambda d: write_bytes(d / "x.parquet", b"PAR1"), "x.parquet: must be a Parquet file"),
        (lambda d: damaged_parquet(d / "x.parquet"), "x.parquet: must be a Parquet file; "),
        (
            lambda d: write_parquet(d / "x.parquet", [None, FAR_AWAY]),
            "x.parquet:2: when: must be a value that Python holds; timestamp[us]: ",
        ),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(ValueError, match="must ") as caught:
        read_rows(make(tmp_path), "prompts")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_content_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "x", b"abc" * 100_000)
    assert content_hash(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_fields_of_other_rows_do_not_appear_in_parquet(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tools": [{"name": "a", "with": {"city": "Ulm"}}]}
    other = {"role": "assistant", "content": "", "tools": [{"name": "b", "with": {"zone": "CET"}}]}
    rows = [{"prompt": [*CHAT, call]}, {"prompt": [*CHAT, other], "tests": [1, None]}]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    # A column that only some rows have is there from the first row's schema on.
    assert [row["prompt"] for row in read_rows(table, "prompts")] == [r["prompt"] for r in rows]


def test_a_null_reward_is_kept_in_both_formats(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b"}
    rows = [row | {"reward": 1.0}, row | {"reward": None}]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    path = write(tmp_path, *map(json.dumps, rows))
    assert read_rows(table, "offline") == read_rows(path, "offline") == rows


def test_bytes_are_no_messages(tmp_path: Path) -> None:
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [b"a"]}), table)
    with pytest.raises(ValueError, match=r"rows.parquet:1: prompt: must be text .* got b'a'\."):
        read_rows(table, "prompts")


def test_the_hash_of_several_files_covers_their_order_and_weights(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(name)

    def hashed(*parts: tuple[str, float]) -> str:
        return data_hash([DataSource(path=str(tmp_path / p), weight=w) for p, w in parts])

    assert hashed(("a.jsonl", 1)) == hashlib.sha256(b"a").hexdigest()
    assert hashed(("*.jsonl", 1)) == hashed(("a.jsonl", 1), ("b.jsonl", 1))
    others = [(("b.jsonl", 1), ("a.jsonl", 1)), (("a.jsonl", 1), ("b.jsonl", 2)), (("a.jsonl", 2),)]
    assert len({hashed(*parts) for parts in [*others, (("*.jsonl", 1),)]}) == 4


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "a", "answer": "b"}', '{"question": "a"}')
    fields = {"prompt": "question", "response": "answer"}
    assert read_rows(path, "prompts", fields=fields)[0]["prompt"] == "a"
    with pytest.raises(ValueError, match="rows.jsonl:2: ") as caught:
        read_rows(path, "sft", fields=fields)
    assert str(caught.value) == (
        f"{path}:2: response: missing; the row has the fields: prompt, question. Correct "
        "data.fields.response=answer."
    )


def test_a_chat_may_have_another_name(tmp_path: Path) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "ho"}]
    path = write(tmp_path, json.dumps({"conversation": chat}))
    (row,) = read_rows(path, "sft", fields={"messages": "conversation"})
    assert row["messages"] == chat


def test_times_in_nanoseconds_are_text_wherever_they_are(tmp_path: Path) -> None:
    """1,700,000,000 s after 1970 is 2023-11-14 22:13:20."""
    kind = pyarrow.timestamp("ns")
    when, time = 1_700_000_000_123_456_789, pyarrow.array([3_600_000_000_001], pyarrow.time64("ns"))
    message = pyarrow.struct(
        [("role", pyarrow.string()), ("content", pyarrow.string()), ("at", kind)]
    )
    table = pyarrow.table(
        {
            "prompt": pyarrow.array(
                [[{"role": "user", "content": "a", "at": when}]], pyarrow.list_(message)
            ),
            "when": pyarrow.array([when], kind),
            "never": pyarrow.array([None], kind),
            "zone": pyarrow.array([when], pyarrow.timestamp("ns", "UTC")),
            "time": time,
            "took": pyarrow.array([123_456_789], pyarrow.duration("ns")),
            "map": pyarrow.array([[("k", when)]], pyarrow.map_(pyarrow.string(), kind)),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet", "prompts")
    text = "2023-11-14 22:13:20.123456789"
    assert row == {
        "prompt": [{"role": "user", "content": "a", "at": text}],
        "when": text,
        "took": 123_456_789,
        "zone": text + "Z",
        "time": "01:00:00.000000001",
        "map": [("k", text)],
    }


def test_a_damaged_page_inside_a_file_names_it(tmp_path: Path) -> None:
    table = tmp_path / "rows.parquet"
    columns = {"prompt": [f"a{i}" for i in range(999)], "response": ["b"] * 999}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    content = table.read_bytes()
    write_bytes(table, content[:4] + bytes(200) + content[204:])
    with pytest.raises(ValueError, match=r"rows\.parquet: must be a Parquet file; ") as caught:
        read_rows(table, "sft")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "row"),
    [
        ("preferences", "margin", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("sft", "finished", {"prompt": "a", "response": "b"}),
    ],
)
def test_a_null_in_an_optional_field_is_none_in_both_formats(
    tmp_path: Path, kind: str, name: str, row: dict[str, str]
) -> None:
    assert read_rows(write(tmp_path, json.dumps(row | {name: None})), kind) == [row | {name: None}]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {name: None}, row]), table)
    assert read_rows(table, kind) == [row, row]
