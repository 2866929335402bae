"""Grids and codes: hand-computed cases, and what must hold for every weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.quantize.artifacts.scheme import TensorScheme, layer_scheme
from qtool.quantize.quantizers.numerics import SMALLEST_SCALE, Grid, choose_grid, decode, encode


def scheme(name: str, **options: object) -> TensorScheme:
    return layer_scheme(name, **options).weight  # type: ignore[arg-type]


INT4 = scheme("W4A16", group_size=32)
INT4_ASYM = scheme("W4A16", group_size=32, symmetric=False)
INT8 = scheme("W8A8")
INT8_ASYM = scheme("W8A8", symmetric=False)
FP8 = scheme("FP8_DYNAMIC")
ALL = {
    "int4": INT4,
    "int4 asym": INT4_ASYM,
    "int4 channel": scheme("W4A16", group_size="channel"),
    "int8": INT8,
    "int8 asym": INT8_ASYM,
    "int8 g64": scheme("W8A8", group_size=64),
    "fp8": FP8,
    "fp4": scheme("W4A8_FP", group_size=32),
    "fp4 channel": scheme("W4A8_FP", group_size="channel"),
}


def round_trip(weight: torch.Tensor, which: TensorScheme, *, mse_clip: bool = False) -> tuple[Grid, torch.Tensor]:
    grid = choose_grid(weight, which, mse_clip=mse_clip)
    return grid, decode(encode(weight, grid, which), grid, which)


def test_symmetric_int4_uses_the_code_minus_eight() -> None:
    # The negative end decides: 8 / 8 = 1 beats 3 / 7.
    weight = torch.tensor([[-8.0, 3.0, 0.4, -0.6] * 8])
    grid = choose_grid(weight, INT4, mse_clip=False)
    assert grid.scale.tolist() == [[1.0]]
    assert encode(weight, grid, INT4)[0, :4].tolist() == [0, 11, 8, 7]


def test_symmetric_int4_positive_end() -> None:
    grid = choose_grid(torch.tensor([[7.0, -6.0] * 16]), INT4, mse_clip=False)
    assert grid.scale.tolist() == [[1.0]]


def test_bitnet_s_int4_of_the_mean_magnitude_has_these_codes() -> None:
    """BitNet a4.8's step, mean|x| / √7, is no format here (docs/log.md); its codes are the symmetric INT4's."""
    vector = torch.zeros(1, 32)
    vector[0, :4] = torch.tensor([0.1, -0.4, 1.2, 3.0])
    grid = Grid(scale=(vector[:, :4].abs().mean() / 7**0.5).reshape(1, 1), zero_point=None)
    codes = encode(vector, grid, INT4)[0, :4] - 8.0
    assert codes.tolist() == [0, -1, 3, 7]
    assert decode(encode(vector, grid, INT4), grid, INT4)[0, :4].tolist() == pytest.approx(
        [0, -0.4441, 1.3323, 3.1088], abs=1e-4
    )


def test_asymmetric_int4_by_hand() -> None:
    # Range −2 … 13 gives scale 1 and zero point 2.
    weight = torch.tensor([[-2.0, 13.0, 0.0, 4.4] * 8])
    grid = choose_grid(weight, INT4_ASYM, mse_clip=False)
    assert grid.zero_point is not None
    assert (grid.scale.tolist(), grid.zero_point.tolist()) == ([[1.0]], [[2]])
    assert encode(weight, grid, INT4_ASYM)[0, :4].tolist() == [0, 15, 2, 6]


def test_asymmetric_range_always_contains_zero() -> None:
    weight = torch.full((1, 32), 30.0)
    weight[0, ::2] = 15.0
    grid, back = round_trip(weight, INT4_ASYM)
    assert grid.zero_point is not None
    assert (grid.scale.tolist(), grid.zero_point.tolist()) == ([[2.0]], [[0]])
    assert back[0, :2].tolist() == [16.0, 30.0]  # 15 / 2 = 7.5 rounds to the even 8


def test_symmetric_int8_is_narrow_and_rounds_half_to_even() -> None:
    weight = torch.tensor([[-127.0, 127.0, 0.5, 1.5, 2.5, -0.5]])
    grid = choose_grid(weight, INT8, mse_clip=False)
    assert encode(weight, grid, INT8).tolist() == [[1, 255, 128, 130, 130, 128]]
    assert encode(torch.tensor([[-500.0, 500.0]]), grid, INT8).tolist() == [[1, 255]]


def test_fp8_by_hand() -> None:
    weight = torch.tensor([[448.0, 17.0, -18.0, 0.0]])
    grid, back = round_trip(weight, FP8)
    assert grid.scale.tolist() == [[1.0]]
    assert back.tolist() == [[448.0, 16.0, -18.0, 0.0]]  # E4M3 has 16, 18, 20 … there: 17 is a tie, 16 is even


def test_short_last_group() -> None:
    weight = torch.cat([torch.full((2, 32), 0.875), torch.full((2, 3), 14.0)], dim=1)
    grid, back = round_trip(weight, INT4)
    assert grid.scale.shape == (2, 2)
    torch.testing.assert_close(back, weight)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mse_clip", [False, True])
def test_degenerate_rows_give_finite_positive_scales(name: str, mse_clip: bool) -> None:
    rows = torch.zeros(7, 70)
    rows[1] = 1e-45
    rows[2, 5] = 1e-39
    rows[3] = 3.0
    rows[4] = -3.0
    rows[5, 69] = 3e38
    rows[5, 0] = -3e38
    rows[6, 3] = 1e30
    grid, back = round_trip(rows, ALL[name], mse_clip=mse_clip)
    assert bool(torch.isfinite(grid.scale).all()) and bool((grid.scale >= SMALLEST_SCALE).all())
    assert bool(torch.isfinite(back).all())
    assert bool((grid.scale[0] == 1).all()) and bool((back[0] == 0).all())
    torch.testing.assert_close(back[3:5], rows[3:5], rtol=0.04, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_unclipped_error_is_within_half_a_step(name: str) -> None:
    weight = torch.randn(16, 150, generator=torch.Generator().manual_seed(1))
    grid, back = round_trip(weight, ALL[name])
    width = 150 // grid.scale.shape[1] if grid.scale.shape[1] == 1 else {5: 32, 3: 64}[grid.scale.shape[1]]
    step = grid.scale.repeat_interleave(width, dim=1)[:, :150]
    bound = weight.abs() / 16 + step if name == "fp8" else step * 0.5001
    if name.startswith("fp4"):
        bound = weight.abs() / 4 + step / 4
    assert bool(((back - weight).abs() <= bound).all())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    columns=st.integers(1, 130),
    spread=st.sampled_from([1e-20, 1.0, 1e10]),
    name=st.sampled_from(["int4", "int4 asym", "int8", "int4 channel", "fp4", "fp4 channel"]),
    weighted=st.booleans(),
)
def test_the_clip_search_never_raises_what_it_minimises(
    seed: int, columns: int, spread: float, name: str, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, columns, generator=generator) ** 3 * spread
    importance = torch.rand(columns, generator=generator) ** 4 + 1e-3 if weighted else None
    which = ALL[name]

    def lost(mse_clip: bool) -> torch.Tensor:
        grid = choose_grid(weight, which, mse_clip=mse_clip, importance=importance)
        square = ((decode(encode(weight, grid, which), grid, which) - weight) / spread).double().square()
        return (square if importance is None else square * importance).sum()

    rounding = 1e-10 * float((weight / spread).double().square().sum())  # the search itself runs in float32
    assert float(lost(True)) <= float(lost(False)) * (1 + 1e-4) + rounding


def test_the_clip_search_finds_a_worthwhile_clip() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 12.0
    which = ALL["int4 channel"]
    plain, clipped = (
        float((round_trip(weight, which, mse_clip=clip)[1] - weight).square().mean()) for clip in (False, True)
    )
    assert clipped < 0.8 * plain


def test_importance_keeps_the_column_that_matters() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 7] = 9.0
    importance = torch.full((32,), 1e-6)
    importance[7] = 1.0
    grid = choose_grid(weight, INT4, mse_clip=True, importance=importance)
    back = decode(encode(weight, grid, INT4), grid, INT4)
    assert float((back[:, 7] - 9.0).abs().max()) < 9.0 * 2**-11  # the scale is a float16 number


def test_group_scales_are_16_bit_numbers_and_tiny_ones_keep_their_precision() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight[1] *= 1e-7  # below float16's normal numbers
    scale = choose_grid(weight, INT4, mse_clip=True).scale
    assert bool((scale[[0, 2, 3]].to(torch.float16).to(torch.float32) == scale[[0, 2, 3]]).all())
    exact = choose_grid(weight * 2.0**40, INT4, mse_clip=True).scale[1] / 2.0**40
    torch.testing.assert_close(scale[1], exact, rtol=1e-3, atol=0)
    channel = layer_scheme("W8A8").weight
    assert bool((choose_grid(weight, channel, mse_clip=False).scale == weight.abs().amax(1, keepdim=True) / 127).all())


def test_chunked_rows_equal_single_rows() -> None:
    weight = torch.randn(300, 1200, generator=torch.Generator().manual_seed(2))  # more than one chunk
    whole = choose_grid(weight, INT4, mse_clip=True)
    row = choose_grid(weight[299:], INT4, mse_clip=True)
    assert torch.equal(whole.scale[299:], row.scale)
    assert torch.equal(encode(weight, whole, INT4)[299:], encode(weight[299:], row, INT4))
