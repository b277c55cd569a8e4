import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.parsing import leaves
from marlhf_mega.algorithm.rule_chunker import RuleChunker


def brackets(text):
    def show(node):
        if not node.children:
            return text[node.start : node.end]
        return f"({node.label} " + " ".join(show(child) for child in node.children) + ")"

    return [show(sentence.tree) for sentence in RuleChunker().parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "The quick brown fox jumps over the lazy dog.",
            "(S (CLAUSE (NP The quick brown fox) (VP (VP jumps) (PP over the lazy dog))) .)",
        ),
        (
            "She gave him a book about astronomy.",
            "(S (CLAUSE (NP She) (VP (VP gave) (NP him) (NP a book) (PP about astronomy))) .)",
        ),
        (
            "I stayed because it was late",
            "(S (CLAUSE (NP I) (VP (VP stayed))) "
            "(CLAUSE (ADVP because) (NP it) (VP (VP was late))))",
        ),
        (
            "He may not have seen it, but they can wait.",
            "(S (CLAUSE (NP He) (VP (VP may not have seen) (NP it))) , "
            "(CLAUSE (NP but they) (VP (VP can wait))) .)",
        ),
        (
            "fish and chips",
            "(S (CLAUSE (NP fish and chips)))",
        ),
    ],
)
def test_constituents_of_plain_sentences(text, expected):
    assert brackets(text) == [expected]


def test_sentences_end_at_marks_and_line_breaks_but_not_at_titles_and_numbers():
    text = 'Mr. Smith paid 3.50 dollars. "Why?" He left\nwithout a word... Then e.g. nothing.'
    found = [text[s.start : s.end].strip() for s in RuleChunker().parse(text)]
    assert found == [
        "Mr. Smith paid 3.50 dollars.",
        '"Why?"',
        "He left",
        "without a word...",
        "Then e.g. nothing.",
    ]


def test_blank_text_has_no_sentence():
    assert RuleChunker().parse(" \n ") == []


@given(st.text(max_size=80))
def test_leaves_cover_every_visible_character_of_any_text(text):
    rest = list(text)
    for sentence in RuleChunker().parse(text):
        position = sentence.start
        for leaf in leaves(sentence.tree):
            assert position <= leaf.start < leaf.end <= sentence.end
            position = leaf.end
            rest[leaf.start : leaf.end] = " " * (leaf.end - leaf.start)
    assert not "".join(rest).strip()
