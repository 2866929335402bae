"""Scales that are small floats: what is found without a search, and that a search finds the best there is."""

from __future__ import annotations

import pytest
import torch

from qtool.kernels.dequantize_weight import widen_to_e4m3
from qtool.kernels.small_floats import power_of_two
from qtool.quantize.artifacts.rule import QuantizerOptions
from qtool.quantize.artifacts.scheme import TensorScheme, layer_scheme
from qtool.quantize.quantizers.gptq import gptq
from qtool.quantize.quantizers.numerics import Grid, choose_grid, decode, encode, scale_factor

MXFP4 = layer_scheme("MXFP4A16").weight
NVFP4 = layer_scheme("NVFP4A16").weight
FP4_SHIFT = layer_scheme("W4A8_FP", scale="shift").weight
INT4_SHIFT = layer_scheme("W4A8_INT_FP", scale="shift", group_size=32).weight
FP4_E8M0 = layer_scheme("W4A8_FP", scale="e8m0").weight
INT4_INTEGER = layer_scheme("W4A8", scale="integer").weight
QOQ = layer_scheme("W4A8", scale="integer", symmetric=False).weight
ALL = {
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "fp4 shift": FP4_SHIFT,
    "int4 shift": INT4_SHIFT,
    "fp4 e8m0": FP4_E8M0,
    "int4 integer": INT4_INTEGER,
    "qoq": QOQ,
}


def uneven(rows: int = 16, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3
    return weight * torch.randn(1, columns // 32, generator=generator).exp().repeat_interleave(32, dim=1)


def round_trip(weight: torch.Tensor, scheme: TensorScheme, *, mse_clip: bool) -> tuple[Grid, torch.Tensor]:
    grid = choose_grid(weight, scheme, mse_clip=mse_clip)
    return grid, decode(encode(weight, grid, scheme), grid, scheme)


def test_mxfp4_blocks_by_hand() -> None:
    weight = torch.zeros(3, 32)
    weight[0, :4] = torch.tensor([7.5, 3.2, -1.1, 0.3])
    weight[1, :4] = torch.tensor([5.1, 3.2, -1.1, 0.3])
    weight[2, :4] = torch.tensor([6.2, 0.6, -2.4, 0.1])
    grid, back = round_trip(weight, MXFP4, mse_clip=False)
    assert grid.scale.tolist() == [[2.0], [1.0], [2.0]]  # nothing is clipped: 6.2 wants the scale 2
    assert back[0, :4].tolist() == [8.0, 3.0, -1.0, 0.0]
    grid, back = round_trip(weight, MXFP4, mse_clip=True)
    assert grid.scale.tolist() == [[2.0], [1.0], [1.0]]  # clipping 6.2 costs less than the coarser steps
    assert back[2, :4].tolist() == [6.0, 0.5, -2.0, 0.0]


def test_nvfp4_blocks_by_hand() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :4] = torch.tensor([7.5, 3.2, -1.1, 0.3])
    weight[1, 16] = -48.0
    grid, back = round_trip(weight, NVFP4, mse_clip=False)
    assert grid.factor is not None and grid.factor.shape == (2, 1)
    torch.testing.assert_close(grid.factor, torch.full((2, 1), 48 / 2688))
    assert float(grid.scale[0, 0] / grid.factor[0]) == pytest.approx(72)
    torch.testing.assert_close(back[0, :4], torch.tensor([6.0, 2.0, -1.0, 0.0]) * 9 / 7)
    assert float(back[1, 16]) == pytest.approx(-48)


def test_shifts_by_hand() -> None:
    # Row 0: unclipped scales 3, 1, 0.7 under the factor 3 become 3, 1.5, 0.75. A group of zeros takes the scale at 1.
    weight = torch.zeros(2, 256)
    weight[0, [0, 64, 128]] = torch.tensor([18.0, 6.0, -4.2])
    grid, back = round_trip(weight, FP4_SHIFT, mse_clip=False)
    assert grid.scale.tolist() == [[3.0, 1.5, 0.75, 1.5], [1.0] * 4]
    assert grid.factor is not None and grid.factor.tolist() == [[3.0], [1.0]]
    assert back[0, [0, 64, 128]].tolist() == [18.0, 6.0, -4.5]


def test_integer_scales_by_hand() -> None:
    # Row 0: the largest unclipped scale is 2 = 16 × ⅛; 0.6 and 0.02 are nearest to 5 and 1 eighths.
    weight = torch.zeros(2, 256)
    weight[0, [0, 64, 128]] = torch.tensor([14.0, 4.2, -0.16])
    grid, back = round_trip(weight, INT4_INTEGER, mse_clip=False)
    assert grid.factor is not None and grid.factor.tolist() == [[0.125], [1.0]]
    assert grid.scale[0, :3].tolist() == [2.0, 0.625, 0.125] and grid.zero_point is None
    assert back[0, [0, 64, 128]].tolist() == [14.0, 4.375, -0.125]


def test_integer_scales_and_zero_points_are_qoq_s_second_level() -> None:
    """Worked out by hand from deepcompressor's rounding: scale RNE(237 / 15), zero point RNE(119 / 16)."""
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([-119.0, -37.0, 5.0, 118.0])
    grid, back = round_trip(weight, QOQ, mse_clip=False)
    assert grid.factor is not None and grid.factor.tolist() == [[1.0]]
    assert grid.scale.tolist() == [[16.0]] and grid.zero_point is not None and grid.zero_point.tolist() == [[7]]
    assert encode(weight, grid, QOQ)[0, :4].tolist() == [0, 5, 7, 14]
    assert back[0, :4].tolist() == [-112.0, -32.0, 0.0, 112.0]


@pytest.mark.parametrize("mse_clip", [False, True])
@pytest.mark.parametrize("scheme", [INT4_INTEGER, QOQ], ids=["symmetric", "zero points"])
def test_codes_under_integer_scales_are_int8_numbers(scheme: TensorScheme, mse_clip: bool) -> None:
    weight = uneven(64)
    weight[:32] = weight[:32].abs()  # ranges of one sign
    grid, back = round_trip(weight, scheme, mse_clip=mse_clip)
    assert grid.factor is not None
    int8 = back / grid.factor
    assert torch.equal(int8, int8.round()) and float(int8.min()) >= -128 and float(int8.max()) <= 127


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_scales_cost_little_more_error_than_any_scales(symmetric: bool) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    whole, free = (
        (round_trip(weight, layer_scheme("W4A8", scale=scale, symmetric=symmetric).weight, mse_clip=True)[1] - weight)
        .square()
        .sum()
        for scale in ("integer", "float")
    )
    assert 1.0 < float(whole / free) < 1.07


@pytest.mark.parametrize("name", ALL)
def test_every_scale_is_one_of_the_format(name: str) -> None:
    grid, _ = round_trip(uneven(), ALL[name], mse_clip=True)
    if ALL[name].scale == "e4m3":
        assert grid.factor is not None
        codes = (grid.scale / grid.factor).to(torch.float8_e4m3fn).to(torch.float32)
        assert torch.equal(codes * grid.factor, grid.scale)
        return
    if ALL[name].scale == "integer":
        assert grid.factor is not None
        assert torch.equal(grid.factor.to(torch.bfloat16).to(torch.float32), grid.factor)
        integers = grid.scale / grid.factor
        assert torch.equal(integers, integers.round()) and float(integers.min()) >= 1 and float(integers.max()) <= 16
        return
    octaves = torch.log2(grid.scale / (1.0 if grid.factor is None else grid.factor))
    assert torch.equal(octaves, octaves.round())
    if ALL[name].scale == "shift":
        assert bool(((octaves <= 0) & (octaves >= -14)).all())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp4 e8m0", "int4 integer"])
def test_the_search_finds_what_trying_all_scales_finds(name: str) -> None:
    scheme, weight = ALL[name], uneven(8)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(3)) ** 2 + 0.01
    grid = choose_grid(weight, scheme, mse_clip=True, importance=importance)
    group = 256 // grid.scale.shape[1]

    def lost(scale: torch.Tensor) -> torch.Tensor:
        trial = Grid(scale=scale, zero_point=None, factor=grid.factor)
        square = (decode(encode(weight, trial, scheme), trial, scheme) - weight).square() * importance
        return square.reshape(8, -1, group).sum(dim=-1)

    if scheme.scale == "e4m3":
        assert grid.factor is not None
        numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
        every = [grid.factor * number * torch.ones_like(grid.scale) for number in numbers]
    elif scheme.scale == "integer":
        assert grid.factor is not None
        every = [grid.factor * n * torch.ones_like(grid.scale) for n in range(1, 17)]
    else:
        every = [2.0**e * torch.ones_like(grid.scale) for e in range(-12, 8)]
    least = torch.stack([lost(scale) for scale in every]).amin(dim=0)
    assert bool((lost(grid.scale) <= least * 1.0001).float().mean() > 0.95)
    assert float(lost(grid.scale).sum()) <= 1.005 * float(least.sum())


@pytest.mark.parametrize("name", ALL)
def test_a_search_loses_less_than_none(name: str) -> None:
    weight = uneven()
    plain, found = ((round_trip(weight, ALL[name], mse_clip=m)[1] - weight).square().sum() for m in (False, True))
    assert float(found) < 0.97 * float(plain)


def test_a_factor_a_row_beats_bare_powers_of_two() -> None:
    weight = uneven(64, 512)
    shift, bare = (
        float((round_trip(weight, scheme, mse_clip=True)[1] - weight).square().sum())
        for scheme in (FP4_SHIFT, FP4_E8M0)
    )
    assert shift < 0.95 * bare


@pytest.mark.parametrize("name", ["fp4 shift", "int4 shift"])
def test_shifted_weights_are_fp8_weights(name: str) -> None:
    scheme = ALL[name]
    weight = uneven(32) * torch.logspace(-4, 4, 8).repeat_interleave(32)  # more than 14 octaves in a row
    grid = choose_grid(weight, scheme, mse_clip=True)
    assert float((grid.scale.amax(1) / grid.scale.amin(1)).max()) == 2.0**14
    codes = encode(weight, grid, scheme)
    zero = 8 if name == "int4 shift" else 0
    group = 64 if name == "fp4 shift" else 32
    fp8, row = widen_to_e4m3(codes, grid.scale, group_size=group, zero_code=zero, e2m1=zero == 0)
    assert fp8.dtype == torch.float8_e4m3fn and row.shape == (32, 1)
    assert torch.equal(fp8.to(torch.float32) * row, decode(codes, grid, scheme))


def test_scales_too_far_apart_are_no_fp8_weight() -> None:
    scale = power_of_two(torch.tensor([[0, -15]]))
    codes = torch.full((1, 128), 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="14 octaves"):
        widen_to_e4m3(codes, scale, group_size=64, zero_code=0, e2m1=True)
    with pytest.raises(ValueError, match="exactly"):
        widen_to_e4m3(codes + 2, torch.tensor([[1.0, 0.3]]), group_size=64, zero_code=0, e2m1=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_shares_one_factor_over_chunks_of_rows(
    name: str, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = uneven(24)
    hessian = torch.eye(256, dtype=torch.float64)
    options = QuantizerOptions(act_order=act_order)
    whole = gptq(weight, hessian, ALL[name], options)
    monkeypatch.setattr("qtool.quantize.quantizers.gptq.CHUNK_ROWS", 7)
    pieces = gptq(weight, hessian, ALL[name], options)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.grid.scale, pieces.grid.scale)
    part = pieces.rows(5, 9)
    assert torch.equal(
        decode(part.codes, part.grid, ALL[name]), decode(whole.codes, whole.grid, ALL[name])[5:9]
    )
    factor = scale_factor(weight, ALL[name], mse_clip=True, importance=hessian.diagonal())
    assert (factor is None) == (part.grid.factor is None)
    if factor is not None:
        assert part.grid.factor is not None and torch.equal(part.grid.factor, factor[5:9])
