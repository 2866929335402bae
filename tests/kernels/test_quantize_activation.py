"""Activation codes: hand-computed rows, blocks, and values that are not numbers."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.kernels.quantize_activation import (
    fake_quantize_fp4,
    fake_quantize_fp8,
    fake_quantize_fp8_static,
    fake_quantize_int4,
    fake_quantize_int8,
    fake_quantize_int8_static,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)


def test_int8_per_token_by_hand() -> None:
    codes, scale = quantize_int8(torch.tensor([[127.0, -0.5, 1.5, 2.5], [0.0, 0.0, 0.0, 0.0]]))
    assert codes[:, 0].tolist() == [[127.0, 0.0, 2.0, 2.0], [0.0] * 4]  # half to even
    assert scale[:, 0, 0].tolist() == [1.0, 0.0]


def test_127_over_the_range_is_rounded_once_as_the_kernel_rounds_it() -> None:
    # 127 × x / max|x| is 63.5 for both, and the rounding of 127 / max|x| decides; the reciprocal's decides otherwise.
    x = torch.tensor([[4.21875, 2.109375], [4.75, 2.375]])
    assert quantize_int8(x)[0][:, 0, 1].tolist() == [64.0, 63.0]
    assert quantize_rows(x).codes[:, 1].tolist() == [64, 63]


def test_int8_blocks_have_their_own_scales() -> None:
    x = torch.tensor([[127.0, 1.0, 0.01, -0.0127, 5.0]])
    codes, scale = quantize_int8(x, group_size=2)
    assert codes.shape == (1, 3, 2)
    assert codes[0].tolist() == [[127.0, 1.0], [100.0, -127.0], [127.0, 0.0]]
    torch.testing.assert_close(scale[0, :, 0], torch.tensor([1.0, 0.0001, 5 / 127]))
    torch.testing.assert_close(fake_quantize_int8(x, group_size=2), x)


@pytest.mark.parametrize("group_size", [None, 1, 3, 16, 64])
def test_int8_error_is_half_a_step_of_the_own_block(group_size: int | None) -> None:
    x = torch.randn(4, 5, 50, generator=torch.Generator().manual_seed(0)) ** 3
    back = fake_quantize_int8(x, group_size=group_size)
    assert back.shape == x.shape
    size = group_size or 50
    for start in range(0, 50, size):
        block = x[..., start : start + size]
        step = block.abs().amax(-1, keepdim=True) / 127
        assert bool(((back[..., start : start + size] - block).abs() <= step * 0.5001).all())


def test_tokens_do_not_see_each_other() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:1], 1000 * x[1:]])
    for quantize in (fake_quantize_int8, fake_quantize_fp8):
        assert torch.equal(quantize(x)[0], quantize(other)[0])


def test_static_int8_clips() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.3, 0.25]])
    assert fake_quantize_int8_static(x, torch.tensor(0.5)).tolist() == [[63.5, -63.5, 0.5, 0.0]]


def test_fp8_by_hand() -> None:
    x = torch.tensor([[448.0, 17.0, -19.0, 0.001], [0.0] * 4])
    expected = [448.0, 16.0, -20.0, 2.0**-9 * 1.0 if 0.001 > 2.0**-10 else 0.0]
    assert fake_quantize_fp8(x).tolist() == [expected, [0.0] * 4]
    assert fake_quantize_fp8_static(torch.tensor([[900.0, -3.1]]), torch.tensor(2.0)).tolist() == [[896.0, -3.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("group_size", [None, 4])
def test_what_is_not_a_number_stays_visible(value: float, group_size: int | None) -> None:
    x = torch.ones(2, 8)
    x[0, 5] = value
    results = [fake_quantize_int8(x, group_size=group_size), fake_quantize_fp8(x)]
    for back in results:
        assert not bool(torch.isfinite(back[0]).all())
        assert bool(torch.isfinite(back[1]).all())
    x[0, 5] = math.nan
    assert bool(fake_quantize_int8_static(x, torch.tensor(1.0))[0, 5].isnan())
    assert bool(fake_quantize_fp8_static(x, torch.tensor(1.0))[0, 5].isnan())


def test_tiny_rows_do_not_turn_into_nan() -> None:
    x = torch.tensor([[1e-45, 0.0], [1e-39, -1e-39], [1e-30, 5e-31]])
    for quantize in (fake_quantize_int8, fake_quantize_fp8):
        back = quantize(x)
        assert bool(torch.isfinite(back).all())
        torch.testing.assert_close(back[2], x[2], rtol=0.05, atol=0)


def test_int4_per_token_by_hand() -> None:
    codes, scale = quantize_int4(torch.tensor([[-7.0, 0.5, 1.5, 2.6], [0.0, 0.0, 0.0, 0.0]]))
    assert codes[:, 0].tolist() == [[-7.0, 0.0, 2.0, 3.0], [0.0] * 4]  # half to even, −8 never
    assert scale[:, 0, 0].tolist() == [1.0, 0.0]


def test_int4_blocks_have_their_own_scales() -> None:
    x = torch.tensor([[7.0, 3.4, 0.07, -0.034, 5.0]])
    codes, scale = quantize_int4(x, group_size=2)
    assert codes[0].tolist() == [[7.0, 3.0], [7.0, -3.0], [7.0, 0.0]]
    torch.testing.assert_close(scale[0, :, 0], torch.tensor([1.0, 0.01, 5 / 7]))
    torch.testing.assert_close(fake_quantize_int4(x, group_size=2), torch.tensor([[7.0, 3.0, 0.07, -0.03, 5.0]]))


@pytest.mark.parametrize("group_size", [None, 3, 64])
def test_int4_of_int4_is_itself(group_size: int | None) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    once = fake_quantize_int4(x, group_size=group_size)
    torch.testing.assert_close(fake_quantize_int4(once, group_size=group_size), once)


def test_int4_keeps_nan_and_infinity_visible() -> None:
    out = fake_quantize_int4(torch.tensor([[1.0, math.nan], [1.0, math.inf], [1.0, 2.0]]))
    assert not out[:2].isfinite().all(dim=1).any()
    assert out[2].isfinite().all()


def test_fp4_ties_go_to_even_and_large_values_saturate() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 6.0]])
    assert fake_quantize_fp4(x).tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]]


def test_fp4_blocks_have_their_own_scales() -> None:
    x = torch.tensor([[12.0, 1.1, 0.06, -0.031]])
    torch.testing.assert_close(fake_quantize_fp4(x, group_size=2), torch.tensor([[12.0, 1.0, 0.06, -0.03]]))
    assert fake_quantize_fp4(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_a_clipped_int4_range_saturates_and_resolves_the_rest_finer() -> None:
    x = torch.tensor([[7.0, -7.0, 1.0, 0.5, 0.0]])
    codes, scale = quantize_int4(x, clip=0.5)
    assert scale.item() == pytest.approx(0.5)
    assert codes.flatten().tolist() == [7, -7, 2, 1, 0]
    assert torch.equal(fake_quantize_int4(x, clip=1.0), fake_quantize_int4(x))
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [float((fake_quantize_int4(rows, clip=clip) - rows).square().mean()) for clip in (1.0, 0.8)]
    assert errors[1] < 0.85 * errors[0]
