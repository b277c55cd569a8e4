"""The user's own parsers, found by name."""

import pytest

from marlhf_mega.experience.parsers import load_parser


def test_a_parser_may_be_named_by_its_file(tmp_path):
    file = tmp_path / "lines_parser.py"
    file.write_text("class Lines:\n    def parse(self, text): return []\n")
    assert load_parser(f"{file}:Lines").parse("a") == []
    file.write_text("def Lines(): raise RuntimeError('no model\\nhere')")
    with pytest.raises(ValueError, match=r"file\.py:factory; no model\. Change it\.$"):
        load_parser(f"{file}:Lines")


@pytest.mark.parametrize("name", ["gone:at_all", "json:gone", "json", "/gone/parser.py:f"])
def test_a_parser_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"^macro.parser={name}: must be `rules`, `python`"):
        load_parser(name)
