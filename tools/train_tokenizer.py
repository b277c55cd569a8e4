"""Train a SentencePiece tokenizer and package it for Hugging Face loaders.

    python tools/train_tokenizer.py OUT --vocab-size 512 --toy
    python tools/train_tokenizer.py OUT --vocab-size 1024 --fields prompt,response train.jsonl.gz

OUT becomes a folder with tokenizer.model, tokenizer.json and tokenizer_config.json: give it as
`tokenizer.path`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from marlhf_mega.config.checks import check_folder
from marlhf_mega.data import toy
from marlhf_mega.data.files import read_objects
from marlhf_mega.data.train_tokenizer import train_tokenizer


def read_texts(path: Path, fields: list[str]) -> Iterator[str]:
    """Yield the training texts of a .txt file (its lines) or of fields of a data file.

    Raises:
        ValueError: when the file cannot be read or a row lacks a field.
    """
    if path.suffix == ".txt":
        if not path.is_file():
            raise ValueError(f"{path}: must be a file; not found. Check the path.")
        yield from path.read_text(encoding="utf-8").splitlines()
        return
    for line, row in read_objects(path):
        for field in fields:
            value = row.get(field)
            if isinstance(value, list):
                yield from (message["content"] for message in value)
            elif isinstance(value, str):
                yield value
            else:
                raise ValueError(
                    f"{path}:{line}: {field}: must be text; the row has the fields: "
                    f"{', '.join(sorted(row))}. Use --fields."
                )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("files", type=Path, nargs="*", help=".jsonl, .jsonl.gz, .parquet or .txt")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="pieces, special ones included"
    )
    parser.add_argument("--fields", default="prompt,response", help="fields of a row to train on")
    parser.add_argument("--toy", action="store_true", help="train on the built-in task's text")
    parser.add_argument("--seed", type=int, default=0, help="of the built-in task's text")
    options = parser.parse_intermixed_args(arguments)
    if options.toy == bool(options.files):
        parser.error("give either files or --toy")
    return options


def main(arguments: list[str]) -> int:
    """Train and write; returns the exit code."""
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
        train_tokenizer(texts, options.out, vocab_size=options.vocab_size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
