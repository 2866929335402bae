"""4-bit weights × 16-bit activations through the interpreter against float64, within the error of a float32 sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.float_gemm import Tiling
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.w4a16_gemm import w4a16_gemm

Guard = Callable[[Tensor], Tensor]
HALF_A_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def activations(rows: int, columns: int, kind: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(kind)


def codes_of(rows: int, columns: int) -> Tensor:
    """Canonical codes 0 … 15."""
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def packed(codes: Tensor, guarded: Guard) -> HalvesInt4:
    halves = HalvesInt4.from_canonical(pack_int4(codes), codes.shape[1])
    return HalvesInt4(guarded(halves.packed), halves.columns)


def scale(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7)) * 0.02 + 0.001


def zero_points(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def assert_is_the_product(
    y: Tensor, x: Tensor, codes: Tensor, ws: Tensor, zeros: Tensor | None, group: int | None, bias: Tensor | None
) -> None:
    """Within (K + 8) × 2⁻²⁴ of the sum of the terms' sizes, and half a unit in the last place of y's type."""
    (n, k), of = codes.shape, group or codes.shape[1]
    base = 8.0 if zeros is None else zeros.double().reshape(n, -1).repeat_interleave(of, 1)[:, :k]
    right = (codes.double() - base) * ws.double().reshape(n, -1).repeat_interleave(of, 1)[:, :k]
    exact, size = x.double() @ right.T, x.double().abs() @ right.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (k + 8) * 2.0**-24 * size + HALF_A_UNIT[y.dtype] * exact.abs()
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


@pytest.mark.parametrize(
    ("m", "n", "k", "kind", "out"),
    [
        (1, 128, 128, torch.bfloat16, None),
        (3, 130, 257, torch.float16, torch.float32),
        (33, 65, 1024, torch.float16, None),
        (1, 1, 1, torch.bfloat16, torch.float32),
        (70, 40, 200, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_scales_of_rows_at_ragged_shapes(
    guarded: Guard, m: int, n: int, k: int, kind: torch.dtype, out: torch.dtype | None, zeros: bool
) -> None:
    x, w, ws, bias = guarded(activations(m, k, kind)), codes_of(n, k), guarded(scale(n)), guarded(torch.randn(n))
    zp = guarded(zero_points(n)) if zeros else None
    y = w4a16_gemm(x, packed(w, guarded), ws, zp, bias, out)
    assert y.shape == (m, n) and y.dtype == (out or kind)
    assert_is_the_product(y, x, w, ws, zp, None, bias)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("k", "kind"), [(512, torch.float16), (328, torch.float32)])
@pytest.mark.parametrize("zeros", [False, True])
def test_scales_of_groups(
    guarded: Guard, monkeypatch: pytest.MonkeyPatch, group: int, k: int, kind: torch.dtype, zeros: bool
) -> None:
    m, n, groups = 5, 70, -(-k // group)
    x, w, ws = guarded(activations(m, k)), codes_of(n, k), guarded(scale(n, groups).to(kind))
    zp = guarded(zero_points(n, groups)) if zeros else None
    for backend in ("triton", "reference"):
        monkeypatch.setenv("QTOOL_BACKEND", backend)
        y = w4a16_gemm(x, packed(w, guarded), ws, zp, None, torch.float32, group_size=group)
        assert_is_the_product(y, x, w, ws, zp, group, None)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_both_operand_orders(guarded: Guard, weights_first: bool, group: int | None) -> None:
    groups = 1 if group is None else -(-384 // group)
    x, w, ws = guarded(activations(9, 384)), codes_of(66, 384), guarded(scale(66, groups))
    zp, tiling = guarded(zero_points(66, groups)), Tiling(64, 64, 4, 2, parts=2, weights_first=weights_first)
    y = w4a16_gemm(x, packed(w, guarded), ws, zp, None, torch.float32, group_size=group, tiling=tiling)
    assert_is_the_product(y, x, w, ws, zp, group, None)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_every_code_and_zero_point_in_every_place(guarded: Guard, kind: torch.dtype) -> None:
    # One column of the activations at a time: the product is that column of code − zero point, exactly.
    codes = ((torch.arange(16)[:, None] + torch.arange(128)) % 16).to(torch.uint8)
    zeros = ((torch.arange(16)[:, None] * 3 + torch.arange(4) * 5) % 16).to(torch.uint8)
    x = torch.eye(128)[[0, 1, 31, 32, 63, 64, 65, 96, 127]].to(kind)
    weight, ones = packed(codes, guarded), guarded(torch.ones(16, 4))
    y = w4a16_gemm(guarded(x), weight, ones, guarded(zeros), None, torch.float32, group_size=32)
    assert torch.equal(y, x.float() @ (codes.float() - zeros.float().repeat_interleave(32, 1)).T)


def test_parts_of_k_are_added_in_order(guarded: Guard) -> None:
    x, w, ones = guarded(activations(4, 768)), codes_of(40, 768), guarded(torch.ones(40))

    def product(first: int, last: int, parts: int) -> Tensor:
        weight, tiling = packed(w[:, first:last], guarded), Tiling(16, 32, 4, 2, parts=parts)
        return w4a16_gemm(x[:, first:last], weight, ones, None, None, torch.float32, tiling=tiling)

    cut = product(0, 768, 3)
    assert torch.equal(cut, product(0, 256, 1) + product(256, 512, 1) + product(512, 768, 1))
    assert torch.equal(cut, product(0, 768, 3))


def test_scales_and_zero_points_in_transposed_memory(guarded: Guard) -> None:
    x, w = guarded(activations(2, 256)), codes_of(33, 256)
    ws, zp = guarded(scale(4, 33)).T, guarded(zero_points(4, 33)).T
    y = w4a16_gemm(x, packed(w, guarded), ws, zp, None, torch.float32, group_size=64)
    assert_is_the_product(y, x, w, ws, zp, 64, None)


def test_a_zero_row_gives_zeros_and_what_is_not_finite_goes_on(guarded: Guard) -> None:
    x, w, ws = activations(4, 200), codes_of(20, 200), scale(20, 4)
    x[0], x[1, 150], x[3, 5] = 0.0, torch.nan, torch.inf
    ws[3, 3], ws[4, 0] = torch.inf, torch.nan
    w[:, 5] = 9
    y = w4a16_gemm(guarded(x), packed(w, guarded), guarded(ws), None, None, torch.float32, group_size=64)
    finite = [n for n in range(20) if n not in (3, 4)]
    assert y[0, finite].eq(0).all()
    assert y[1].isnan().all() and y[:, 4].isnan().all()
    assert y[2, 3].isinf() and y[2, finite].isfinite().all() and y[3, finite].eq(torch.inf).all()


def test_operands_that_do_not_fit_are_refused(guarded: Guard) -> None:
    x, w = activations(2, 256), packed(codes_of(3, 256), guarded)
    with pytest.raises(UsageError, match="twos_complement"):
        w4a16_gemm(x, HalvesInt4(w.packed, 256, "sign_magnitude"), scale(3))
    with pytest.raises(UsageError, match="w_scale"):
        w4a16_gemm(x, w, scale(3, 2))
    with pytest.raises(UsageError, match="zero_point"):
        w4a16_gemm(x, w, scale(3, 2), zero_points(3), group_size=128)
    with pytest.raises(UsageError, match="bfloat16 or float16"):
        w4a16_gemm(x.float(), w, scale(3))
    with pytest.raises(EnvironmentFault, match="groups of 48"):
        w4a16_gemm(x, w, scale(3, 6), group_size=48)
