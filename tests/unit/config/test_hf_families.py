"""Class names and defaults of every architecture, against those of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlhf_mega.config.hf_families import COMMON_DEFAULTS, FAMILIES, class_name

SCRIPT = Path(__file__).with_name("transformers_defaults.py")
# Read in another way: Gemma's GeGLU whatever the field says, windows only where they are used.
READ_OTHERWISE = {"hidden_act", "sliding_window"}


@pytest.fixture(scope="module")
def theirs():
    done = subprocess.run(
        [sys.executable, SCRIPT, *FAMILIES],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", FAMILIES)
def test_classes_have_the_names_of_transformers(theirs, kind):
    heads = ("causal_lm", "sequence_classification")
    assert [class_name(kind, head) for head in heads] == theirs[kind]["classes"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_fields_mean_what_they_mean_to_transformers(theirs, kind):
    fields = theirs[kind]["fields"]
    ours = {
        name: value
        for name, value in (COMMON_DEFAULTS | dict(FAMILIES[kind].defaults)).items()
        # None is derived from other fields; theirs is derived already.
        if value is not None and name in fields and name not in READ_OTHERWISE
    }
    assert ours == {name: fields[name] for name in ours}
    assert {"max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"} <= set(ours)
