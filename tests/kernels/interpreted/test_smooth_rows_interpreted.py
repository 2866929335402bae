"""Runtime Smooth of ragged requests by the interpreted kernels, against float64 and against the one-token rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.quantize_activation import quantize_int4
from qtool.kernels.runtime_smooth import (
    RangeRule,
    Requests,
    SmoothedRows,
    integer_factors,
    largest_integer_factor,
    smooth_rows,
    smoothed_codes,
)

CPU = torch.device("cpu")
LENGTHS = [1, 0, 18, 5]
PUBLISHED, ROBUST = RangeRule(), RangeRule(level=True)
BOUND = 1e-5  # of a code
Guarded = Callable[[Tensor], Tensor]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3).to(dtype)


def _codes(rows: SmoothedRows, columns: int) -> Tensor:
    if rows.codes.dtype == torch.int8:
        return rows.codes.double()
    halves = [h.to(torch.int16).reshape(len(h), -1, 64) for h in (rows.codes & 15, rows.codes >> 4)]
    nibbles = torch.cat(halves, dim=-1).flatten(1)[:, :columns]
    return torch.where(nibbles >= 8, nibbles - 16, nibbles).double()


def _factors(x: Tensor, group: int, *, level: bool) -> Tensor:
    """s_G of one request, float64 [T, K] to [G]."""
    size = x.abs()
    if level and len(x) > 1:
        size = size / x.square().mean(dim=1, keepdim=True).sqrt()
    return size.amax(dim=0).reshape(-1, group).amax(dim=1)


def _matches(rows: SmoothedRows, x: Tensor, group: int, clip: float = 1.0) -> None:
    """Codes and token ranges of float64 rows under the factors that `rows` says it used."""
    factors = rows.factors.double()[rows.request.long()].repeat_interleave(group, dim=1)
    smoothed = x / factors
    token_range = smoothed.abs().amax(dim=1) * clip
    torch.testing.assert_close(rows.token_range.double(), token_range, rtol=1e-6, atol=0)
    quotient = (7 * smoothed / token_range.unsqueeze(1)).clamp(-7, 7)
    assert bool(((_codes(rows, x.shape[1]) - quotient).abs() <= 0.5 + BOUND).all())


@pytest.mark.parametrize("rule", [PUBLISHED, ROBUST])
@pytest.mark.parametrize(("form", "group"), [("int4", 64), ("int4_halves", 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ragged_requests(
    rule: RangeRule,
    form: str,
    group: int,
    dtype: torch.dtype,
    backend: str,
    guarded: Guarded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QTOOL_BACKEND", backend)
    x = guarded(_random(24, 192, dtype=dtype))
    rows = smooth_rows(x, group, rule, requests=Requests.of_lengths(LENGTHS, CPU), form=form)
    wide = x.double()
    for request, part in enumerate(wide.split(LENGTHS)):
        if len(part):
            expected = _factors(part, group, level=rule.level)
            torch.testing.assert_close(rows.factors[request].double(), expected, rtol=1e-6, atol=0)
    _matches(rows, wide, group)


@pytest.mark.parametrize("form", ["int4", "int4_halves"])
def test_single_tokens_have_the_codes_of_int4_per_group_bit_for_bit(form: str, guarded: Guarded) -> None:
    x = guarded(_random(3, 192))
    expected, scale = quantize_int4(x, group_size=64)
    for rule in (PUBLISHED, ROBUST):
        one_by_one = smooth_rows(x, 64, rule, requests=Requests.single_tokens(3, CPU), form=form)
        ragged = smooth_rows(x, 64, rule, requests=Requests.of_lengths([1, 1, 1], CPU), form=form)
        for rows in (one_by_one, ragged):
            assert torch.equal(_codes(rows, 192), expected.flatten(1).double())
            assert torch.equal(rows.token_range, torch.ones(3))
            assert torch.equal(rows.factors / 7, scale.squeeze(-1))


def test_a_request_does_not_see_its_neighbours() -> None:
    quiet, loud = _random(7, 128), 1e3 * _random(20, 128, seed=1)
    alone = smooth_rows(quiet, 64, ROBUST)
    beside = smooth_rows(torch.cat((loud, quiet)), 64, ROBUST, requests=Requests.of_lengths([20, 7], CPU))
    assert torch.equal(beside.codes[20:], alone.codes)
    assert torch.equal(beside.factors[1], alone.factors[0])


def test_a_long_request_in_chunks() -> None:
    x = _random(140, 32)
    x[131, 20] = 1e3
    rows = smooth_rows(x, 16)
    torch.testing.assert_close(rows.factors[0].double(), _factors(x.double(), 16, level=False), rtol=0, atol=0)


def test_integer_factors(guarded: Guarded) -> None:
    x = guarded(_random(24, 256) * torch.linspace(0.01, 3, 256))
    requests = Requests.of_lengths(LENGTHS, CPU)
    rows = smooth_rows(x, 64, ROBUST, requests=requests, largest_factor=largest_integer_factor(256))
    assert rows.integers is not None
    assert int(rows.integers.numbers.amin()) >= 1 and int(rows.integers.numbers[2].amax()) == 127
    torch.testing.assert_close(rows.factors, rows.integers.base[:, None] * rows.integers.numbers, rtol=1e-6, atol=0)
    _matches(rows, x.double(), 64)


def test_a_quantile_falls_back_to_the_reference_factors() -> None:
    x = _random(20, 64)
    rows = smooth_rows(x, 32, RangeRule(quantile=0.5))
    assert bool((rows.factors[0] < smooth_rows(x, 32).factors[0]).all())
    _matches(rows, x.double(), 32)


def test_frozen_factors_and_a_clip(guarded: Guarded) -> None:
    x = guarded(_random(3, 128))
    factors = guarded(torch.tensor([[0.5, 2.0]]))
    codes, token_range = smoothed_codes(x, factors, torch.zeros(3, dtype=torch.int32), clip=0.5)
    request = torch.zeros(3, dtype=torch.int32)
    rows = SmoothedRows(codes=codes, token_range=token_range, factors=factors, request=request, integers=None)
    _matches(rows, x.double(), 64, clip=0.5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_request(bad: float) -> None:
    x = _random(6, 64)
    x[1, 40] = bad
    x[4] = 0
    rows = smooth_rows(x, 32, ROBUST, requests=Requests.of_lengths([3, 3], CPU))
    step = rows.factors[rows.request.long()] * rows.token_range[:, None]
    back = rows.codes.float().reshape(6, 2, 32) * step[:, :, None]
    assert not bool(back[1].isfinite().all()) and bool(back[3:].isfinite().all())
    assert int(rows.codes[4].abs().sum()) == 0 and float(rows.token_range[4]) == 0
    assert torch.equal(rows.codes[3:], smooth_rows(x[3:], 32, ROBUST).codes)
    single = smooth_rows(x, 32, requests=Requests.single_tokens(6, CPU))
    assert not bool(single.factors[1].isfinite().all()) and bool(single.factors[[0, 2, 3, 4, 5]].isfinite().all())


def test_the_largest_integer_factor_cannot_overflow() -> None:
    for columns in (4096, 14336, 131072):
        largest, one = largest_integer_factor(columns), columns * 7 * 128
        assert largest * one < 2**31 and (largest == 127 or (largest + 1) * one >= 2**31)
    assert largest_integer_factor(14336, largest_code=127) == 9
    assert integer_factors(torch.tensor([[1e-9, 2.0]]), 8).numbers.tolist() == [[1, 8]]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="whole tiles"):
        smooth_rows(torch.zeros(2, 96), 64)
    with pytest.raises(UsageError, match="power of two"):
        smooth_rows(torch.zeros(2, 96), 48)
    with pytest.raises(UsageError, match="int8"):
        smooth_rows(torch.zeros(2, 64), 64, form="int8")
