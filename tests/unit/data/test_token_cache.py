"""Examples from a cache are those from memory; one process builds it, damage is repaired."""

import datetime
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from marlhf_mega.data import token_cache
from marlhf_mega.data.datasets import ExampleBuilder, NothingLeftError
from marlhf_mega.data.files import read_rows, write_jsonl
from marlhf_mega.data.token_cache import MappedExamples, examples_of, joined
from marlhf_mega.data.tokenizer import Tokenizer

ROWS = [
    {"prompt": "I love" + " Hi" * (i % 9), "extra": {"\u00e9\U0001f600": [i, None, 0.1 * i]}}
    | {"response": " Hi" * (i % 7), "chosen": f" a {i}", "rejected": " b" * (i % 5)}
    | {"reward": i / 3, "margin": 0.5 * i}
    for i in range(50)
]
BUILDS = {
    "prompts": ExampleBuilder.prompts,
    "sft": ExampleBuilder.supervised,
    "preferences": ExampleBuilder.preferences,
    "offline": ExampleBuilder.offline,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SMALL_DATA_BYTES", 0)
    monkeypatch.setattr(token_cache, "CHUNK_ROWS", 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def builder(tokenizer: Tokenizer, path: Path, **changes: object) -> ExampleBuilder:
    limits = {"max_prompt_tokens": 8, "max_response_tokens": 6, "long_prompts": "drop"}
    return ExampleBuilder(tokenizer=tokenizer, source=str(path), **limits | changes)


@pytest.mark.parametrize("kind", BUILDS)
def test_a_cache_holds_what_memory_would(
    kind: str, path: Path, root: Path, toy_tokenizer: Tokenizer
) -> None:
    in_memory = builder(toy_tokenizer, path)
    expected = BUILDS[kind](in_memory, read_rows(path, kind))
    assert 0 < len(expected) < len(ROWS), "some prompts are too long"
    for _ in ("built", "mapped"):
        mine = builder(toy_tokenizer, path)
        found = examples_of(str(path), kind, BUILDS[kind], mine, root=root)
        assert isinstance(found, MappedExamples)
        assert list(found) == expected
        assert found[3:-1:2] == expected[3:-1:2]
        assert found[-1] == expected[-1]
        assert mine.report == in_memory.report
    with pytest.raises(IndexError):
        found[len(found)]


def test_other_settings_data_or_tokenizers_have_other_caches(
    path: Path, root: Path, toy_tokenizer: Tokenizer, toy_folder: Path
) -> None:
    def folders(**changes: object) -> int:
        changed = builder(changes.pop("tokenizer", toy_tokenizer), path, **changes)
        examples_of(str(path), "sft", ExampleBuilder.supervised, changed, root=root)
        return sum(one.is_dir() for one in root.iterdir())

    assert folders() == folders() == 1
    assert folders(max_prompt_tokens=9) == 2
    assert folders(control_tokens="parse") == 3
    assert folders(tokenizer=Tokenizer.load(toy_folder, stop=[5])) == 4
    write_jsonl(path, ROWS[:-1])
    assert folders() == 5


@pytest.mark.parametrize("name", ["ids", "fields", "facts.json"])
def test_a_damaged_cache_is_built_again_with_one_line(
    name: str, path: Path, root: Path, toy_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    mine = builder(toy_tokenizer, path)
    expected = list(examples_of(str(path), "prompts", ExampleBuilder.prompts, mine, root=root))
    (folder,) = (one for one in root.iterdir() if one.is_dir())
    with (folder / name).open("r+b") as file:
        file.seek(4)
        file.write(b"\xff")
    found = examples_of(
        str(path), "prompts", ExampleBuilder.prompts, builder(toy_tokenizer, path), root=root
    )
    assert list(found) == expected
    (line,) = caplog.messages
    assert line.startswith(f"{path}: its token cache {folder} is damaged and built again; ")


def _tokenise(path: Path, root: Path, tokenizer: Tokenizer, barrier, queue) -> None:
    calls = []

    def build(own: ExampleBuilder, rows):
        calls.append(len(rows))
        return own.prompts(rows)

    build.__qualname__ = "prompts"
    barrier.wait()
    found = examples_of(str(path), "prompts", build, builder(tokenizer, path), root=root)
    queue.put((sum(calls), [p.prompt_ids for p in found]))


def test_one_of_several_processes_tokenises(
    path: Path, root: Path, toy_tokenizer: Tokenizer
) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_tokenise, args=(path, root, toy_tokenizer, barrier, queue))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(calls for calls, _ in found) == [0, 0, len(ROWS)]
    assert found[0][1] == found[1][1] == found[2][1]


def test_a_rank_does_not_wait_for_ever(
    path: Path,
    root: Path,
    toy_tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_cache, "STALE_SECONDS", 0.3)
    mine = builder(toy_tokenizer, path)
    folder = root / token_cache._key(str(path), "prompts", ExampleBuilder.prompts, mine)
    with token_cache._turn(folder, str(path)):
        found = examples_of(str(path), "prompts", ExampleBuilder.prompts, mine, root=root)
    assert found == builder(toy_tokenizer, path).prompts(read_rows(path, "prompts"))
    assert mine.report.num_rows == len(found)
    assert caplog.messages == [
        f"{path}: is tokenised by every rank in its own memory; the rank that tokenises it has "
        "made no progress for 0.3 s"
    ]


def test_values_that_json_changes_stay_in_memory(
    tmp_path: Path, root: Path, toy_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dates.parquet"
    rows = [{"prompt": "I love", "when": datetime.date(2024, 1, 2)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    mine = builder(toy_tokenizer, path)
    (found,) = examples_of(str(path), "prompts", ExampleBuilder.prompts, mine, root=root)
    assert found.row == rows[0]
    assert caplog.messages == [
        f"{path}: is tokenised by every rank in its own memory; a field cannot be kept: Object of "
        "type date is not JSON serializable"
    ]
    assert [one.suffix for one in root.iterdir()] == [".lock"]


def test_errors_are_those_of_a_file_in_memory(
    path: Path, root: Path, toy_tokenizer: Tokenizer
) -> None:
    with pytest.raises(NothingLeftError, match=r"; all 50 were dropped\."):
        examples_of(
            str(path),
            "prompts",
            ExampleBuilder.prompts,
            builder(toy_tokenizer, path, max_prompt_tokens=1),
            root=root,
        )
    path.write_text(path.read_text() + '{"prompt": 3}\n')
    with pytest.raises(ValueError, match=f"{path}:51: prompt: "):
        examples_of(
            str(path), "prompts", ExampleBuilder.prompts, builder(toy_tokenizer, path), root=root
        )
    assert [one.suffix for one in root.iterdir()] == [".lock", ".lock"]


def test_old_caches_make_room(path: Path, root: Path, toy_tokenizer: Tokenizer) -> None:
    (root / "old").mkdir()
    (root / "old.lock").touch()
    (root / "young").mkdir()
    for name in ("old", "old.lock"):
        os.utime(root / name, (0, 0))
    examples_of(
        str(path), "prompts", ExampleBuilder.prompts, builder(toy_tokenizer, path), root=root
    )
    assert {"old", "old.lock"}.isdisjoint(one.name for one in root.iterdir())
    assert (root / "young").is_dir()


def test_progress_is_shown(
    path: Path,
    root: Path,
    toy_tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_cache, "PROGRESS_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    examples_of(
        str(path), "prompts", ExampleBuilder.prompts, builder(toy_tokenizer, path), root=root
    )
    assert caplog.messages[:2] == [f"{path}: {n} rows tokenised" for n in (7, 14)]


MEASURE = """
import sys
from pathlib import Path

from marlhf_mega.data import token_cache
from marlhf_mega.data.datasets import ExampleBuilder
from marlhf_mega.data.tokenizer import Tokenizer

path, root, tokenizer = map(Path, sys.argv[1:4])
token_cache.SMALL_DATA_BYTES = int(sys.argv[4])
token_cache.CHUNK_ROWS = 50
builder = ExampleBuilder(
    tokenizer=Tokenizer.load(tokenizer),
    max_prompt_tokens=1000,
    max_response_tokens=1000,
    long_prompts="error",
    source=str(path),
)


def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


builder.tokenizer.encode_batch(["I love the red lamp"] * 100)
before = own()
found = token_cache.examples_of(str(path), "sft", ExampleBuilder.supervised, builder, root=root)
print((own() - before) / sum(len(e.prompt_ids) + len(e.response_ids) for e in found))
"""


def test_a_process_that_builds_and_maps_a_cache_holds_no_tokens(
    tmp_path: Path, root: Path, toy_folder: Path
) -> None:
    """In bytes of memory per token, against a process that keeps its examples."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "I love" * 40, "response": f" Hi {i}" * 40} for i in range(1000)])

    def start(small: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MEASURE, path, root, toy_folder, small]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)

    kept, mapped = (float(one.communicate()[0]) for one in [start(2**40), start(0)])
    assert kept > 20
    assert mapped < 0.1 * kept


def test_several_files_are_one_sequence() -> None:
    parts = [[10, 11], [], [12, 13, 14]]
    whole = joined(parts)
    assert list(whole) == [10, 11, 12, 13, 14]
    assert (whole[-1], whole[2], whole[1:4:2]) == (14, 12, [11, 13])
    with pytest.raises(IndexError):
        whole[5]
    assert joined(parts[:1]) is parts[0]
    assert len(joined([])) == 0
