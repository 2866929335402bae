"""GPTQ against what it must equal, beat and record."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused
from qtool.quantize.artifacts.rule import QUANTIZERS as NAMES
from qtool.quantize.artifacts.rule import QuantizerOptions
from qtool.quantize.artifacts.scheme import TensorScheme, layer_scheme
from qtool.quantize.quantizers.gptq import gptq
from qtool.quantize.quantizers.hessian import LARGEST_DAMP, Hessian, inverse_factor, output_error
from qtool.quantize.quantizers.numerics import decode
from qtool.quantize.quantizers.outcome import Outcome
from qtool.quantize.quantizers.rtn import rtn
from qtool.quantize.quantizers.table import QUANTIZERS

SCHEMES = {
    "int4 g32": layer_scheme("W4A16", group_size=32).weight,
    "int4 asym g32": layer_scheme("W4A16", group_size=32, symmetric=False).weight,
    "int4 channel": layer_scheme("W4A16", group_size="channel").weight,
    "int8": layer_scheme("W8A8").weight,
    "fp8": layer_scheme("FP8_DYNAMIC").weight,
    "fp4 g32": layer_scheme("W4A8_FP", group_size=32).weight,
    "integer": layer_scheme("W4A8", group_size=32, scale="integer").weight,
    "integer asym": layer_scheme("W4A8", group_size=32, scale="integer", symmetric=False).weight,
    "fp4 shift": layer_scheme("W4A8_FP", group_size=32, scale="shift").weight,
    "mxfp4": layer_scheme("MXFP4A16").weight,
    "nvfp4": layer_scheme("NVFP4A16").weight,
}
PLAIN = QuantizerOptions(act_order=False, mse_clip=False)


def correlated(columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, K] and the Hessian of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, columns, generator=generator)
    inputs = torch.randn(512, 12, generator=generator) @ mixing + 0.1 * torch.randn(512, columns, generator=generator)
    hessian = Hessian("layer")
    hessian.add(inputs)
    return torch.randn(24, columns, generator=generator), hessian.matrix()


def error(outcome: Outcome, weight: torch.Tensor, hessian: torch.Tensor, scheme: TensorScheme) -> float:
    return output_error(decode(outcome.codes, outcome.grid, scheme) - weight, weight, hessian)


def test_the_table_has_the_names_that_recipes_know() -> None:
    assert tuple(QUANTIZERS) == NAMES


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_on_correlated_inputs(name: str, act_order: bool) -> None:
    weight, hessian = correlated()
    scheme = SCHEMES[name]
    options = QuantizerOptions(act_order=act_order)
    ours = error(gptq(weight, hessian, scheme, options), weight, hessian, scheme)
    theirs = error(rtn(weight, None, scheme, options), weight, hessian, scheme)
    assert ours < 0.4 * theirs


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("block_size", [1, 48, 128])
def test_an_identity_hessian_gives_rtn(name: str, block_size: int) -> None:
    weight, _ = correlated(columns=100)
    options = PLAIN.model_copy(update={"block_size": block_size})
    ours = gptq(weight, torch.eye(100, dtype=torch.float64), SCHEMES[name], options)
    theirs = rtn(weight, None, SCHEMES[name], options)
    assert torch.equal(ours.grid.scale, theirs.grid.scale)
    assert torch.equal(ours.codes.float(), theirs.codes.float())


def test_one_compensated_column_by_hand() -> None:
    # Two columns with H = [[1, .5], [.5, 1]]: rounding the first leaves e, and the least-squares answer moves the
    # second by e × H12 / H22 = e / 2. Scale 1 is fixed by the 7 in each row.
    weight = torch.tensor([[7.0, 0.4, 0.4], [7.0, 2.3, 1.3]])
    hessian = torch.eye(3, dtype=torch.float64)
    hessian[1, 2] = hessian[2, 1] = 0.5
    options = PLAIN.model_copy(update={"damp": 1e-9})
    outcome = gptq(weight, hessian, SCHEMES["int4 channel"], options)
    # row 0: .4 → 0 leaves .4, the next becomes .4 + .2 = .6 → 1; row 1: 2.3 → 2 leaves .3, 1.3 + .15 → 1
    assert (outcome.codes.int() - 8).tolist() == [[7, 0, 1], [7, 2, 1]]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [96, 75])
def test_lazy_blocks_do_not_change_the_result(act_order: bool, columns: int) -> None:
    weight, hessian = correlated(columns)
    scheme = SCHEMES["int4 g32"]
    small, large = (
        gptq(weight, hessian, scheme, QuantizerOptions(act_order=act_order, block_size=size)) for size in (33, 4096)
    )
    assert float((small.codes != large.codes).float().mean()) < 0.005  # rounding of float32 sums only


def test_act_order_keeps_groups_contiguous() -> None:
    weight, hessian = correlated(columns=70)
    scheme = SCHEMES["int4 g32"]
    outcome = gptq(weight, hessian, scheme, QuantizerOptions(mse_clip=False))
    assert outcome.grid.scale.shape == (24, 3)
    # Static grids: each contiguous group's scale is that of the original weight.
    assert torch.equal(outcome.grid.scale, rtn(weight, None, scheme, PLAIN).grid.scale)
    difference = decode(outcome.codes, outcome.grid, scheme) - weight
    assert float(difference.abs().max()) < 4 * float(outcome.grid.scale.max())


def test_without_act_order_grids_follow_the_updated_weights() -> None:
    weight, hessian = correlated()
    scheme = SCHEMES["int4 g32"]
    outcome, original = gptq(weight, hessian, scheme, PLAIN), rtn(weight, None, scheme, PLAIN)
    assert torch.equal(outcome.grid.scale[:, 0], original.grid.scale[:, 0])
    assert not torch.equal(outcome.grid.scale[:, 1:], original.grid.scale[:, 1:])


def test_damping_is_escalated_and_recorded() -> None:
    direction = torch.arange(1.0, 65.0, dtype=torch.float64)
    rank_one = torch.outer(direction, direction)
    outcome = gptq(torch.randn(4, 64), rank_one, SCHEMES["int4 g32"], QuantizerOptions(damp=1e-20))
    assert outcome.escalations >= 3
    assert outcome.damp == pytest.approx(1e-20 * 10**outcome.escalations)
    calm = gptq(torch.randn(4, 64), rank_one, SCHEMES["int4 g32"], QuantizerOptions())
    assert (calm.damp, calm.escalations) == (QuantizerOptions().damp, 0)


def test_an_indefinite_hessian_is_refused() -> None:
    with pytest.raises(InputRefused, match="positive definite"):
        inverse_factor(torch.diag(torch.tensor([1.0, -10 * LARGEST_DAMP, 8.0, 100.0], dtype=torch.float64)), 0.01)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = correlated(columns=40)
    factor = inverse_factor(hessian, 0.01)
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    mean = hessian.diagonal().mean()
    product = upper.T @ upper @ (hessian / mean + 0.01 * torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(product, torch.eye(40, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_dead_column_keeps_its_nearest_codes() -> None:
    weight, hessian = correlated()
    hessian = hessian.clone()
    hessian[:, 5] = hessian[5, :] = 0
    options = QuantizerOptions(mse_clip=False)
    outcome = gptq(weight, hessian, SCHEMES["int4 g32"], options)
    nearest = rtn(weight, None, SCHEMES["int4 g32"], options)
    assert torch.equal(outcome.codes[:, 5], nearest.codes[:, 5])
    assert bool((outcome.codes[:, 5] != 8).any())


def test_ties_of_the_diagonal_break_by_index_and_runs_repeat() -> None:
    weight, hessian = correlated()
    scale = hessian.diagonal().rsqrt()
    unit = hessian * scale[:, None] * scale[None, :]
    unit.fill_diagonal_(1.0)
    ordered, plain = (
        gptq(weight, unit, SCHEMES["int4 channel"], QuantizerOptions(act_order=order)) for order in (True, False)
    )
    assert torch.equal(ordered.codes, plain.codes)
    again = gptq(weight, unit, SCHEMES["int4 channel"], QuantizerOptions(act_order=True))
    assert again.codes.numpy().tobytes() == ordered.codes.numpy().tobytes()


def test_rows_are_independent() -> None:
    weight, hessian = correlated()
    both = gptq(weight, hessian, SCHEMES["int4 g32"], QuantizerOptions())
    part = gptq(weight[8:16], hessian, SCHEMES["int4 g32"], QuantizerOptions())
    np.testing.assert_array_equal(both.rows(8, 16).codes.numpy(), part.codes.numpy())


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    hessian = Hessian("model.layers.0.mlp.down_proj")
    inputs = torch.ones(3, 4)
    inputs[1, 2] = torch.nan
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.down_proj\.input"):
        hessian.add(inputs)
    with pytest.raises(InputRefused):
        hessian.add(torch.full((2, 4), 1e30))


def test_clipping_is_searched_by_default_only_where_the_inputs_are_known() -> None:
    weight, hessian = correlated()
    scheme = SCHEMES["int4 channel"]
    grids = {
        (quantize, clip): quantize(weight, hessian, scheme, QuantizerOptions(mse_clip=clip)).grid.scale
        for quantize in (rtn, gptq)
        for clip in (None, True, False)
    }
    assert torch.equal(grids[rtn, None], grids[rtn, False])
    assert torch.equal(grids[gptq, None], grids[gptq, True])
    assert torch.equal(grids[gptq, False], grids[rtn, False])
    assert bool((grids[rtn, True] <= grids[rtn, False]).all()) and not torch.equal(grids[rtn, True], grids[rtn, False])


@pytest.mark.parametrize("size", [1, 2, 3, 40, 1025, 1500])
def test_the_factor_is_that_of_the_inverse_at_every_size(size: int) -> None:
    inputs = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    hessian = inputs.T @ inputs
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    factor = inverse_factor(hessian, 0.01, order)
    upper = factor.upper.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    wanted = torch.linalg.inv(damped[order][:, order]) * hessian.diagonal().mean()
    assert factor.upper.is_contiguous() and bool((upper == upper.triu()).all())
    torch.testing.assert_close(upper.T @ upper, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
