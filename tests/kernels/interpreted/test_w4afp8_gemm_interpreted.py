"""4-bit weights × FP8 through the interpreter against float64, within the error of a float32 sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.float_gemm import Tiling
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.w4afp8_gemm import w4afp8_gemm

Guard = Callable[[Tensor], Tensor]
HALF_A_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def activations(rows: int, columns: int) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 60
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def values_of(rows: int, columns: int) -> Tensor:
    """Weights −7 … 7."""
    return torch.randint(-7, 8, (rows, columns), generator=torch.Generator().manual_seed(2))


def packed(values: Tensor, guarded: Guard) -> HalvesInt4:
    canonical = pack_int4((values + 8).to(torch.uint8))
    halves = HalvesInt4.from_canonical(canonical, values.shape[1], "sign_magnitude")
    return HalvesInt4(guarded(halves.packed), halves.columns, "sign_magnitude")


def scale(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def assert_is_the_product(
    y: Tensor, x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, group: int | None, bias: Tensor | None
) -> None:
    """Within (K + 8) × 2⁻²⁴ of the sum of the terms' sizes, and half a unit in the last place of y's type."""
    k = x.shape[1]
    spread = ws.double().reshape(w.shape[0], -1).repeat_interleave(group or k, 1)[:, :k]
    left, right = x.double() * xs.double()[:, None], w.double() * spread
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
    x, w = guarded(activations(m, k)), values_of(n, k)
    xs, ws, bias = guarded(scale(m)), guarded(scale(n, seed=8)), guarded(torch.randn(n))
    y = w4afp8_gemm(x, xs, packed(w, guarded), ws, bias, out)
    assert y.shape == (m, n) and y.dtype == out
    assert_is_the_product(y, x, xs, w, ws, None, bias)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("k", "kind"), [(512, torch.float16), (328, torch.float32)])
def test_scales_of_groups(
    guarded: Guard, monkeypatch: pytest.MonkeyPatch, group: int, k: int, kind: torch.dtype
) -> None:
    m, n = 5, 70
    x, w, xs = guarded(activations(m, k)), values_of(n, k), guarded(scale(m))
    ws = guarded(scale(n, -(-k // group)).to(kind))
    for backend in ("triton", "reference"):
        monkeypatch.setenv("QTOOL_BACKEND", backend)
        y = w4afp8_gemm(x, xs, packed(w, guarded), ws, None, torch.float32, group_size=group)
        assert_is_the_product(y, x, xs, w, ws, group, None)


@pytest.mark.parametrize("longest_sum", [128, 384])
def test_both_ways_to_sum(guarded: Guard, longest_sum: int) -> None:
    x, w, xs, ws = guarded(activations(9, 700)), values_of(66, 700), guarded(scale(9)), guarded(scale(66))
    tiling = Tiling(64, 64, 4, 2, parts=2)
    y = w4afp8_gemm(x, xs, packed(w, guarded), ws, None, torch.float32, longest_sum=longest_sum, tiling=tiling)
    assert_is_the_product(y, x, xs, w, ws, None, None)


def test_every_weight_in_every_place(guarded: Guard) -> None:
    # One column of the activations at a time: the product is that column of the weights, exactly.
    w = (torch.arange(15)[:, None] + torch.arange(128)) % 15 - 7
    x = torch.eye(128)[[0, 1, 31, 32, 63, 64, 65, 96, 127]].to(torch.float8_e4m3fn)
    ones, rows = guarded(torch.ones(9)), guarded(torch.ones(15))
    y = w4afp8_gemm(guarded(x), ones, packed(w, guarded), rows, None, torch.float32)
    assert torch.equal(y, x.float() @ w.float().T)


def test_parts_of_k_are_added_in_order(guarded: Guard) -> None:
    x, w = guarded(activations(4, 768)), values_of(40, 768)
    ones, rows = guarded(torch.ones(4)), guarded(torch.ones(40))

    def product(first: int, last: int, parts: int) -> Tensor:
        weight, tiling = packed(w[:, first:last], guarded), Tiling(16, 32, 4, 2, parts=parts)
        return w4afp8_gemm(x[:, first:last], ones, weight, rows, None, torch.float32, tiling=tiling)

    cut = product(0, 768, 3)
    assert torch.equal(cut, product(0, 256, 1) + product(256, 512, 1) + product(512, 768, 1))
    assert torch.equal(cut, product(0, 768, 3))


def test_a_zero_row_gives_zeros_and_what_is_not_finite_goes_on(guarded: Guard) -> None:
    x, w = activations(4, 200), values_of(20, 200)
    x[0], x[3, 150] = 0.0, torch.nan
    xs, ws = scale(4), scale(20, 4)
    xs[0], xs[1] = 0.0, torch.nan
    ws[3, 3], ws[4, 0] = torch.inf, torch.nan
    y = w4afp8_gemm(guarded(x), guarded(xs), packed(w, guarded), guarded(ws), None, torch.float32, group_size=64)
    finite = [n for n in range(20) if n not in (3, 4)]
    assert y[0, finite].eq(0).all()
    assert y[1].isnan().all() and y[3].isnan().all() and y[:, 4].isnan().all()
    assert y[2, 3].isinf() and y[2, finite].isfinite().all()


def test_operands_that_do_not_fit_are_refused(guarded: Guard) -> None:
    x, w = activations(2, 256), packed(values_of(3, 256), guarded)
    with pytest.raises(UsageError, match="sign_magnitude"):
        w4afp8_gemm(x, scale(2), HalvesInt4(w.packed, 256), scale(3))
    with pytest.raises(UsageError, match="w_scale"):
        w4afp8_gemm(x, scale(2), w, scale(3, 2))
    with pytest.raises(UsageError, match="x_scale"):
        w4afp8_gemm(x, scale(3), w, scale(3))
    with pytest.raises(EnvironmentFault, match="groups of 48"):
        w4afp8_gemm(x, scale(2), w, scale(3, 6), group_size=48)


def test_other_group_sizes_run_on_the_reference(guarded: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTOOL_BACKEND")
    x, w, xs, ws = activations(2, 100), values_of(3, 100), scale(2), scale(3, 3)
    y = w4afp8_gemm(x, xs, packed(w, guarded), ws, None, torch.float32, group_size=48)
    assert_is_the_product(y, x, xs, w, ws, 48, None)
