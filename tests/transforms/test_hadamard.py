"""Hadamard matrices are what they claim to be, for every width that models have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.errors import UsageError
from qtool.kernels.hadamard import apply, dense, hadamard_plan, invert, random_signs
from qtool.kernels.hadamard.paley import paley, paley_prime_power

FIRST = (11, 19, 43, 59, 67, 83, 107, 139, 179)
SECOND = (5, 13, 17, 29, 37, 73, 461)
POWERS = {28: 27, 344: 343, 52: 25, 100: 49}  # order → q, no prime


@pytest.mark.parametrize("order", [q + 1 for q in FIRST] + [2 * (q + 1) for q in SECOND] + list(POWERS))
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = paley(order).astype(np.int64)
    assert set(matrix.ravel().tolist()) == {1, -1}
    assert (matrix @ matrix.T == order * np.eye(order)).all()
    assert (matrix[0] == 1).all() and (matrix[:, 0] == 1).all()


def test_the_construction_of_an_order() -> None:
    assert {order: paley_prime_power(order) for order in (12, 36, 28, 344, 428, 22, 172)} == {
        12: ("Paley I", 11),
        36: ("Paley II", 17),
        28: ("Paley I", 27),
        344: ("Paley I", 343),
        428: None,  # exists, but Paley does not build it
        22: None,
        172: None,
    }


@pytest.mark.parametrize(
    ("width", "block", "order"),
    [
        (576, 576, 36),
        (1536, 1536, 12),
        (96, 96, 12),
        (64, 64, 1),
        (40, 40, 20),
        (2048, 2048, 1),
        (11008, 11008, 344),
        (14336, 14336, 28),
        (2880, 2880, 180),
        (4864, 4864, 76),
        (13696, 128, 1),  # 107 × 128: no matrix of order 428 … 13696
        (36, 36, 36),
        (6, 2, 1),
        (43, 1, 1),
    ],
)
def test_the_plan_of_a_width(width: int, block: int, order: int) -> None:
    plan = hadamard_plan(width)
    assert (plan.width, plan.block, plan.order, plan.order * plan.power) == (width, block, order, block)
    assert str(block) in plan.reason
    assert ("no Hadamard matrix" in plan.reason) == (block < width)


@pytest.mark.parametrize("width", [576, 1536, 96, 64, 40, 2048, 13696, 36])
def test_dense_matrices_are_orthonormal_with_flat_blocks(width: int) -> None:
    plan = hadamard_plan(width)
    block = dense(hadamard_plan(plan.block))
    assert ((block * plan.block**0.5).abs() - 1).abs().max() < 1e-12
    assert (block @ block.T - torch.eye(plan.block)).abs().max() < 1e-12


@pytest.mark.parametrize("width", [11008, 14336])
def test_wide_transforms_keep_products(width: int) -> None:
    """H Hᵀ = n I seen from rows: unit vectors become flat, and inner products stay."""
    plan = hadamard_plan(width)
    rows = torch.zeros(6, width, dtype=torch.float64)
    rows[torch.arange(6), torch.tensor([0, 1, 31, 32, width // 2, width - 1])] = width**0.5
    out = apply(rows, plan, random_signs(width, seed=1, stream="rows"))
    assert (out.abs() - 1).abs().max() < 1e-10
    assert (out @ out.T - width * torch.eye(6)).abs().max() < 1e-6


@pytest.mark.parametrize("block", [16, 32, 64, 128, None])
@pytest.mark.parametrize("width", [384, 1152])
def test_apply_is_the_dense_product_and_invert_undoes_it(width: int, block: int | None) -> None:
    plan, signs = hadamard_plan(width, block=block), random_signs(width, seed=3, stream="x")
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = dense(plan, signs)
    torch.testing.assert_close(apply(x, plan, signs), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(invert(apply(x, plan, signs), plan, signs), x, rtol=0, atol=1e-12)
    for first in range(0, width, plan.block):
        matrix[first : first + plan.block, first : first + plan.block] = 0
    assert not matrix.any()


@pytest.mark.parametrize("width", [64, 128, 4096, 8192, 576])
def test_products_and_butterflies_agree(width: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = hadamard_plan(width)
    torch.testing.assert_close(apply(x.float(), plan).double(), apply(x, plan), rtol=0, atol=2e-6)
    torch.testing.assert_close(invert(x.float(), plan).double(), invert(x, plan), rtol=0, atol=2e-6)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(33, 2048, generator=torch.Generator().manual_seed(0))
    plan, signs = hadamard_plan(2048, block=64), random_signs(2048, seed=0, stream="x")
    together = apply(x, plan, signs)
    for row in range(0, 33, 8):
        assert torch.equal(apply(x[row : row + 1], plan, signs)[0], together[row])


def test_an_order_by_hand() -> None:
    """Sylvester's matrix of order 4 on one row, signs first."""
    out = apply(torch.tensor([1.0, 2.0, 3.0, 4.0]), hadamard_plan(4), torch.tensor([1.0, -1.0, 1.0, 1.0]))
    assert out.tolist() == [3.0, 1.0, -4.0, 2.0]


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((2, 14336), 1e4, dtype=torch.float16)
    out = apply(x, hadamard_plan(14336), random_signs(14336, seed=0, stream="x"))
    assert out.dtype == torch.float16 and out.isfinite().all()


def test_online_plans_keep_the_dense_factor_small() -> None:
    online = hadamard_plan(2880, largest_order=64)
    assert (online.block, online.order) == (960, 60)


@pytest.mark.parametrize(("width", "block"), [(576, 128), (688, 172), (64, 0), (0, None)])
def test_impossible_blocks_are_refused(width: int, block: int | None) -> None:
    with pytest.raises(UsageError):
        hadamard_plan(width, block=block)


def test_signs_are_these_for_ever() -> None:
    signs = random_signs(300, seed=7, stream="R1")
    assert "".join("-" if s < 0 else "+" for s in signs[:32].tolist()) == "-------+++---+-+--+-++-++-+-+-+-"
    assert int((signs[256:] < 0).sum()) == 22
    assert torch.equal(random_signs(40, seed=7, stream="R1"), signs[:40])
    for other in (random_signs(300, seed=8, stream="R1"), random_signs(300, seed=7, stream="R2.0")):
        assert not torch.equal(other, signs)
    assert abs(float(random_signs(10000, seed=0, stream="x").mean())) < 0.05


@pytest.mark.parametrize("width, block", [(64, 64), (96, 32), (60, 60)])
def test_its_gradient_is_that_of_the_matrix(width: int, block: int) -> None:
    plan, signs = hadamard_plan(width, block=block), random_signs(width, seed=1, stream="t").double()
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply(x, plan, signs), (x,))
    weights = torch.randn(3, width, dtype=torch.float64)
    (apply(x, plan, signs) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ dense(plan, signs).T)
