"""MXFP4, MXFP8 and NVFP4 activations: blocks worked by hand, ml_dtypes, and values that are not numbers."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.kernels.quantize_activation import fake_quantize_mxfp4, fake_quantize_mxfp8, fake_quantize_nvfp4

FORMATS = [fake_quantize_mxfp4, fake_quantize_mxfp8, fake_quantize_nvfp4]
HARD, MILD, SIX = [7.5, 3.2, -1.1, 0.3], [5.1, 3.2, -1.1, 0.3], [6.2, 0.9, -2.6, 0.1]


@pytest.mark.parametrize(
    ("block", "rule", "expected", "error"),
    [
        (HARD, "floor", [6, 3, -1, 0.5], 0.585),
        (HARD, "even", [8, 3, -1, 0], 0.0975),
        (HARD, "rceil", [8, 3, -1, 0], 0.0975),
        *[(MILD, rule, [6, 3, -1, 0.5], 0.225) for rule in ("floor", "even", "rceil")],
        *[(SIX, rule, [6, 1, -3, 0], None) for rule in ("floor", "even", "rceil")],
    ],
)
def test_mxfp4_blocks_by_hand(block: list[float], rule: str, expected: list[float], error: float | None) -> None:
    x = torch.tensor([block])
    back = fake_quantize_mxfp4(x, rule=rule)
    assert back.tolist() == [expected]
    if error is not None:
        assert float((back - x).square().mean()) == pytest.approx(error, rel=1e-3)


def test_nvfp4_block_by_hand() -> None:
    # The token's maximum 48 gives g = 48 / 2688; E4M3(7.5 / 6g) = E4M3(70) = 72; the block's step is 72 g = 9/7.
    token = torch.zeros(1, 32)
    token[0, :4] = torch.tensor(HARD)
    token[0, 20] = 48.0
    for back in (fake_quantize_nvfp4(token), fake_quantize_nvfp4(token, step=torch.tensor(48 / 2688))):
        torch.testing.assert_close(back[0, :4], torch.tensor([6.0, 2.0, -1.0, 0.0]) * 9 / 7)
        assert float(back[0, 20]) == pytest.approx(48.0)


@pytest.mark.parametrize(("quantize", "dtype", "largest"), [
    (fake_quantize_mxfp4, ml_dtypes.float4_e2m1fn, 6.0),
    (fake_quantize_mxfp8, ml_dtypes.float8_e4m3fn, 448.0),
])  # fmt: skip
def test_mx_elements_are_casts_after_scaling(
    quantize: Callable[..., torch.Tensor], dtype: type, largest: float
) -> None:
    x = torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(0)) ** 3
    blocks = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 16))).reshape(3, 7, 3, 32)
    scale = 2.0 ** np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True) / largest))
    expected = (blocks / scale).astype(dtype).astype(np.float32) * scale
    back = quantize(x, rule="rceil")
    assert np.array_equal(back.numpy(), expected.reshape(3, 7, 96)[..., :80])


@pytest.mark.parametrize("quantize", FORMATS)
def test_odd_rows(quantize: Callable[..., torch.Tensor]) -> None:
    assert quantize(torch.zeros(2, 40)).tolist() == [[0.0] * 40] * 2
    assert quantize(torch.zeros(0, 40)).shape == (0, 40)
    assert bool(torch.isfinite(quantize(torch.full((1, 40), 1e-42))).all())
    x = torch.full((2, 64), 0.5)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    back = quantize(x)
    assert bool(torch.isnan(back[0, 3])) and not bool(torch.isfinite(back[1, 40]))
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(quantize(tokens)[1], quantize(torch.cat([1000 * tokens[:1], tokens[1:]]))[1])
