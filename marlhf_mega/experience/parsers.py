"""The parser that `macro.parser` names."""

from marlhf_mega.algorithm.parsing import Parser
from marlhf_mega.algorithm.rule_chunker import RuleChunker
from marlhf_mega.user_code import load_function


def load_parser(name: str) -> Parser:
    """Return a parser: `rules`, `python`, or what `module:factory` or `file.py:factory` makes.

    Raises:
        ValueError: it cannot be imported.
    """
    if name == "rules":
        return RuleChunker()
    try:
        if name == "python":
            from marlhf_mega.algorithm.code_parser import TreeSitterParser

            return TreeSitterParser()
        parser: Parser = load_function(name)()
    except Exception as error:  # noqa: BLE001 the user's code may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"macro.parser={name}: must be `rules`, `python` (needs the extra `code`) or an "
            f"importable module:factory or file.py:factory; {reason}. Change it."
        ) from None
    return parser
