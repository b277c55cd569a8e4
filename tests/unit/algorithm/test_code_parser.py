import pytest

pytest.importorskip("tree_sitter_python")

from marlhf_mega.algorithm.code_parser import TreeSitterParser
from marlhf_mega.algorithm.parsing import leaves, parse_boundaries

PROGRAM = '''def area(r):
    """Kreisfläche \\n of a circle"""
    return 3.14 * r ** 2  # rough

print(f"{area(2)} é", \\
      sep="")
'''


def words(text):
    return [
        [text[leaf.start : leaf.end] for leaf in leaves(sentence.tree)]
        for sentence in TreeSitterParser().parse(text)
    ]


def test_statements_become_trees_with_character_spans():
    assert words("x = f(1)\nif x:\n    y = 'ä'\n") == [
        ["x", "=", "f", "(", "1", ")"],
        ["if", "x", ":", "y", "=", "'", "ä", "'"],
    ]


@pytest.mark.parametrize("text", [PROGRAM, PROGRAM[:50], "def (:\n  ]]] x", "(" * 3000, "a+" * 900])
def test_leaves_cover_programs_whole_cut_off_or_broken(text):
    found = parse_boundaries(text, [(i, i + 1) for i in range(len(text))], TreeSitterParser(), 5)
    assert not found.fell_back
    assert found.starts[0]


def test_top_level_statements_start_actions():
    text = "a = 1\nb = 2\nc = 3\n"
    offsets = [(i, i + 1) for i in range(len(text))]
    found = parse_boundaries(text, offsets, TreeSitterParser(), 100)
    # The line break goes with what follows it.
    assert [i for i, start in enumerate(found.starts) if start] == [0, 5, 11]
