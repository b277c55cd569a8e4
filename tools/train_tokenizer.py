"""Train a SentencePiece tokenizer and write it in a format that Hugging Face loaders read.

    python tools/train_tokenizer.py tok --vocab-size 512 --toy
    python tools/train_tokenizer.py tok --vocab-size 1024 --fields prompt,response train.jsonl.gz
    python tools/train_tokenizer.py tok --vocab-size 8192 --chat-template chatml a.jsonl b.parquet

The output folder holds tokenizer.model, tokenizer.json and tokenizer_config.json. Pass it as
`tokenizer.path`. Exit codes: 0 done, 2 wrong usage or data.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from marlhf_mega.config.checks import check_folder
from marlhf_mega.data import toy
from marlhf_mega.data.files import read_objects
from marlhf_mega.data.train_tokenizer import CHATML, train_tokenizer

FIELDS = "prompt,response,chosen,rejected,messages"


def read_texts(path: str, fields: list[str]) -> Iterator[str]:
    """Yield the training texts: the lines of a .txt file, or some fields of a data file.

    Raises:
        ValueError: the file cannot be read, or a row has none of the fields.
    """
    if path.endswith(".txt"):
        if not Path(path).is_file():
            raise ValueError(f"{path}: must be a file; not found. Check the path.")
        yield from Path(path).read_text(encoding="utf-8").splitlines()
        return
    for line, row in read_objects(path):
        values = [row[field] for field in fields if isinstance(row.get(field), str | list)]
        if not values:
            raise ValueError(
                f"{path}:{line}: must have text in one of {', '.join(fields)}; the row has the "
                f"fields: {', '.join(sorted(row))}. Use --fields."
            )
        for value in values:
            yield from [value] if isinstance(value, str) else [m["content"] for m in value]


def read_template(name: str | None) -> str | None:
    """Return a chat template: `chatml`, or the text of a Jinja file.

    Raises:
        ValueError: there is no such file.
    """
    if name is None or name == "chatml":
        return CHATML if name else None
    if not Path(name).is_file():
        raise ValueError(f"--chat-template={name}: must be chatml or a file; not found. Give one.")
    return Path(name).read_text(encoding="utf-8")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument(
        "files",
        nargs="*",
        help="data of any kinds together: .jsonl, .jsonl.gz, .parquet, .txt or hf://NAME:SPLIT",
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of pieces, including special tokens"
    )
    parser.add_argument(
        "--fields",
        default=FIELDS,
        help=f"fields to train on, of which each row has at least one (default: {FIELDS})",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="chatml, or a Jinja file, whose <|control tokens|> become tokens (default: none)",
    )
    parser.add_argument(
        "--toy", action="store_true", help="train on the quickstart's text instead of files"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the quickstart's text (default: 0)")
    options = parser.parse_intermixed_args(arguments)
    if options.toy == bool(options.files):
        parser.error("give either data files or --toy")
    return options


def main(arguments: list[str]) -> int:
    """Train and write a tokenizer; return the exit code."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fields = options.fields.split(",")
    try:
        check_folder(options.out, key="out")
        texts = (
            toy.tokenizer_text(options.seed)
            if options.toy
            else [text for path in options.files for text in read_texts(path, fields)]
        )
        template = read_template(options.chat_template)
        train_tokenizer(texts, options.out, vocab_size=options.vocab_size, chat_template=template)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
