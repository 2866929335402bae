"""Low-rank compensation: the optimum in its own norm, exact at full rank, better with every direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.transforms.low_rank import LowRank, LowRankCodes, low_rank

SHAPES = [(24, 40), (40, 24), (32, 32)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _hessian(width: int) -> Tensor:
    x = _random(200, width, seed=7).double() * torch.logspace(-1, 1.5, width, dtype=torch.float64)
    return x.T @ x


def _lost(error: Tensor, factors: LowRank, hessian: Tensor) -> float:
    rest = error.double() - factors.weight.double()
    return float(((rest @ hessian) * rest).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_weighted_equals_the_truncated_optimum(shape: tuple[int, int], rank: int) -> None:
    error, hessian = _random(*shape), _hessian(shape[1])
    root = torch.linalg.cholesky(hessian)
    tail = torch.linalg.svdvals(error.double() @ root)[rank:].square().sum()
    found = _lost(error, low_rank(error, rank, hessian, damp=0), hessian)
    assert found == pytest.approx(float(tail), rel=1e-5)


def test_no_step_from_the_optimum_improves() -> None:
    error, hessian = _random(12, 16), _hessian(16)
    best = low_rank(error, 3, hessian, damp=0)
    up, down = best.up.double().requires_grad_(), best.down.double().requires_grad_()
    rest = error.double() - up @ down
    ((rest @ hessian) * rest).sum().backward()
    scale = float(hessian.diagonal().max())
    assert up.grad is not None and down.grad is not None
    assert float(up.grad.abs().max()) < 1e-4 * scale
    assert float(down.grad.abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    error = _random(*shape)
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ v[:5]
    torch.testing.assert_close(low_rank(error, 5).weight, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_beats_plain_where_it_counts_and_only_there(shape: tuple[int, int]) -> None:
    error, hessian = _random(*shape), _hessian(shape[1])
    plain, weighted = low_rank(error, 4), low_rank(error, 4, hessian)
    assert _lost(error, weighted, hessian) < 0.8 * _lost(error, plain, hessian)
    identity = torch.eye(shape[1], dtype=torch.float64)
    assert _lost(error, plain, identity) < _lost(error, weighted, identity)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_rank_helps_and_the_full_one_is_exact(shape: tuple[int, int], weighted: bool) -> None:
    error, hessian = _random(*shape), _hessian(shape[1])
    lost = [_lost(error, low_rank(error, r, hessian if weighted else None, damp=0), hessian) for r in (1, 2, 8, 16)]
    if weighted:
        assert lost == sorted(lost, reverse=True)
    exact = low_rank(error, min(shape), hessian if weighted else None)
    torch.testing.assert_close(exact.weight, error, rtol=1e-4, atol=1e-5)


def test_a_hessian_without_full_rank_still_ranks_directions() -> None:
    error, x = _random(24, 40), _random(10, 40, seed=3).double()
    factors = low_rank(error, 10, x.T @ x, damp=1e-6)
    torch.testing.assert_close(x.float() @ factors.weight.T, x.float() @ error.T, rtol=1e-3, atol=1e-3)


def test_output_is_the_correction_of_the_linear() -> None:
    error, x = _random(24, 40), _random(3, 5, 40, seed=2)
    factors = low_rank(error, 6)
    torch.testing.assert_close(factors.output(x), x @ factors.weight.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(factors.up, low_rank(error, 6).up)


def test_eight_bits_keep_the_correction() -> None:
    error, hessian = _random(64, 96), _hessian(96)
    factors = low_rank(error, 8, hessian)
    codes = LowRankCodes.of(factors)
    assert codes.up.dtype == codes.down.dtype == torch.int8
    assert codes.stored_bits == 8 * 8 * (64 + 96) + 32 * 8
    assert _lost(error, codes.factors(), hessian) < 1.02 * _lost(error, factors, hessian)
    zero = LowRankCodes.of(LowRank(up=torch.zeros(4, 2), down=torch.zeros(2, 6))).factors()
    assert float(zero.weight.abs().max()) == 0


@pytest.mark.parametrize("rank", [0, 25])
def test_ranks_that_do_not_fit_are_refused(rank: int) -> None:
    with pytest.raises(InputRefused, match="does not fit"):
        low_rank(_random(24, 40), rank)
