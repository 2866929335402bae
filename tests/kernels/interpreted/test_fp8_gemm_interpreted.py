"""FP8 × FP8 through the interpreter against float64, within the error of a float32 sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qtool.errors import UsageError
from qtool.kernels.float_gemm import Tiling, workspace
from qtool.kernels.fp8_gemm import fp8_gemm

Guard = Callable[[Tensor], Tensor]
HALF_A_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def codes(rows: int, columns: int, seed: int) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 60
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def scale(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def wide(per_block: Tensor, rows: int, columns: int) -> Tensor:
    """Any form of scale as float64 [rows, columns]."""
    values = per_block.double().reshape(1, 1) if per_block.numel() == 1 else per_block.double()
    values = values[:, None] if values.dim() == 1 else values
    down = 128 if values.shape[0] not in (1, rows) else 1
    across = 128 if values.shape[1] > 1 else 1
    values = values.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    return values.expand(rows, columns)


def assert_is_the_product(y: Tensor, x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None) -> None:
    """Within (K + 8) × 2⁻²⁴ of the sum of the terms' sizes, and half a unit in the last place of y's type."""
    k = x.shape[1]
    left, right = x.double() * wide(xs, *x.shape), w.double() * wide(ws, *w.shape)
    exact, size = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (k + 8) * 2.0**-24 * size + HALF_A_UNIT[y.dtype] * exact.abs()
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


@pytest.mark.parametrize(
    ("m", "n", "k", "out"),
    [
        (1, 128, 128, torch.bfloat16),
        (3, 130, 257, torch.float32),
        (33, 65, 1024, torch.float16),
        (1, 1, 1, torch.float32),
        (70, 40, 200, torch.float32),
    ],
)
def test_scales_of_rows_at_ragged_shapes(guarded: Guard, m: int, n: int, k: int, out: torch.dtype) -> None:
    x, w = guarded(codes(m, k, 1)), guarded(codes(n, k, 2))
    xs, ws, bias = guarded(scale(m)), guarded(scale(n, seed=8)), guarded(torch.randn(n))
    y = fp8_gemm(x, xs, w, ws, bias, out)
    assert y.shape == (m, n) and y.dtype == out
    assert_is_the_product(y, x, xs, w, ws, bias)


@pytest.mark.parametrize("x_form", ["tensor", "row", "block"])
@pytest.mark.parametrize("w_form", ["tensor", "row", "group", "block"])
def test_every_pair_of_scales(guarded: Guard, monkeypatch: pytest.MonkeyPatch, x_form: str, w_form: str) -> None:
    m, n, k = 5, 140, 400
    x, w = guarded(codes(m, k, 3)), guarded(codes(n, k, 4))
    xs = guarded({"tensor": scale(1), "row": scale(m), "block": scale(m, 4)}[x_form])
    ws = guarded({"tensor": scale(1), "row": scale(n, 1), "group": scale(n, 4), "block": scale(2, 4)}[w_form])
    for backend in ("triton", "reference"):
        monkeypatch.setenv("QTOOL_BACKEND", backend)
        assert_is_the_product(fp8_gemm(x, xs, w, ws, None, torch.float32), x, xs, w, ws, None)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("longest_sum", [128, 4096])
def test_both_operand_orders_and_both_ways_to_sum(guarded: Guard, weights_first: bool, longest_sum: int) -> None:
    x, w = guarded(codes(9, 384, 5)), guarded(codes(66, 384, 6))
    xs, ws = guarded(scale(9)), guarded(scale(66))
    tiling = Tiling(64, 64, 4, 2, parts=2, weights_first=weights_first)
    y = fp8_gemm(x, xs, w, ws, None, torch.float32, longest_sum=longest_sum, tiling=tiling)
    assert_is_the_product(y, x, xs, w, ws, None)


def test_parts_of_k_are_added_in_order(guarded: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = guarded(torch.zeros(8, dtype=torch.int32))
    monkeypatch.setattr(workspace, "stream_zeros", lambda count, device, least: arrivals[:count])
    x, w, one = guarded(codes(4, 768, 7)), guarded(codes(40, 768, 8)), guarded(torch.ones(1))
    tile = Tiling(16, 32, 4, 2)
    cut = fp8_gemm(x, one, w, one, None, torch.float32, tiling=Tiling(16, 32, 4, 2, parts=3))
    sums = [
        fp8_gemm(x[:, k : k + 256], one, w[:, k : k + 256], one, None, torch.float32, tiling=tile)
        for k in range(0, 768, 256)
    ]
    assert torch.equal(cut, sums[0] + sums[1] + sums[2])
    again = fp8_gemm(x, one, w, one, None, torch.float32, tiling=Tiling(16, 32, 4, 2, parts=3))
    assert torch.equal(cut, again) and arrivals.eq(0).all()


def test_rows_with_gaps_and_transposed_block_scales(guarded: Guard) -> None:
    x, w = guarded(codes(6, 300, 9))[:, :256], guarded(codes(33, 290, 10))[:, :256]
    xs, ws = guarded(scale(2, 6)).T, guarded(scale(2, 33)).T
    assert_is_the_product(fp8_gemm(x, xs, w, ws, None, torch.float32), x, xs, w, ws, None)


def test_a_zero_row_gives_zeros_and_what_is_not_finite_goes_on(guarded: Guard) -> None:
    x, w = codes(4, 256, 11), codes(20, 256, 12)
    x[0] = 0.0
    xs, ws = scale(4), scale(20)
    xs[0], xs[1], ws[3], ws[4] = 0.0, torch.nan, torch.inf, torch.nan
    w[5, 200] = torch.nan
    y = fp8_gemm(guarded(x), guarded(xs), guarded(w), guarded(ws), None, torch.float32).double()
    exact = (x.double() @ w.double().T) * xs.double()[:, None] * ws.double()
    finite = [n for n in range(20) if n not in (3, 4, 5)]
    assert y[0, finite].eq(0).all()
    assert y[1].isnan().all() and y[2:, 4:6].isnan().all()
    assert torch.equal(y[2:, 3], exact[2:, 3]) and y[2:, 3].isinf().all()
    assert y[2:, finite].isfinite().all()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, w = codes(2, 256, 1), codes(3, 256, 2)
    with pytest.raises(UsageError, match="x_codes"):
        fp8_gemm(x.float(), scale(2), w, scale(3))
    with pytest.raises(UsageError, match="x_scale"):
        fp8_gemm(x, scale(3), w, scale(3))
    with pytest.raises(UsageError, match="w_scale"):
        fp8_gemm(x, scale(2), w, scale(3, 5))
    with pytest.raises(UsageError, match="columns"):
        fp8_gemm(x, scale(2), w[:, :128], scale(3))
    with pytest.raises(UsageError, match="bias"):
        fp8_gemm(x, scale(2), w, scale(3), torch.zeros(2))
    assert fp8_gemm(x[:0], scale(0), w, scale(3)).shape == (0, 3)
