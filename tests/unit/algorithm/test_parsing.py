import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.parsing import (
    ParseError,
    Sentence,
    Tree,
    leaves,
    parse_boundaries,
    read_bracketed,
)
from marlhf_mega.algorithm.rule_chunker import RuleChunker

FOX = "The quick brown fox jumps over the lazy dog."
FOX_TREE = (
    "(S (NP (DT The) (JJ quick) (JJ brown) (NN fox)) (VP (VBZ jumps) "
    "(PP (IN over) (NP (DT the) (JJ lazy) (NN dog)))) (. .))"
)
AGREE_TREE = "(S (NP (PRP We)) (VP (VBP agree)) (. !))"


class Given:
    """Answers with prepared sentences; a text instead of a tree is bracketed."""

    def __init__(self, *sentences):
        self.sentences = sentences

    def parse(self, text):
        found, start = [], 0
        for sentence, tree in self.sentences:
            start = text.index(sentence, start)
            end = start + len(sentence)
            tree = read_bracketed(tree, text, start) if isinstance(tree, str) else tree
            found.append(Sentence(start, end, tree))
            start = end
        return found


def tokenize(text, size=4):
    """Blank plus up to `size` word characters, one mark or one blank; and EOS."""
    offsets = [m.span() for m in re.finditer(rf" ?\w{{1,{size}}}| ?[^\w\s]|\s", text)]
    return [*offsets, (len(text), len(text))]


def actions(text, parser, cutoff=5, offsets=None):
    """The text of every action, and whether the parse fell back."""
    offsets = tokenize(text) if offsets is None else offsets
    found = parse_boundaries(text, offsets, parser, cutoff)
    pieces = []
    for start, (begin, end) in zip(found.starts, offsets, strict=True):
        if start:
            pieces.append("")
        pieces[-1] += text[begin:end]
    return pieces, found.fell_back


def test_single_leaves_join_the_action_before_and_small_constituents_are_actions():
    assert actions(FOX, Given((FOX, FOX_TREE))) == (
        ["The quick brown fox jumps", " over the lazy dog."],
        False,
    )


def test_every_sentence_starts_an_action_and_line_breaks_are_counted():
    text = FOX + "\n\nWe agree!"
    parser = Given((FOX, FOX_TREE), ("We agree!", AGREE_TREE))
    assert actions(text, parser, cutoff=4) == (
        ["The quick brown fox jumps over", " the lazy dog.", "\n\nWe agree!"],
        False,
    )


def test_a_large_cutoff_makes_sentences_actions_and_one_makes_single_leaves_join():
    assert actions(FOX, Given((FOX, FOX_TREE)), cutoff=100) == ([FOX], False)
    assert actions(FOX, Given((FOX, FOX_TREE)), cutoff=1) == ([FOX], False)


def test_a_token_across_two_leaves_belongs_to_the_first():
    text = "We agree!"
    offsets = [(0, 5), (5, 8), (8, 9), (9, 9)]  # "We ag", "ree", "!", EOS
    tree = "(S (NP (PRP We)) (VP (VBP agree) (. !)))"
    assert actions(text, Given((text, tree)), 2, offsets) == (["We agree!"], False)
    tree = "(S (X (PRP We) (VBP agree)) (Y (. !) ))"
    assert actions(text, Given((text, tree)), 3, offsets)[0] == ["We agree!"]


def test_a_sentence_without_a_tree_falls_back_to_ngrams_alone():
    text = "Aa bb cc dd ee ff gg. We agree!"
    parser = Given(("Aa bb cc dd ee ff gg.", None), ("We agree!", AGREE_TREE))
    assert actions(text, parser, cutoff=3) == (
        ["Aa bb cc", " dd ee ff", " gg.", " We agree!"],
        True,
    )


@pytest.mark.parametrize(
    "tree",
    [
        Tree("S", (Tree("A", (), 0, 2),), 0, 2),  # leaves "agree!" out
        Tree("S", (Tree("A", (), 0, 5), Tree("B", (), 3, 9)), 0, 9),  # overlaps
        Tree("S", (Tree("A", (), 3, 9), Tree("B", (), 0, 2)), 0, 9),  # out of order
        Tree("S", (Tree("A", (), 0, 90),), 0, 90),  # beyond the sentence
    ],
)
def test_a_tree_that_does_not_cover_its_sentence_falls_back(tree):
    found, fell_back = actions("We agree!", Given(("We agree!", tree)), cutoff=2)
    assert (found, fell_back) == (["We agre", "e!"], True)


def test_text_that_no_sentence_covers_falls_back():
    parser = Given(("We agree!", AGREE_TREE))
    assert actions("We agree! Aa bb cc dd", parser, cutoff=3) == (
        ["We agree!", " Aa bb cc", " dd"],
        True,
    )


class Fails:
    def parse(self, text):
        raise ParseError("no tree")


def test_a_parser_that_gives_up_falls_back():
    assert actions("Aa bb cc dd", Fails(), cutoff=3) == (["Aa bb cc", " dd"], True)


def test_offsets_out_of_order_fall_back():
    found = parse_boundaries(FOX, [(4, 9), (0, 3), (10, 15)], Given((FOX, FOX_TREE)), 2)
    assert (found.starts, found.fell_back) == ([True, False, True], True)


def test_a_response_without_text_is_one_action():
    assert parse_boundaries("", [(0, 0)], RuleChunker(), 5).starts == [True]
    assert parse_boundaries("", [], RuleChunker(), 5).starts == []


def test_cutoff_must_be_positive():
    with pytest.raises(ValueError, match=r"^macro\.cutoff=0: must be at least 1\."):
        parse_boundaries(FOX, tokenize(FOX), RuleChunker(), 0)


def test_bracketed_trees_are_aligned_to_the_text():
    text = 'He said "no" (twice).'
    tree = read_bracketed(
        "( (S (NP (PRP He)) (VP (VBD said) (`` ``) (UH no) ('' '') (-LRB- -LRB-) (RB twice)"
        " (-RRB- -RRB-)) (. .)))",
        text,
    )
    words = [text[leaf.start : leaf.end] for leaf in leaves(tree)]
    assert words == ["He", "said", '"', "no", '"', "(", "twice", ")", "."]
    assert [leaf.label for leaf in leaves(tree)][:2] == ["PRP", "VBD"]
    assert (tree.start, tree.end) == (0, len(text))


@pytest.mark.parametrize(
    ("bracketed", "message"),
    [
        ("(S (NP We)", r"^tree='\(S \(NP We\)': must be one bracketed tree\."),
        ("(S We))", r"^tree='\(S We\)\)': brackets must match; one closes too many\."),
        ("(S (NP))", r"^tree: node 'NP' must have a word or a child; it has none\."),
        ("(S They)", r"^tree: word 'They' must be the next text; it is 'We a'\."),
        ("", r"^tree='': must be one bracketed tree\."),
    ],
)
def test_bad_bracketed_trees_are_refused(bracketed, message):
    with pytest.raises(ParseError, match=message):
        read_bracketed(bracketed, "We agree!")


@given(
    st.text(alphabet="ab. ,\n(A", max_size=60),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_any_text_is_cut_into_actions_that_join_to_the_whole(text, cutoff, size):
    offsets = tokenize(text, size)
    for parser in (RuleChunker(), Fails()):
        found = parse_boundaries(text, offsets, parser, cutoff)
        assert len(found.starts) == len(offsets)
        assert found.starts[0]
        assert len(offsets) == 1 or not found.starts[-1]
        assert found.fell_back == (isinstance(parser, Fails) and bool(text.strip()))
