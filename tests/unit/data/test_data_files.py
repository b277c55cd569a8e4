import datetime
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from marlhf_mega.data.files import content_hash, read_rows, write_jsonl

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
            "json: must be Unicode text; \\ud83d is half a character. Mend the line.",
        ),
        ("sft", '{"prompt": "a"}', "response: missing; the row has the fields: prompt."),
        ("sft", "{}", "prompt: missing; the row has the fields: none."),
        ("sft", '{"prompt": "a", "response": null}', "response: must be text; got null."),
        ("sft", '{"prompt": "a", "response": ["b"]}', "response: must be text; got a list."),
        ("sft", '{"prompt": null, "response": ""}', "prompt: must be text or a list of chat"),
        ("prompts", '{"prompt": []}', "chat messages; got an empty list."),
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
        ("offline", '{"prompt": "a", "response": "b"}', "reward: missing"),
        (
            "offline",
            '{"prompt": "a", "response": "b", "reward": NaN}',
            "reward: must be a finite number; got nan.",
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
