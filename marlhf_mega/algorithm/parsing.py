"""The parsing rule: macro actions are constituents of a syntax tree (MA-RLHF, arXiv 2410.02743).

A parser turns text into sentences with trees over character spans. `parse_boundaries` walks the
trees and splits the response, measured in policy tokens. It takes the text of one response and runs
on the CPU.

Any constituency parser will do. With spaCy and benepar, which this package does not install:

    class BeneparParser:
        def __init__(self):
            self.nlp = spacy.load("en_core_web_md")
            self.nlp.add_pipe("benepar", config={"model": "benepar_en3"})
        def parse(self, text):
            return [
                Sentence(s.start_char, s.end_char,
                         read_bracketed(s._.parse_string, text, s.start_char))
                for s in self.nlp(text).sents
            ]
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class ParseError(ValueError):
    """The text has no usable tree; the response is split into fixed n-grams instead."""


class Tree(NamedTuple):
    """A constituent, which covers the characters text[start:end]."""

    label: str
    children: tuple["Tree", ...]
    """Empty for a leaf (a word or a punctuation mark)."""
    start: int
    end: int


class Sentence(NamedTuple):
    """A sentence text[start:end] and its tree; None if the parser found none."""

    start: int
    end: int
    tree: Tree | None


class Parser(Protocol):
    """Finds the constituents of a text."""

    def parse(self, text: str) -> list[Sentence]:
        """Return the sentences in the order of the text; may raise ParseError."""
        ...


@dataclass(frozen=True)
class ParsedBoundaries:
    """Result of the parsing rule for one response."""

    starts: list[bool]
    """[tokens] True where a macro action starts."""
    fell_back: bool
    """Whether any sentence could not be parsed or aligned and was split into fixed n-grams."""


def parse_boundaries(
    text: str, offsets: Sequence[tuple[int, int]], parser: Parser, cutoff: int
) -> ParsedBoundaries:
    """Split one response into constituents.

    The tree of each sentence is walked depth first. A node with a single leaf joins the previous
    action of the sentence, or starts the first one; a node with fewer than `cutoff` tokens is an
    action; any other node is descended into. A token belongs to the leaf with its first non-blank
    character.

    Args:
        text: decoded response.
        offsets: [tokens] character span of every response token in text, in order; tokens without
            text (EOS) have an empty span at len(text) and stay in the last action.
        parser: see `Parser`.
        cutoff: in tokens, at least 1.

    Returns:
        Start flags; a sentence that cannot be parsed or aligned is split every `cutoff` tokens.
    """
    if cutoff < 1:
        raise ValueError(f"macro.cutoff={cutoff}: must be at least 1.")
    anchors = [_next_visible(text, start) for start, _ in offsets]
    if anchors != sorted(anchors):
        return ParsedBoundaries([i % cutoff == 0 for i in range(len(offsets))], True)
    starts = [i == 0 for i in range(len(offsets))]
    fell_back = False
    for begin, end, tree in _tile(text, parser):
        first, stop = bisect.bisect_left(anchors, begin), bisect.bisect_left(anchors, end)
        if tree is not None and _covers(text, begin, end, tree):
            cuts = [first, *_walk(tree, anchors, first, cutoff)[:-1]]
        else:
            cuts = list(range(first, stop, cutoff))
            fell_back = True
        for cut in cuts if first < stop else ():
            starts[cut] = True
    return ParsedBoundaries(starts, fell_back)


def _tile(text: str, parser: Parser) -> list[Sentence]:
    """Sentences that cover the text without gaps; text outside of sentences gets no tree."""
    try:
        sentences = parser.parse(text)
    except ParseError:
        sentences = []
    tiles: list[Sentence] = []
    begin = 0
    for _, end, tree in sentences:
        if end > begin:
            tiles.append(Sentence(begin, end, tree))
            begin = end
    if text[begin:].strip():
        tiles.append(Sentence(begin, len(text), None))
    return tiles


def _covers(text: str, begin: int, end: int, tree: Tree) -> bool:
    """Whether the leaves cover every visible character of text[begin:end] once and in order."""
    for leaf in leaves(tree):
        if not begin <= leaf.start < leaf.end <= end or text[begin : leaf.start].strip():
            return False
        begin = leaf.end
    return not text[begin:end].strip()


def _walk(tree: Tree, anchors: list[int], first: int, cutoff: int) -> list[int]:
    """End, as a token index, of every action of one sentence."""
    ends: list[int] = []
    cursor = first
    stack = [tree]
    while stack:
        node = stack.pop()
        stop = bisect.bisect_left(anchors, node.end)
        num_tokens = stop - cursor
        if num_tokens == 0:
            continue
        if _has_single_leaf(node) and ends:
            ends[-1] = stop
        elif _has_single_leaf(node) or num_tokens < cutoff:
            ends.append(stop)
        else:
            stack.extend(reversed(node.children))
            continue
        cursor = stop
    return ends


def _has_single_leaf(node: Tree) -> bool:
    while len(node.children) == 1:
        node = node.children[0]
    return not node.children


def leaves(tree: Tree) -> Iterator[Tree]:
    """Yield the leaves from left to right."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if not node.children:
            yield node
        stack.extend(reversed(node.children))


def _next_visible(text: str, position: int) -> int:
    """First position from `position` on without a blank, or the length of the text."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


_BRACKETED = re.compile(r"[()]|[^\s()]+")
_ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
    "``": '"', "''": '"',
}  # fmt: skip


def read_bracketed(bracketed: str, text: str, start: int = 0) -> Tree:
    """Read a Penn Treebank tree, `(S (NP (PRP We)) (VP (VBP agree)) (. !))`, and align it to text.

    Args:
        bracketed: one tree; brackets and quotes in words may be escaped as -LRB-, ``.
        text: contains the words in order, with blanks in between.
        start: position in text of the first word, or before it.

    Raises:
        ParseError: the brackets do not match, or a word is not the next visible text.
    """
    stack: list[list[Tree]] = [[]]
    labels: list[str] = []
    position, after_open = start, False
    for item in _BRACKETED.findall(bracketed):
        if item == "(":
            stack.append([])
            labels.append("")
        elif item == ")":
            if not labels:
                raise ParseError(f"tree={bracketed!r}: brackets must match; one closes too many.")
            stack[-2].append(_join(labels.pop(), stack.pop()))
        elif after_open:
            labels[-1] = item
        else:
            word, begin = _ESCAPES.get(item, item), _next_visible(text, position)
            if not text.startswith(word, begin):
                found = text[begin : begin + len(word)]
                raise ParseError(f"tree: word {word!r} must be the next text; it is {found!r}.")
            position = begin + len(word)
            stack[-1].append(Tree("", (), begin, position))
        after_open = item == "("
    if labels or len(stack[0]) != 1:
        raise ParseError(f"tree={bracketed!r}: must be one bracketed tree.")
    return stack[0][0]


def _join(label: str, children: list[Tree]) -> Tree:
    if not children:
        raise ParseError(f"tree: node {label!r} must have a word or a child; it has none.")
    if len(children) == 1 and children[0].label == "":
        return children[0]._replace(label=label)
    return Tree(label, tuple(children), children[0].start, children[-1].end)
