"""w4a4_gemm through Triton's interpreter, against int64 and float64 computed here from the codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qtool.kernels.integer_gemm import Tiling
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.runtime_smooth import (
    channel_ranges,
    integer_factors,
    largest_integer_factor,
    quantize_smoothed,
    smooth_factors,
    smoothed_gemm,
)
from qtool.kernels.w4a4_gemm import w4a4_gemm

Guard = Callable[[Tensor], Tensor]

WHOLE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1)
IN_THREE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1, split_k=3)


def halves(values: Tensor, guarded: Guard) -> HalvesInt4:
    packed = pack_int4((values + 8).to(torch.uint8))
    return HalvesInt4(guarded(HalvesInt4.from_canonical(packed, values.shape[1]).packed), values.shape[1])


def values(rows: int, columns: int) -> Tensor:
    return torch.randint(-8, 8, (rows, columns))


@pytest.mark.parametrize("tiling", [WHOLE, IN_THREE], ids=["whole", "in three"])
@pytest.mark.parametrize("shape", [(1, 5, 40), (17, 70, 333), (3, 64, 384)], ids=str)
def test_an_integer_sum_is_exact(shape: tuple[int, int, int], tiling: Tiling, guarded: Guard) -> None:
    m, n, k = shape
    torch.manual_seed(0)
    x, w, one = values(m, k), values(n, k), torch.ones(1)
    y = w4a4_gemm(halves(x, guarded), one, halves(w, guarded), one, out_dtype=torch.float32, tiling=tiling)
    assert torch.equal(y.long(), x @ w.T)


def test_groups_zero_points_and_factors_are_exact(guarded: Guard) -> None:
    torch.manual_seed(0)
    x, w, one = values(5, 333), values(70, 333), torch.ones(1)
    groups = guarded(torch.randint(1, 9, (70, 6), dtype=torch.uint8))
    zero = guarded(torch.randint(0, 16, (70, 6), dtype=torch.uint8))
    factors = guarded(torch.randint(1, 50, (3,), dtype=torch.int32))

    def spread(numbers: Tensor, size: int) -> Tensor:
        return numbers.long().repeat_interleave(size, dim=-1)[..., :333]

    expected = (x * spread(factors, 128)) @ ((w + 8 - spread(zero, 64)) * spread(groups, 64)).T
    y = w4a4_gemm(
        halves(x, guarded),
        one,
        halves(w, guarded),
        one,
        out_dtype=torch.float32,
        w_group_scale=groups,
        w_group_size=64,
        zero_point=zero,
        tile_factors=factors,
        x_group_size=128,
        tiling=IN_THREE,
    )
    assert expected.abs().max() < 2**24
    assert torch.equal(y.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_rounds_as_the_reference_does(
    dtype: torch.dtype, guarded: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, w, zero = values(5, 200), values(70, 200), torch.randint(0, 16, (70,), dtype=torch.uint8)
    x_scale, w_scale, bias = guarded(torch.rand(5)), guarded(torch.rand(70)), guarded(torch.randn(70))
    x_scale[1], x_scale[2] = float("nan"), 0
    arguments = (halves(x, guarded), x_scale, halves(w, guarded), w_scale, bias, dtype)
    y = w4a4_gemm(*arguments, zero_point=guarded(zero), tiling=WHOLE)
    expected = (x @ (w + 8 - zero.long()[:, None]).T).float() * w_scale * x_scale[:, None] + bias
    assert torch.equal(y.nan_to_num(99), expected.to(dtype).nan_to_num(99))
    assert y[1].isnan().all() and torch.equal(y[2], bias.to(dtype))
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    assert torch.equal(w4a4_gemm(*arguments, zero_point=zero).nan_to_num(99), y.nan_to_num(99))


@pytest.mark.parametrize("kind", ["float", "integer"])
def test_runtime_smooth(kind: str, guarded: Guard) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 384) * torch.rand(384).mul(4).exp()
    w, w_scale = values(70, 384), guarded(torch.rand(70) + 0.5)
    factors, unit = smooth_factors(channel_ranges(x), 128), torch.ones(1)
    if kind == "integer":
        whole = integer_factors(factors[None], largest_integer_factor(384, largest_weight=8))
        factors, unit = whole.numbers[0], whole.base
    smoothed = quantize_smoothed(x, factors * unit)
    y = w4a4_gemm(
        halves(smoothed.codes.flatten(-2).long(), guarded),
        smoothed.token_range[:, 0] / 7 * unit,
        halves(w, guarded),
        w_scale,
        out_dtype=torch.float32,
        tile_factors=guarded(factors),
        x_group_size=128,
        tiling=WHOLE,
    )
    expected = smoothed_gemm(smoothed, w.float() * w_scale[:, None])
    assert torch.allclose(y, expected, rtol=0, atol=float(expected.abs().max()) * 1e-6)


def test_activations_of_another_width_or_encoding_are_refused(guarded: Guard) -> None:
    x, w, one = values(3, 200).clamp(-7), values(5, 200), torch.ones(1)
    signed = HalvesInt4.from_canonical(pack_int4((x + 8).to(torch.uint8)), 200, "sign_magnitude")
    for wrong in (signed, halves(x[:, :199], guarded)):
        with pytest.raises(ValueError, match="x_codes"):
            w4a4_gemm(wrong, one, halves(w, guarded), one)
