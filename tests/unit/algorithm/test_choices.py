"""A name that stands for no formula is refused where the formula is chosen."""

from functools import partial

import pytest
import torch

import marlhf_mega.algorithm as ma

MASK = torch.tensor([[True, True, True], [True, True, False]])
ACTIONS = ma.MacroActions.from_starts(ma.fixed_ngram(MASK, n=2), MASK)
ZEROS = torch.zeros(2, 3)
PAIR = (ZEROS, ZEROS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            partial(ma.policy_loss, *PAIR, ZEROS, ACTIONS, ratio="foo"),
            "ratio=foo: must be one of token, macro, macro_geo. Choose one.",
        ),
        (partial(ma.policy_loss, *PAIR, ZEROS, ACTIONS, aggregation="foo"), "aggregation=foo: "),
        (partial(ma.value_loss, *PAIR, ZEROS, ACTIONS, target="foo"), "target=foo: must be one "),
        (
            partial(ma.kl_loss, *PAIR, ACTIONS, estimator="foo"),
            "estimator=foo: must be one of k1, ",
        ),
        (partial(ma.sampler_mask, *PAIR, ACTIONS, unit="foo", bounds=(0.5, 2)), "unit=foo: must "),
        (partial(ma.value_weights, ACTIONS, "foo", dtype=torch.float32), "rule=foo: must be one "),
        (partial(ma.random_ngram, MASK, lengths=[2], repeats=1, mode="foo", keys=None), "mode=foo"),
        (partial(ma.perplexity, MASK, ZEROS, form="foo"), "form=foo: must be one of token, prefix"),
        (partial(ma.post_process, MASK, MASK, eos="foo"), "eos=foo: must be one of join, own."),
        (partial(ma.handle_missing_eos, ZEROS[0], MASK[0], mode="foo", value=1), "mode=foo: must "),
        (partial(ma.shape_scores, ZEROS[0], None, normalize="foo"), "normalize=foo: must be one "),
        (partial(ma.sampling_probabilities, ZEROS[0], "foo"), "strategy=foo: must be one of good_"),
        (
            partial(ma.offline_loss, "foo", *PAIR, MASK, rewards=ZEROS[0], values=ZEROS[0]),
            "algorithm=foo: must be one of ",
        ),
        (
            partial(
                ma.offline_loss,
                "nll",
                *PAIR,
                MASK,
                rewards=ZEROS[0],
                values=ZEROS[0],
                compat="foo",
            ),
            "compat=foo: must be one of none, lol_rl.",
        ),
        (partial(ma.MacroActions.from_starts, MASK, MASK, compat="foo"), "compat=foo: must be one"),
        *(
            (
                partial(
                    ma.macro_advantages,
                    *PAIR,
                    ACTIONS,
                    **{"value_rule": "equal", "macro_reward": "sum", key: "foo"},
                    gamma=1.0,
                    gae_lambda=1.0,
                ),
                f"{key}=foo: must be one of ",
            )
            for key in ("macro_reward", "discount", "lambda_unit")
        ),
    ],
)
def test_a_name_that_stands_for_no_formula_is_refused(call, message):
    with pytest.raises(ValueError, match="foo") as caught:
        call()
    assert str(caught.value).startswith(message)
