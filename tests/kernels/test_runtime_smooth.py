"""Runtime Smooth: the one-token rule, requests that do not see each other, tiles added up, robust ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.kernels.quantize_activation import fake_quantize_int4, quantize_int4
from qtool.kernels.runtime_smooth import (
    RangeRule,
    SmoothedCodes,
    channel_ranges,
    quantize_smoothed,
    smooth_factors,
    smoothed_gemm,
    smoothed_values,
    sorted_channels,
    tile_maxima,
)

RULES = [
    RangeRule(),
    RangeRule(massive_ratio=4.0),
    RangeRule(quantile=0.9),
    RangeRule(level=True),
    RangeRule(quantile=0.9, massive_ratio=4.0, level=True),
]


def _heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def _smooth(x: Tensor, group: int, rule: RangeRule = RULES[0], *, live: bool = False) -> SmoothedCodes:
    ranges = channel_ranges(x, rule)
    order = sorted_channels(ranges) if live else None
    return quantize_smoothed(x, smooth_factors(ranges, group, order), order=order)


def test_by_hand() -> None:
    x = torch.tensor([[[7.0, 3.5, 70.0, -70.0], [1.0, -0.5, 70.0, 30.0]]])
    smoothed = _smooth(x, 2)
    assert smoothed.factors.tolist() == [[7.0, 70.0]]
    assert smoothed.token_range[0, :, 0].tolist() == [1.0, 1.0]
    assert smoothed.codes[0].tolist() == [[[7.0, 4.0], [7.0, -7.0]], [[1.0, 0.0], [7.0, 3.0]]]  # 3.5 to even
    assert smoothed_values(smoothed)[0].tolist() == [[7.0, 4.0, 70.0, -70.0], [1.0, 0.0, 70.0, 30.0]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", [64, 128])
def test_one_token_is_int4_per_group_bit_for_bit(rule: RangeRule, group: int) -> None:
    x = _heavy_tailed(3, 1, 256)
    smoothed = _smooth(x, group, rule)
    codes, _ = quantize_int4(x, group_size=group)
    assert torch.equal(smoothed.codes, codes)
    assert torch.equal(smoothed_values(smoothed), fake_quantize_int4(x, group_size=group))


def test_one_token_sorted_is_int4_per_group_of_the_sorted_channels() -> None:
    x = _heavy_tailed(1, 1, 256)
    order = sorted_channels(x[0, 0].abs())
    expected = torch.empty(256)
    expected[order] = fake_quantize_int4(x[0, 0][order], group_size=128)
    assert torch.equal(smoothed_values(_smooth(x, 128, live=True))[0, 0], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("live", [False, True])
def test_a_request_does_not_see_its_neighbours(rule: RangeRule, live: bool) -> None:
    quiet, loud = _heavy_tailed(1, 20, 128), 1e3 * _heavy_tailed(1, 20, 128, seed=1)
    alone = smoothed_values(_smooth(quiet, 64, rule, live=live))
    together = smoothed_values(_smooth(torch.cat([loud, quiet]), 64, rule, live=live))
    assert torch.equal(together[1:], alone)


def test_frozen_factors_see_one_token_at_a_time() -> None:
    x = _heavy_tailed(2, 20, 128)
    factors = smooth_factors(channel_ranges(x[:1])[0], 64)
    whole = smoothed_values(quantize_smoothed(x, factors))
    token_by_token = [smoothed_values(quantize_smoothed(x[:, t : t + 1], factors)) for t in range(20)]
    assert torch.equal(whole, torch.cat(token_by_token, dim=1))


@pytest.mark.parametrize("sort", [False, True])
def test_tiles_add_up_to_the_product_of_the_values(sort: bool) -> None:
    x, weight = _heavy_tailed(2, 9, 256), _heavy_tailed(5, 256, seed=3)
    ranges = channel_ranges(x).amax(dim=0)
    order = sorted_channels(ranges) if sort else None
    smoothed = quantize_smoothed(x, smooth_factors(ranges, 64, order), order=order)
    expected = smoothed_values(smoothed) @ weight.T
    torch.testing.assert_close(smoothed_gemm(smoothed, weight), expected, rtol=1e-5, atol=1e-3)


def test_sorting_puts_equal_ranges_together_and_helps() -> None:
    gains = torch.where(torch.arange(256) % 4 == 0, 50.0, 1.0)
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)) * gains
    quiet = gains == 1

    def lost(live: bool) -> float:
        return float((smoothed_values(_smooth(x, 64, live=live)) - x)[..., quiet].square().mean())

    assert lost(True) < 0.1 * lost(False)


def test_a_massive_token_owns_the_maxima_and_not_the_robust_ranges() -> None:
    x = torch.randn(1, 100, 256, generator=torch.Generator().manual_seed(0))
    x[..., :128] *= 8
    spoiled = x.clone()
    spoiled[0, 0] = 500 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(channel_ranges(spoiled, RULES[1]), channel_ranges(x[:, 1:]))
    assert float(channel_ranges(spoiled, RULES[2]).max()) < 50
    rest = slice(1, None)

    def lost(rule: RangeRule) -> float:
        return float((smoothed_values(_smooth(spoiled, 64, rule))[:, rest, 128:] - x[:, rest, 128:]).square().mean())

    published, *robust = (lost(rule) for rule in RULES)
    assert max(robust) < 0.3 * published


def test_a_quantile_is_an_order_statistic() -> None:
    x = torch.arange(1.0, 11.0).reshape(1, 10, 1)
    found = [float(channel_ranges(x, RangeRule(quantile=q))) for q in (0.05, 0.5, 0.9, 0.91, 1.0)]
    assert found == [1.0, 5.0, 9.0, 10.0, 10.0]


def test_levelled_ranges_do_not_know_a_tokens_size() -> None:
    x = _heavy_tailed(1, 20, 64)
    sizes = torch.exp2(torch.arange(-10.0, 10.0)).unsqueeze(-1)
    assert torch.equal(channel_ranges(x * sizes, RULES[3]), channel_ranges(x, RULES[3]))


def test_tile_maxima_follow_the_order() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0, 3.0]])
    assert tile_maxima(x, 2).tolist() == [[5.0, 3.0]]
    assert tile_maxima(x, 2, torch.tensor([0, 2, 1, 3])).tolist() == [[2.0, 5.0]]


def test_zeros_stay_zeros_and_nan_stays_visible() -> None:
    x = _heavy_tailed(1, 4, 128)
    x[0, 1] = 0
    x[..., :64] = 0
    values = smoothed_values(_smooth(x, 64))
    assert values[0, 1].tolist() == [0.0] * 128
    assert float(values[..., :64].abs().max()) == 0
    x[0, 2, 100] = float("nan")
    assert smoothed_values(_smooth(x, 64))[0, 2].isnan().any()


def test_a_clipped_range_saturates_and_halves_the_step() -> None:
    x = torch.tensor([[[7.0, 3.0, 1.0, 0.0], [3.5, 1.0, 0.5, 0.0]]])
    factors = torch.tensor([[1.0]])
    clipped, whole = (quantize_smoothed(x, factors, clip=clip) for clip in (0.5, 1.0))
    assert torch.equal(clipped.step, whole.step / 2)
    assert clipped.codes[0, 0, 0].tolist() == [7.0, 6.0, 2.0, 0.0]
