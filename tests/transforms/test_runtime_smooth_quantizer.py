"""Runtime Smooth as an input quantizer: live and frozen factors, and what frozen factors are in the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.quantize_activation import fake_quantize_int4
from qtool.quantize.transforms.runtime_smooth import (
    ROBUST,
    WITHOUT_MASSIVE,
    FrozenSmooth,
    RangeRule,
    RuntimeSmooth,
    frozen_smooth,
)

GROUP = 64
LOUD = torch.where(torch.arange(256) % 7 == 0, 20.0, 1.0)


def _inputs(seed: int = 0) -> Tensor:
    """[2, 40, 256]: loud channels everywhere, one massive token per request."""
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(seed))
    x *= LOUD
    x[:, 0] = 2000 * torch.randn(2, 256, generator=torch.Generator().manual_seed(seed + 1))
    return x


def _lost(x: Tensor, back: Tensor) -> float:
    """Squared error of all but the first token, in units of each channel's own size."""
    return float(((back - x) / LOUD)[:, 1:].square().mean())


@pytest.mark.parametrize("rule", [ROBUST, WITHOUT_MASSIVE])
def test_sorted_and_robust_beats_published_and_nothing(rule: RangeRule) -> None:
    x = _inputs()
    published = _lost(x, RuntimeSmooth(group_size=GROUP, sort_live=True).fake_quantize(x))
    robust = _lost(x, RuntimeSmooth(group_size=GROUP, sort_live=True, rule=rule).fake_quantize(x))
    assert robust < 0.5 * published
    assert robust < 0.5 * _lost(x, fake_quantize_int4(x))


def test_a_frozen_order_needs_no_sorting_online() -> None:
    x = _inputs()
    order = frozen_smooth(_inputs(seed=5), GROUP, ROBUST, sort=True).order
    smooth = RuntimeSmooth(group_size=GROUP, rule=ROBUST, order=order)
    assert torch.equal(smooth.fake_quantize(x)[:1], smooth.fake_quantize(x[:1]))
    unsorted = RuntimeSmooth(group_size=GROUP, rule=ROBUST).fake_quantize(x)
    assert _lost(x, smooth.fake_quantize(x)) < 0.6 * _lost(x, unsorted)


@pytest.mark.parametrize("sort", [False, True])
def test_frozen_factors_compute_one_function_in_prefill_and_decode(sort: bool) -> None:
    x = _inputs()
    smooth = frozen_smooth(_inputs(seed=5), GROUP, sort=sort)
    decoded = torch.cat([smooth.fake_quantize(x[:, t : t + 1]) for t in range(40)], dim=1)
    assert torch.equal(smooth.fake_quantize(x), decoded)
    live = RuntimeSmooth(group_size=GROUP, sort_live=sort)
    one_by_one = torch.cat([live.fake_quantize(x[:, t : t + 1]) for t in range(40)], dim=1)
    assert not torch.equal(live.fake_quantize(x), one_by_one)


@pytest.mark.parametrize("sort", [False, True])
def test_frozen_factors_are_a_division_of_channels(sort: bool) -> None:
    x, weight = _inputs(), torch.randn(5, 256, generator=torch.Generator().manual_seed(9))
    smooth = frozen_smooth(x, GROUP, sort=sort)
    division = smooth.as_division(256)
    y = fake_quantize_int4(division.input(x)[0]) @ division.weight(weight)[0].T
    expected = smooth.fake_quantize(x) @ weight.T
    assert float((y - expected).norm() / expected.norm()) < 1e-3


def test_frozen_factors_help_where_tiles_differ() -> None:
    x, seen = ((_inputs(seed) / LOUD) * torch.logspace(0, 1.5, 256) for seed in (0, 5))
    smooth = frozen_smooth(seen, GROUP)
    size = torch.logspace(0, 1.5, 256)
    lost = [_lost(x / size * LOUD, b / size * LOUD) for b in (fake_quantize_int4(x), smooth.fake_quantize(x))]
    assert lost[1] < 0.5 * lost[0]


def test_tiles_that_calibration_never_excited_do_not_explode() -> None:
    seen = torch.ones(5, 256)
    seen[:, :64] = 0
    factors = frozen_smooth(seen, GROUP).factors
    assert float(factors.min() / factors.max()) == 2.0**-10
    assert frozen_smooth(torch.zeros(5, 256), GROUP).factors.tolist() == [1.0] * 4


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(InputRefused, match="does not divide"):
        frozen_smooth(torch.ones(5, 100), GROUP)
    with pytest.raises(InputRefused, match="not finite"):
        frozen_smooth(torch.full((5, 128), float("nan")), GROUP)
    assert isinstance(frozen_smooth(torch.ones(2, 3, 128), GROUP, RangeRule()), FrozenSmooth)
