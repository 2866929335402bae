"""value = scale × (code − zero), for every layout of scales."""

from __future__ import annotations

import torch

from qtool.kernels.dequantize_weight import dequantize_weight


def test_per_channel_and_fixed_zero() -> None:
    codes = torch.tensor([[0, 8, 15], [1, 2, 3]], dtype=torch.uint8)
    out = dequantize_weight(codes, torch.tensor([[2.0], [0.5]]), None, group_size=None, zero_code=8)
    assert out.tolist() == [[-16.0, 0.0, 14.0], [-3.5, -3.0, -2.5]]


def test_groups_with_zero_points_and_a_short_last_group() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    zeros = torch.tensor([[1, 0, 6]], dtype=torch.uint8)
    out = dequantize_weight(codes, torch.tensor([[1.0, 10.0, 100.0]]), zeros, group_size=2, zero_code=8)
    assert out.tolist() == [[0.0, 1.0, 30.0, 40.0, -100.0]]


def test_a_group_wider_than_the_row() -> None:
    codes = torch.full((2, 3), 200, dtype=torch.uint8)
    out = dequantize_weight(codes, torch.ones(2, 1), None, group_size=64, zero_code=128)
    assert out.tolist() == [[72.0] * 3] * 2


def test_fp8_codes() -> None:
    codes = torch.tensor([[448.0, -0.5]]).to(torch.float8_e4m3fn)
    weight = dequantize_weight(codes, torch.tensor([[2.0]]), None, group_size=None, zero_code=0)
    assert weight.tolist() == [[896.0, -1.0]]
