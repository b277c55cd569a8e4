import math

import pytest
import torch

from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics


def declared() -> MetricSums:
    return MetricSums(
        mean=["policy/loss", "rollout/score_mean"],
        total=["data/tokens"],
        maximum=["perf/peak_memory_gib"],
    )


def combine(ranks: list[MetricSums]) -> dict[str, float]:
    """All-reduce by hand over ranks that live in one process."""
    packed = [rank.pack() for rank in ranks]
    return reduce_metrics(
        ranks[0],
        lambda _: torch.stack([added for added, _ in packed]).sum(0),
        lambda _: torch.stack([maxima for _, maxima in packed]).amax(0),
    )


def test_mean_is_the_global_sum_over_the_global_count_not_a_mean_of_means():
    first, second = declared(), declared()
    first.add_means({"policy/loss": torch.tensor(6.0)}, count=torch.tensor(3))
    first.add_means({"policy/loss": 2.0}, count=1)
    second.add_means({"policy/loss": torch.tensor(1.0)}, count=1)
    assert combine([first, second])["policy/loss"] == pytest.approx(9.0 / 5.0)


def test_totals_and_maxima_over_ranks():
    first, second = declared(), declared()
    for rank, tokens, memory in ((first, 10, 1.5), (second, 5, 2.5)):
        rank.add_total("data/tokens", tokens)
        rank.add_maximum("perf/peak_memory_gib", torch.tensor(memory))
        rank.add_maximum("perf/peak_memory_gib", -1.0)
    values = combine([first, second])
    assert values == {"data/tokens": 15, "perf/peak_memory_gib": 2.5}


def test_every_element_of_a_tensor_counts():
    sums = declared()
    sums.add_mean("rollout/score_mean", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert combine([sums]) == {"data/tokens": 0.0, "rollout/score_mean": 3.0}


def test_a_rank_that_adds_nothing_changes_nothing():
    busy = declared()
    busy.add_means({"policy/loss": 3.0}, count=2)
    busy.add_maximum("perf/peak_memory_gib", 7.0)
    assert combine([busy, declared(), declared()]) == combine([busy])


def test_ranks_pack_the_same_layout_whatever_the_order_of_declaration():
    first = MetricSums(mean=["a", "b"], maximum=["c", "d"])
    second = MetricSums(maximum=["d", "c"], mean=["b", "a"])
    for rank in (first, second):
        rank.add_means({"a": 1.0}, count=1)
        rank.add_means({"b": 2.0}, count=1)
        rank.add_maximum("c", 3.0)
        rank.add_maximum("d", 4.0)
    assert combine([first, second]) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def test_sums_are_kept_in_float64():
    sums = MetricSums(total=["n"])
    sums.add_total("n", 2**24)
    sums.add_total("n", torch.tensor(1.0, dtype=torch.float32))
    assert combine([sums])["n"] == 2**24 + 1


def test_a_nan_is_seen_not_hidden():
    sums = declared()
    sums.add_means({"policy/loss": torch.tensor(math.nan)}, count=4)
    sums.add_maximum("perf/peak_memory_gib", 1.0)
    sums.add_maximum("perf/peak_memory_gib", math.nan)
    values = combine([sums])
    assert math.isnan(values["policy/loss"])
    assert math.isnan(values["perf/peak_memory_gib"])


def test_undeclared_names_and_double_declarations_are_refused():
    with pytest.raises(KeyError):
        declared().add_total("policy/loss_typo", 1.0)
    with pytest.raises(AssertionError, match="declared twice"):
        MetricSums(mean=["a"], total=["a"])


def test_values_keep_no_graph():
    sums = declared()
    loss = torch.ones(3, requires_grad=True).sum()
    sums.add_means({"policy/loss": loss}, count=3)
    assert not sums.pack()[0].requires_grad


def test_moments_are_a_mean_and_a_variance_and_never_negative():
    sums = MetricSums(moments=["x", "unused"])
    sums.add_moments("x", torch.tensor([1.0, 2.0]))
    sums.add_moments("x", torch.tensor([6.0, 0.0]), count=1)
    found = reduce_metrics(sums, lambda v: v, lambda v: v)
    assert found == {"x_mean": 3.0, "x_variance": pytest.approx(14 / 3)}
    same = MetricSums(moments=["x"])
    same.add_moments("x", torch.full((3,), 0.1))
    assert reduce_metrics(same, lambda v: v, lambda v: v)["x_variance"] >= 0.0
