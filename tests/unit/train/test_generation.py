"""What is said of an engine whose log-probs are not those of training."""

import logging
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.train.generation import warn_of_gap


def said(caplog, gap, dtype="float32", **rollout):
    platform = SimpleNamespace(name="cpu", default_dtype=torch.float32)
    mesh = SimpleNamespace(platform=platform, rank=0)
    keys = {"precision": {"dtype": dtype}, "rollout": {"engine": "vllm"} | rollout}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_gap(Config.model_validate(keys), mesh, {"rollout/logprob_gap": gap})
    return caplog.text


def test_an_engine_that_computes_something_else_is_told_of(caplog):
    text = said(caplog, 2e-3)
    assert "rollout/logprob_gap is 2.0e-03, over 1e-04: vLLM computes something else" in text
    assert "Compare with rollout.engine=own" in text


@pytest.mark.parametrize(
    ("gap", "keys"),
    [
        (9e-5, {}),
        (2e-3, {"engine": "own"}),
        (2e-3, {"dtype": "bfloat16"}),
        (2e-3, {"ranks": 1, "staleness": 1}),
    ],
)
def test_rounding_and_older_weights_are_not(caplog, gap, keys):
    assert said(caplog, gap, **keys) == ""
