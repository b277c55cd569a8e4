"""Syntax trees of Python code for the parsing rule, by tree-sitter (the extra `code`)."""

import bisect
from itertools import accumulate

import tree_sitter
import tree_sitter_python

from marlhf_mega.algorithm.parsing import Sentence, Tree

MAX_DEPTH = 200
"""Deeper nodes become leaves, which bounds the recursion on text such as 500 brackets."""


class TreeSitterParser:
    """Finds constituents of Python code; top-level statements are its sentences.

    Code with errors still parses: tree-sitter wraps what it cannot place in an ERROR node.
    """

    def __init__(self) -> None:
        self._parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))

    def parse(self, text: str) -> list[Sentence]:
        """Return one sentence per top-level statement or comment."""
        root = self._parser.parse(text.encode()).root_node
        char_ends = list(accumulate(len(char.encode()) for char in text))
        trees = [_convert(child, text, char_ends, depth=0) for child in root.children]
        return [Sentence(tree.start, tree.end, tree) for tree in trees if tree.end > tree.start]


def _convert(node: tree_sitter.Node, text: str, char_ends: list[int], *, depth: int) -> Tree:
    """Convert a syntax node; drop its children if they leave visible text uncovered."""
    start = bisect.bisect_right(char_ends, node.start_byte)
    end = bisect.bisect_right(char_ends, node.end_byte)
    children = [
        _convert(child, text, char_ends, depth=depth + 1)
        for child in (node.children if depth < MAX_DEPTH else ())
        if child.end_byte > child.start_byte
    ]
    position = start
    for child in children:
        if text[position : child.start].strip():
            return Tree(node.type, (), start, end)
        position = child.end
    if text[position:end].strip():
        children = []
    return Tree(node.type, tuple(children), start, end)
