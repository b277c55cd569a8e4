"""Every README is short, its links and paths resolve, and its commands are accepted.

A command line of a code block runs as `--check`, `--dry-run` or `--print-config`, whichever its
program has, in a folder that has the project's folders and small stand-ins for the files it names.
"""

import argparse
import doctest
import gzip
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from marlhf_mega.cli import COMMANDS, _parse, main
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
FRONT = ROOT / "README.md"
FOLDERS = (".github", "configs", "launch", "marlhf_mega", "tests", "tools")
FOUND = sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
PAGES = [FRONT, *(page for page in FOUND if page.name != "KEYS.md")]  # which a tool writes
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = (".py", ".sh", ".sbatch")
PLACEHOLDER = re.compile("NAME|PACKAGE|MODULE")
SMALL = re.compile(r"^(?!configs/)|e2e|hf_small")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
VARIABLE = re.compile(r'^(\w+)="(.*)"$', re.MULTILINE)
COMMAND = re.compile(r"(\w+=\S+ )*(torchrun|marlhf|python|bash|sbatch) ")


def prose(page):
    return BLOCK.sub("", page.read_text())


@EVERY_PAGE
def test_a_page_is_short(page):
    text = page.read_text()
    lines = text.splitlines()
    if page != FRONT:
        assert len(lines) <= 120
        return
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 160] == []
    assert len(text.encode()) <= 12 * 1024


@EVERY_PAGE
def test_pictures_are_small(page):
    pictures = [page.parent / link for link in LINK.findall(prose(page)) if link.endswith(".png")]
    assert [picture for picture in pictures if picture.stat().st_size > 200_000] == []


@EVERY_PAGE
def test_relative_links_resolve(page):
    broken = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link or (target.exists() and (not anchor or anchor in anchors(target))):
            continue
        broken.append(link)
    assert broken == []


def anchors(page):
    """As GitHub makes them: lower case, without punctuation, dashes for spaces."""
    return {
        re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        for heading in HEADING.findall(prose(page))
    }


@EVERY_PAGE
def test_names_in_backticks_exist(page):
    """Paths of the project, its modules and its configuration keys."""
    assert [span for span in SPAN.findall(prose(page)) if not exists(span, page)] == []


def exists(span, page):
    word = span.split("=")[0]
    if re.fullmatch(r"[\w.{},*/-]+", word) is None or PLACEHOLDER.search(word):
        return True  # a sentence, a command, a formula, a placeholder
    if "/" in word or word.endswith(PROGRAM):
        return path_exists(word, page)
    if word.startswith("marlhf_mega."):
        return is_module_or_member(word)
    section, _, key = word.partition(".")
    if section in Config.model_fields and key and "*" not in key:
        values = getattr(Config(), section).model_dump()
        inner = {f"{n}.{k}" for n, v in values.items() if isinstance(v, dict) for k in v}
        known = {*values, *inner, "yaml"}  # config.yaml is a file
        return known.issuperset(expand(key))
    return True


def path_exists(word, page):
    """Whether a path is there, seen from the page, the project's root or the package."""
    if "/" not in word:
        return any(any((ROOT / folder).rglob(word)) for folder in FOLDERS)
    if word.split("/")[0] not in FOLDERS and not word.endswith((*PROGRAM, ".yaml", ".md", ".png")):
        return True  # a metric, or a path of a run
    places = (page.parent, ROOT, ROOT / "marlhf_mega")
    return all(any(any(place.glob(path)) for place in places) for path in expand(word.rstrip("/")))


def is_module_or_member(name):
    path = ROOT.joinpath(*name.split("."))
    module = path.parent.with_suffix(".py")
    is_member = module.is_file() and path.name in module.read_text()
    return is_member or path.is_dir() or path.with_suffix(".py").is_file()


def expand(pattern):
    """`a{b,c}` -> `ab`, `ac`."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [head + choice + end for choice in choices.split(",") for end in expand(tail)]


def test_the_package_page_names_every_part():
    package = ROOT / "marlhf_mega"
    parts = {path.name for path in package.glob("[a-z]*.py")}
    parts |= {path.parent.name + "/" for path in package.glob("*/__init__.py")}
    text = (package / "README.md").read_text()
    assert {part for part in parts if f"`{part}`" not in text} == set()


def command_lines():
    """Yield (page, command, whether it is whole) of every code block and sentence.

    In a sentence a command may leave out settings.
    """
    for page in PAGES:
        for _, block in BLOCK.findall(page.read_text()):
            for name, value in VARIABLE.findall(block):
                block = block.replace(f"${name} ", f"{value} ")
            for line in block.replace("\\\n", " ").splitlines():
                if COMMAND.match(line):
                    yield page, line, True
        for span in SPAN.findall(prose(page)):
            if COMMAND.match(span) and "..." not in span:
                yield page, span.replace("COMMAND", "ppo"), False


def case(page, line, whole):
    short = " ".join(line.split())
    return pytest.param(line, whole, id=f"{page.parent.relative_to(ROOT)}: {short}")


LINES = [case(*found) for found in dict.fromkeys(command_lines())]


@pytest.mark.parametrize(("line", "whole"), LINES)
def test_a_command_is_accepted(line, whole, place, monkeypatch):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)  # PYTHON=... before a command
    if "marlhf_mega" in words:
        rest = words[words.index("marlhf_mega") + 1 :]
        ranks = option(words, "--nproc-per-node")
        accept_marlhf(rest, place, monkeypatch, whole=whole, ranks=ranks)
    elif words[0] == "marlhf":
        accept_marlhf(words[1:], place, monkeypatch, whole=whole)
    elif words[0] == "python":
        accept_tool(ROOT / words[1], words[2:], monkeypatch)
    else:
        accept_script(words, place, monkeypatch, whole=whole)


def option(words, name):
    return int(words[words.index(name) + 1]) if name in words else 1


def accept_marlhf(words, place, monkeypatch, *, whole, ranks=1):
    """Call the command line in this process, with the size of the world that torchrun would set."""
    if not words and not whole:
        return  # a sentence that names the program
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    command, *arguments = words
    if command in ("--help", "--version") or "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            main([command, *arguments])
        assert end.value.code == 0
        return
    assert command in COMMANDS
    if command == "report":
        assert _parse([command, *arguments]).run_dirs
        return
    if command == "init":
        assert _parse([command, *arguments]).hf_path
        return
    place.fill(arguments)
    last = last_option(command, arguments, whole=whole)
    if last == ["--print-config"]:
        arguments = [argument for argument in arguments if argument != "--check"]
    assert main([command, *arguments, *last]) == 0


def last_option(command, arguments, *, whole):
    """What keeps a command from starting, after as many checks as it can have here."""
    if "--check" in arguments and whole:
        return []
    needs_gpu = re.search(r"fp8|cuda_graphs|configs/(?!e2e|hf_small)", " ".join(arguments))
    if command in ("plan", "doctor") or "--dry-run" in arguments or needs_gpu or not whole:
        return ["--print-config"]
    return ["--check"]


class AcceptedError(BaseException):
    """A program has read its command line."""


def accept_tool(path, arguments, monkeypatch):
    """Run a program up to the end of its first parse."""
    depth = 0

    def stop_after(parse):
        def parse_and_stop(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            found = parse(self, *args, **kwargs)
            depth -= 1
            if depth == 0:
                raise AcceptedError
            return found

        return parse_and_stop

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(parse))
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises((AcceptedError, SystemExit)) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert getattr(end.value, "code", 0) == 0  # SystemExit: --help


def accept_script(words, place, monkeypatch, *, whole):
    """Let a launch script print what it would do, and check the command that it would start."""
    script = next(word for word in words if word.endswith((".sh", ".sbatch")))
    arguments = words[words.index(script) + 1 :]
    if "--dry-run" not in (ROOT / script).read_text():
        assert (ROOT / script).is_file()
        return
    show = [] if "--help" in arguments else ["--dry-run"]
    command = next((n for n, word in enumerate(arguments) if word in COMMANDS), None)
    if command is not None:
        ranks = option(words, "--nodes") * option(words, "--ranks-per-node")
        accept_marlhf(arguments[command:], place, monkeypatch, whole=whole, ranks=ranks)
    if not whole:
        return
    done = subprocess.run(
        ["bash", script, *show, *arguments],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_positions": 2048,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One small file or folder of every kind that a command line names."""
    folder = tmp_path_factory.mktemp("originals")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tokenizer", vocab_size=400)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    preferences = toy.generate_preferences(0, 16)
    answers = {"response": "sun", "reward": 1.0}
    answers |= {"responses": ["sun", "moon", "star"], "rewards": [2.0, 1.0, 0.0]}
    rows = [row | answers for row in preferences]
    write_jsonl(folder / "data.jsonl", rows)
    with gzip.open(folder / "data.jsonl.gz", "wt") as compressed:
        compressed.write((folder / "data.jsonl").read_text())

    model = SHAPE | {"vocab_size": tokenizer.vocab_size}
    for run, role in {"policy_run": "policy", "reward_run": "reward", "e2e_run": "policy"}.items():
        run = folder / run
        (run / "checkpoints" / "step_000001" / role).mkdir(parents=True)
        (run / "tokenizer").symlink_to(folder / "tokenizer")
        limit = {"max_positions": 256} if run.name == "e2e_run" else {}  # as configs/e2e_* have it
        facts = {"model": model | limit, "tokenizer_fingerprint": tokenizer.fingerprint()}
        (run / "config.yaml").write_text(json.dumps(facts))

    (folder / "hf").mkdir()
    for file in (folder / "tokenizer").iterdir():
        (folder / "hf" / file.name).symlink_to(file)
    theirs = LLAMA | {"vocab_size": tokenizer.vocab_size}
    (folder / "hf" / "config.json").write_text(json.dumps(theirs))

    config = {
        "model": model,
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": dict.fromkeys(("train_path", "validation_path"), str(folder / "data.jsonl")),
        "reward": {"source": "marlhf_mega.data.toy:gold_reward"},
        "rollout": {"batch_size": 16, "max_response_tokens": 8},
        "ppo": {"minibatch_size": 16},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


class Place:
    """A folder in which a command line finds what it names."""

    def __init__(self, folder, originals):
        self.folder, self.originals = folder, originals
        for name in FOLDERS:
            (folder / name).symlink_to(ROOT / name)

    def fill(self, arguments):
        """Put stand-ins where the settings of a command, and of its file, point to."""
        settings = [word.partition("=") for word in arguments if "=" in word]
        values = {key: value for key, _, value in settings}
        if "--config" in arguments:
            file = arguments[arguments.index("--config") + 1]
            self.put("config.yaml", file)
            if not SMALL.search(file):
                return  # a large model, which no stand-in resembles
            written = OmegaConf.load(self.folder / file)
            for key in ("model.init", "reward.source"):
                values.setdefault(key, OmegaConf.select(written, key) or "")
        for key, value in values.items():
            if key in ("model.init", "critic.init"):
                if value not in ("", "auto", "random", "reward", "policy"):
                    self.put("e2e_run" if value.startswith("runs/e2e") else "policy_run", value)
            elif key == "reward.source":
                self.put_reward(value)
            elif key == "model.hf_path":
                self.put("hf", value)
            elif key == "tokenizer.path":
                self.put("tokenizer", value)
            elif key.startswith("data.") and key.endswith("_path"):
                self.put("data.jsonl.gz" if value.endswith(".gz") else "data.jsonl", value)

    def put_reward(self, source):
        """Put a reward model, or the module of a function, where a source points to."""
        module, colon, function = source.partition(":")
        if source and not colon:
            self.put("reward_run", source)
        elif function.isidentifier() and importlib.util.find_spec(module.split(".")[0]) is None:
            text = f"def {function}(prompt, response, **fields):\n    return 0.0\n"
            (self.folder / f"{module}.py").write_text(text)

    def put(self, original, path):
        target = self.folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(self.originals / original)


@pytest.fixture
def place(tmp_path, originals, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, originals)


EXAMPLES = [
    pytest.param(blocks, id=str(page.parent.relative_to(ROOT)))
    for page in PAGES
    if (blocks := "".join(b for name, b in BLOCK.findall(page.read_text()) if name == "python"))
    and ">>>" in blocks
]


@pytest.mark.parametrize("blocks", EXAMPLES)
def test_python_examples_print_what_they_show(blocks, place, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    place.put("config.yaml", "my.yaml")
    test = doctest.DocTestParser().get_doctest(blocks, {}, "README", None, 0)
    said = []
    runner = doctest.DocTestRunner(MayPrint())
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


class MayPrint(doctest.OutputChecker):
    """An example that shows no output may have some: progress."""

    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got, flags)


TOOLS = [
    path
    for path in sorted(ROOT.glob("tools/**/*.py"))
    # Other tools start these two.
    if "__main__" in path.read_text() and path.name not in ("hf_reference.py", "worker.py")
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tool_has_help(path, monkeypatch, capsys):
    accept_tool(path, ["--help"], monkeypatch)
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")
