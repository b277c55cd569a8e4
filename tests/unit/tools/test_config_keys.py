"""The reference of the keys is what the schema says."""

from pathlib import Path

from tools.config_keys import TARGET, reference


def test_the_page_is_current():
    """After a change of the schema: python tools/config_keys.py."""
    assert Path(__file__).parents[3] / "configs" / "KEYS.md" == TARGET
    assert TARGET.read_text(encoding="utf-8") == reference()


def test_a_row_has_values_default_and_meaning():
    page = reference()
    for row in (
        "| `macro.random_mode` | `list`, `cycle` | `cycle` | `random_ngram`: what follows the list: "
        "one last action (`list`), or another shuffled list (`cycle`). |",
        "| `reward.source.N.weight` | number | `1.0` | Factor of this source's scores. |",
        "| `ppo.gae_lambda` | number >= 0 <= 1 | `0.95` | Lambda of generalised advantage "
        "estimation. |",
        "| `tokenizer.path` | path or null | `null` | A SentencePiece .model file or a Hugging Face "
        "tokenizer folder. None means `model.hf_path`. |",
    ):
        assert f"{row}\n" in page
