"""The CPU's matrix product against float64, in every memory order that projections use."""

import pytest
import torch

from marlhf_mega.platform.cpu import matmul as module
from marlhf_mega.platform.cpu.matmul import (
    MIN_MULTIPLICATIONS,
    PRODUCTS,
    faster,
    matmul,
    measured,
    use,
)


def draw(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(128, 96, 112), (1, 1024, 1200), (2100, 32, 17)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_large_products_agree_with_float64_in_every_memory_order(sizes, transposed):
    rows, inner, columns = sizes
    assert rows * inner * columns >= MIN_MULTIPLICATIONS
    left, right = draw(rows, inner, 0), draw(inner, columns, 1)
    given = [
        x.t().contiguous().t() if flip else x
        for x, flip in zip((left, right), transposed, strict=True)
    ]
    found = matmul(*given)
    assert found.shape == (rows, columns)
    error = (found.double() - left.double() @ right.double()).abs().max()
    assert error < 1e-5 * inner**0.5


@pytest.mark.parametrize(
    ("rows", "dtype"), [(0, torch.float32), (3, torch.float32), (64, torch.float64)]
)
def test_small_products_and_other_dtypes_are_left_to_torch(rows, dtype):
    left, right = draw(rows, 256, 0).to(dtype), draw(256, 128, 1).to(dtype)
    assert torch.equal(matmul(left, right), left @ right)


def test_bfloat16_stays_bfloat16():
    left, right = draw(128, 128, 0).bfloat16(), draw(128, 128, 1).bfloat16()
    assert torch.equal(matmul(left, right), left @ right)


@pytest.mark.parametrize("sizes", [(704, 100, 128), (33, 512, 128), (8, 640, 256), (2112, 2048, 8)])
def test_a_transposed_factor_is_right_on_several_threads(sizes):
    rows, inner, columns = sizes
    left, right = draw(inner, rows, 0).t(), draw(inner, columns, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = matmul(left, right)
    finally:
        torch.set_num_threads(threads)
    error = (found.double() - left.double() @ right.double()).abs().max()
    assert error < 1e-5 * inner**0.5


@pytest.fixture
def onednn():
    yield
    use(dict.fromkeys(PRODUCTS, "onednn"))


@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_each_kind_of_product_goes_to_the_library_that_was_chosen(onednn, monkeypatch, library):
    seen = []
    monkeypatch.setattr(module, "_onednn", lambda a, b: seen.append("onednn") or a @ b)
    hidden, grad, weight = draw(128, 128, 0), draw(128, 96, 1), draw(96, 128, 2)
    use(dict.fromkeys(PRODUCTS, "torch"))
    cases = {
        "forward": (hidden, weight.t()),
        "input_gradient": (grad, weight),
        "weight_gradient": (grad.t(), hidden),
    }
    for kind, factors in cases.items():
        matmul(*factors)
        assert seen == []
        use({kind: library})
        matmul(*factors)
        assert seen == ["onednn"] * (library == "onednn")
        use({kind: "torch"})
        seen.clear()


def test_a_library_that_is_hardly_faster_is_not_chosen():
    assert faster({"forward": 1.1, "decode": 1.2, "input_gradient": 0.5}) == {
        "forward": "onednn",
        "decode": "torch",
        "input_gradient": "onednn",
    }


def test_all_kinds_are_measured():
    ratios = measured(64, 48)
    assert set(ratios) == set(PRODUCTS)
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_slower_one_is_told(monkeypatch):
    clock = iter([0, 4, 4, 6] * 5)  # torch 4 s, oneDNN 2 s
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(module.time, name, lambda: next(clock))
    assert module._ratio(lambda: None, lambda: None) == 0.5
