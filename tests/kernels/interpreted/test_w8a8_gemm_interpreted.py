"""w8a8_gemm through Triton's interpreter, against int64 computed here from the codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qtool.kernels.integer_gemm import Tiling
from qtool.kernels.w8a8_gemm import w8a8_gemm

Guard = Callable[[Tensor], Tensor]

WHOLE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1)
IN_THREE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1, split_k=3)


def codes(rows: int, columns: int, guarded: Guard) -> Tensor:
    return guarded(torch.randint(-128, 128, (rows, columns), dtype=torch.int8))


def product(x: Tensor, w: Tensor) -> Tensor:
    return x.long() @ w.long().T


@pytest.mark.parametrize("tiling", [WHOLE, IN_THREE], ids=["whole", "in three"])
@pytest.mark.parametrize("shape", [(1, 5, 40), (1, 70, 257), (17, 70, 333), (3, 64, 384)], ids=str)
def test_an_integer_sum_is_exact(shape: tuple[int, int, int], tiling: Tiling, guarded: Guard) -> None:
    m, n, k = shape
    torch.manual_seed(0)
    x, w = codes(m, k, guarded), codes(n, k, guarded)
    one = guarded(torch.ones(1))
    y = w8a8_gemm(x, one, w, one, out_dtype=torch.float32, tiling=tiling)
    assert torch.equal(y.long(), product(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("token", [True, False], ids=["per token", "per tensor"])
def test_scales_and_bias_round_once_each(
    token: bool, dtype: torch.dtype, guarded: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, w = codes(5, 200, guarded), codes(70, 200, guarded)
    x_scale = guarded(torch.rand((5, 1)) if token else torch.rand(()))
    w_scale, bias = guarded(torch.rand(70) / 1000), guarded(torch.randn(70))
    y = w8a8_gemm(x, x_scale, w, w_scale, bias, dtype, tiling=WHOLE)
    expected = product(x, w).float() * w_scale * x_scale + bias
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    assert torch.equal(y, w8a8_gemm(x, x_scale, w, w_scale, bias, dtype))


def test_the_largest_codes_do_not_overflow(guarded: Guard) -> None:
    x, w = (guarded(torch.full((rows, 1024), -128, dtype=torch.int8)) for rows in (2, 3))
    y = w8a8_gemm(x, torch.ones(2), w, torch.ones(3), out_dtype=torch.float32, tiling=IN_THREE)
    assert (y == 128 * 128 * 1024).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_zeros_give_the_bias(bad: float, guarded: Guard) -> None:
    torch.manual_seed(0)
    x, w, bias = codes(3, 200, guarded), codes(70, 200, guarded), guarded(torch.randn(70))
    x_scale, w_scale = guarded(torch.tensor([1.0, bad, 0.0])), guarded(torch.ones(70))
    x[2] = 0
    w_scale[7] = bad
    y = w8a8_gemm(x, x_scale, w, w_scale, bias, torch.float32, tiling=WHOLE)
    good = torch.ones(70, dtype=torch.bool)
    good[7] = False
    assert not y[1].isfinite().any() and y[0, good].isfinite().all() and not y[0, 7].isfinite()
    assert torch.equal(y[2, good], bias[good])


def test_strided_rows_and_a_token_alone(guarded: Guard) -> None:
    torch.manual_seed(0)
    x, w = codes(20, 300, guarded)[:, :200], codes(70, 256, guarded)[:, 56:]
    x_scale, w_scale = torch.rand(20), torch.rand(140)[::2]
    out = torch.full((20, 90), 7.0)
    together = w8a8_gemm(x, x_scale, w, w_scale, out_dtype=torch.float32, out=out[:, :70], tiling=IN_THREE)
    assert torch.equal(together, product(x, w).float() * w_scale * x_scale[:, None]) and (out[:, 70:] == 7).all()
    alone = w8a8_gemm(x[18:19], x_scale[18:19], w, w_scale, out_dtype=torch.float32, tiling=WHOLE)
    assert torch.equal(alone[0], together[18])


def test_what_does_not_fit_is_refused() -> None:
    x, w, one = torch.zeros((3, 8), dtype=torch.int8), torch.zeros((5, 8), dtype=torch.int8), torch.ones(1)
    for name, arguments in {
        "x_codes": (x[:, :7], one, w, one),
        "weight": (x, one, w.to(torch.uint8), one),
        "x_scale": (x, torch.ones(4), w, one),
        "w_scale": (x, one, w, torch.ones(4)),
        "bias": (x, one, w, one, torch.ones(4)),
    }.items():
        with pytest.raises(ValueError, match=name):
            w8a8_gemm(*arguments)
