"""E2M1, E4M3 and E8M0 against tables, against ml_dtypes, and every exact cast enumerated."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.kernels.small_floats import (
    E2M1_LEVELS,
    MX_RULES,
    casts_exactly,
    ceil_log2,
    e2m1_codes,
    e2m1_values,
    e8m0_bytes,
    e8m0_scale,
    exact_exponents,
    mx_exponent,
    power_of_two,
    round_e2m1,
    rows_cast_exactly,
    shift_of,
)

E2M1 = (*E2M1_LEVELS, *(-level for level in E2M1_LEVELS))
INT4 = tuple(range(-8, 8))


def test_e2m1_ties_go_to_the_even_mantissa_and_large_values_saturate() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 1e30, -2.5])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, -2]
    assert torch.isnan(round_e2m1(torch.tensor(float("nan"))))


def test_e2m1_rounds_and_codes_as_ml_dtypes_does() -> None:
    x = torch.cat([torch.arange(-64, 65) / 8, torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3])
    theirs = np.clip(x.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    ours = round_e2m1(x)
    assert np.array_equal(ours.numpy(), theirs.astype(np.float32))
    codes = e2m1_codes(ours).numpy()
    nonzero = ours.numpy() != 0  # ours has no negative zero
    assert np.array_equal(codes[nonzero], theirs.view(np.uint8)[nonzero])
    assert not codes[~nonzero].any()
    every = torch.arange(16, dtype=torch.uint8)
    assert np.array_equal(
        e2m1_values(every).numpy(), every.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )


def test_powers_of_two_are_exact_over_the_normal_range() -> None:
    exponents = torch.arange(-126, 128)
    values = power_of_two(exponents)
    assert values.tolist() == [2.0**e for e in range(-126, 128)]
    assert torch.equal(ceil_log2(values), exponents.to(torch.int32))
    above = torch.nextafter(values[:-1], torch.tensor(torch.inf))
    assert torch.equal(ceil_log2(above), exponents[1:].to(torch.int32))


def test_e8m0_bytes_are_those_of_ml_dtypes() -> None:
    values = power_of_two(torch.arange(-126, 128))
    stored = e8m0_bytes(values)
    assert np.array_equal(stored.numpy(), values.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8))
    assert torch.equal(e8m0_scale(stored), values)
    assert bool(torch.isnan(e8m0_scale(torch.tensor([0, 255], dtype=torch.uint8))).all())


# By hand: a maximum m × 2ᵏ, m in [4, 8), takes k; k + 1 from m = 7 on under "even", above 6 under "rceil".
@pytest.mark.parametrize("octave", [-40, -1, 0, 3, 60])
def test_the_three_rules_of_a_block_scale(octave: int) -> None:
    amax = torch.tensor([4.0, 5.1, 6.0, 6.2, 6.999, 7.0, 7.5, 7.999]) * 2.0**octave
    found = {rule: (mx_exponent(amax, largest=6.0, rule=rule) - octave).tolist() for rule in MX_RULES}
    assert found == {
        "floor": [0, 0, 0, 0, 0, 0, 0, 0],
        "even": [0, 0, 0, 0, 0, 1, 1, 1],
        "rceil": [0, 0, 0, 1, 1, 1, 1, 1],
    }
    eight = torch.tensor([256.0, 448.0, 449.0, 495.0, 496.0]) * 2.0**octave
    found = {rule: (mx_exponent(eight, largest=448.0, rule=rule) - octave).tolist() for rule in MX_RULES}
    assert found == {"floor": [0, 0, 0, 0, 0], "even": [0, 0, 0, 0, 1], "rceil": [0, 0, 1, 1, 1]}


def representable(dtype: type) -> set[float]:
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return set(values[np.isfinite(values)].tolist())


FLOAT8 = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


@pytest.mark.parametrize(
    ("levels", "target", "first", "last"),
    [
        (E2M1, torch.float8_e4m3fn, -8, 6),
        (E2M1, torch.float8_e5m2, -15, 13),
        (E2M1, torch.int8, 1, 4),
        (INT4, torch.float8_e4m3fn, -9, 5),
        (INT4, torch.float8_e5m2, -16, 12),
        (INT4, torch.int8, 0, 4),
    ],
)
def test_exact_casts_by_powers_of_two_enumerated(
    levels: tuple[float, ...], target: torch.dtype, first: int, last: int
) -> None:
    held = set(map(float, range(-128, 128))) if target is torch.int8 else representable(FLOAT8[target])
    exact = [k for k in range(-40, 41) if all(level * 2.0**k in held for level in levels)]
    assert exact == list(range(first, last + 1))
    assert exact_exponents(levels, target) == range(first, last + 1)


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_int4_codes_times_whole_second_level_scales_enumerated(target: torch.dtype) -> None:
    held = set(map(float, range(-128, 128))) if target is torch.int8 else representable(FLOAT8[target])
    for scale in range(1, 129):
        products = torch.tensor(INT4) * float(scale)
        assert casts_exactly(products, target).tolist() == [p in held for p in products.tolist()]
    # INT8 holds them up to 16; FP8 only what adds no significant bit to 7.
    fits = [s for s in range(1, 129) if bool(casts_exactly(torch.tensor(INT4) * float(s), target).all())]
    assert fits == {
        torch.int8: list(range(1, 17)),
        torch.float8_e4m3fn: [1, 2, 4, 8, 16, 32],
        torch.float8_e5m2: [1, 2, 4, 8, 16, 32, 64, 128],
    }[target]


def test_values_that_do_not_fit_are_told_apart() -> None:
    values = torch.tensor([448.0, 449.0, 480.0, 17.0, 18.0, 2.0**-9, 2.0**-10, -0.0, float("inf"), float("nan")])
    exact = casts_exactly(values, torch.float8_e4m3fn).tolist()
    assert exact == [True, False, False, False, True, True, False, True, False, False]


def test_a_row_casts_when_its_groups_are_fourteen_octaves_or_less_apart() -> None:
    exponents = torch.tensor([[3, -11], [3, -12], [0, 0], [-100, -90]])
    assert rows_cast_exactly(exponents, E2M1, torch.float8_e4m3fn).tolist() == [True, False, True, True]
    assert rows_cast_exactly(exponents, INT4, torch.float8_e4m3fn).tolist() == [True, False, True, True]


def test_shifts_of_a_factor() -> None:
    factor = torch.tensor([[0.3], [7.7]])
    shifts = torch.tensor([[0, 3, 14], [14, 1, 0]])
    assert torch.equal(shift_of(factor * power_of_two(-shifts), factor), shifts.to(torch.uint8))
