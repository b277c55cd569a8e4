"""A rule-based English chunker: approximate constituents without a model or a dependency.

Closed-class words, a few suffixes and punctuation give sentence -> clauses -> noun, verb and
prepositional phrases -> words. It is no full parser: attachment is not resolved, and unusual verbs
are taken for nouns. It never fails, so every sentence has a tree.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from marlhf_mega.algorithm.parsing import Sentence, Tree

_TITLES = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Ms", "Dr", "St"))
_SENTENCE_END = re.compile(_TITLES + r"""[.!?]+["')\]]*(?=\s+["'(\[]?[A-Z0-9]|\s*$)|\n""")
_WORD = re.compile(r"\w+(?:[-'.,]\w+)*|[^\w\s]+?")

_CLOSED_CLASSES = {
    "DET": "a an the this that these those my your his her its our their some any each every no "
    "another both all either neither",
    "PRON": "i you he she it we they me him us them who whom myself itself themselves someone "
    "something everyone everything anyone anything nobody nothing there",
    "PREP": "of in on at by for from with without about into onto over under between among through "
    "during before after above below near behind beside beyond against along around across "
    "toward towards upon within like as than per via off",
    "SUB": "because although though while when whenever where wherever if unless until since so "
    "whether which whose",
    "CONJ": "and or but nor yet",
    "AUX": "be am is are was were been being have has had having do does did can could may might "
    "must shall should will would isn't aren't wasn't weren't haven't hasn't hadn't don't doesn't "
    "didn't can't couldn't won't wouldn't shouldn't to it's i'm you're he's she's we're they're",
    "ADV": "not never always often very too also just only quite rather still already soon then "
    "here now again almost even",
    "VERB": "gave went saw took made said came got ran told knew thought found felt left kept let "
    "put set sat stood wrote read ate drank bought brought built held met paid sold sent spent "
    "won lost led became began fell grew heard agree serves offers provides makes gives",
}
_TAGS = {word: tag for tag, words in _CLOSED_CLASSES.items() for word in words.split()}
_SUBJECTS = frozenset(["i", "you", "he", "she", "we", "they", "who"])
_PHRASES = {"VERB": "VP", "AUX": "VP", "PREP": "PP", "DET": "NP", "PRON": "NP", "NOUN": "NP"}


class RuleChunker:
    """Parser for any English text, see the module."""

    def parse(self, text: str) -> list[Sentence]:
        """Return one tree per sentence; line breaks end sentences too."""
        cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
        sentences = []
        for start, end in pairwise(cuts):
            words = _tag([(m.group(), start + m.start()) for m in _WORD.finditer(text[start:end])])
            if words:
                tree = _node("S", list(_clauses(words)))
                sentences.append(Sentence(start, end, tree))
        return sentences


def _tag(words: list[tuple[str, int]]) -> list[Tree]:
    """Label words as DET, PRON, PREP, SUB, CONJ, AUX, ADV, VERB, NOUN or PUNCT."""
    leaves: list[Tree] = []
    expects_verb = False
    for index, (word, start) in enumerate(words):
        lower = word.lower()
        tag = _TAGS.get(lower) or ("NOUN" if word[0].isalnum() else "PUNCT")
        before = leaves[-1].label if leaves else "PUNCT"
        following = words[index + 1][0].lower() if index + 1 < len(words) else "."
        if tag == "NOUN" and lower.endswith("ly"):
            tag = "ADV"
        elif tag == "NOUN" and (expects_verb or _looks_like_verb(lower, before, following)):
            tag = "VERB"
        if tag != "ADV":
            expects_verb = tag == "AUX" or lower in _SUBJECTS
        leaves.append(Tree(tag, (), start, start + len(word)))
    return leaves


def _looks_like_verb(word: str, before: str, following: str) -> bool:
    """Judge by suffix and neighbours: `jumped` after a noun, `jumps` before a preposition."""
    if before not in ("NOUN", "PRON", "VERB", "ADV"):
        return False
    if len(word) > 4 and word.endswith(("ed", "ing")):
        return True
    opens_phrase = _TAGS.get(following) in ("DET", "PRON", "PREP", "ADV") or following in ".!?"
    return before != "VERB" and word.endswith("s") and not word.endswith("ss") and opens_phrase


def _clauses(words: list[Tree]) -> Iterator[Tree]:
    """Split at punctuation, before subordinators, and before conjunctions between two verbs."""
    clause: list[Tree] = []
    verbs_left = sum(_is_verb(word) for word in words)
    verbs_in_clause = 0
    for word in words:
        joins_verbs = word.label == "CONJ" and verbs_in_clause and verbs_left
        if clause and (word.label in ("SUB", "PUNCT") or joins_verbs):
            yield _node("CLAUSE", list(_phrases(clause)))
            clause, verbs_in_clause = [], 0
        if word.label == "PUNCT":
            yield word
            continue
        clause.append(word)
        verbs_in_clause += _is_verb(word)
        verbs_left -= _is_verb(word)
    if clause:
        yield _node("CLAUSE", list(_phrases(clause)))


def _phrases(clause: list[Tree]) -> Iterator[Tree]:
    """Group into phrases; a verb phrase includes its objects up to the next verb."""
    phrase: list[Tree] = []
    outer: list[Tree] = []
    for word, before in zip(clause, [None, *clause], strict=False):
        verb_group = _is_verb(word) and before is not None and _is_verb(before)
        if phrase and not verb_group and _opens_phrase(word, before):
            outer.append(_phrase(phrase))
            phrase = []
        if outer and _is_verb(word) and not verb_group:
            yield from _verb_phrase(outer)
            outer = []
        phrase.append(word)
    yield from _verb_phrase([*outer, _phrase(phrase)])


def _opens_phrase(word: Tree, before: Tree | None) -> bool:
    assert before is not None
    match word.label:
        case "NOUN":
            return before.label in ("VERB", "AUX", "PRON", "SUB")
        case "DET" | "PRON":
            return before.label not in ("PREP", "CONJ", "DET")
        case "CONJ":
            return False
        case "ADV":
            return before.label not in ("AUX", "DET", "ADV")
        case _:
            return before.label not in ("ADV", "SUB")


def _verb_phrase(phrases: list[Tree]) -> list[Tree]:
    """Join a leading verb group and what follows it into one phrase."""
    return [_node("VP", phrases)] if phrases[0].label == "VP" else phrases


def _phrase(words: list[Tree]) -> Tree:
    label = next((_PHRASES[word.label] for word in words if word.label in _PHRASES), "ADVP")
    return _node(label, words)


def _is_verb(word: Tree) -> bool:
    return word.label in ("VERB", "AUX")


def _node(label: str, children: list[Tree]) -> Tree:
    return Tree(label, tuple(children), children[0].start, children[-1].end)
