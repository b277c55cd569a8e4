"""Which adapters a section means, and what is refused in one line."""

import pytest

from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.config.lora import LoraConfig


def refused(*overrides):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    (line,) = str(error.value).splitlines()
    return line


def test_without_a_rank_there_are_no_adapters():
    lora = LoraConfig()
    assert not lora.is_on
    assert lora.modules == ()
    assert lora.adapted("self_attention.linear_qkv") == ()


def test_targets_are_those_of_the_fused_projections_in_the_order_of_their_rows():
    lora = LoraConfig(rank=4, targets=("v_proj", "q_proj", "down_proj"))
    assert lora.modules == ("q_proj", "v_proj", "down_proj")
    assert lora.adapted("self_attention.linear_qkv") == ("q_proj", "v_proj")
    assert lora.adapted("mlp.linear_fc1") == ()
    assert len(LoraConfig(rank=4).modules) == 7
    assert LoraConfig(rank=4, targets="q_proj").targets == ("q_proj",)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    assert LoraConfig(rank=16).scale == 2.0
    assert LoraConfig(rank=16, alpha=8).scale == 0.5
    assert LoraConfig(rank=16, alpha=8, rank_stabilized=True).scale == 2.0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.lora.rank=0"],
            "model.lora.rank=0: input should be greater than 0. Change the value, or write null to "
            "unset it.",
        ),
        (
            ["model.lora.rank=4", "model.lora.targets=[q_proj,query]"],
            "model.lora.targets=[query]: must name projections; known are q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj, all-linear. Use these.",
        ),
        (
            ["model.lora.rank=4", "model.lora.dropout=1"],
            "model.lora.dropout=1: input should be less than 1. Change the value.",
        ),
        (
            ["model.lora.dropout=0.1"],
            "model.lora.dropout=0.1: needs model.lora.rank, which is not set. Set it, or remove "
            "dropout.",
        ),
        (
            ["model.lora.alpha=16"],
            "model.lora.alpha=16.0: needs model.lora.rank, which is not set. Set it, or remove "
            "alpha.",
        ),
        (
            ["model.lora.targets=[q_proj]"],
            "model.lora.targets=[q_proj]: needs model.lora.rank, which is not set. Set it, or "
            "remove targets.",
        ),
        (["model.lora.ranc=4"], "model.lora.ranc: unknown key. Did you mean model.lora.rank?"),
    ],
)
def test_wrong_values_are_refused_in_one_line(overrides, line):
    assert refused(*overrides) == line
