"""Rows to codes on a GPU: the reference's bits where nothing is summed, elsewhere its neighbours at boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.hadamard import hadamard_plan
from qtool.kernels.quantize_activation import RmsNorm, RowHadamard, SiluTimes, prepare_rows, quantize_rows
from qtool.kernels.runtime_smooth import Requests, smooth_rows
from qtool.kernels.side_gemm import add_side_output, project_rows, side_rows

pytestmark = pytest.mark.gpu
FORMS = ("int8", "int4", "int4_halves", "fp8_e4m3")
SHAPES = ((1, 256), (5, 333), (3, 14336))
FEW = 2e-3  # the share of codes that may be a neighbour: rounding boundaries within 10⁻⁶ of the largest code


def as_bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def rows(m: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(m, k, device=device) * (1 + 10 * torch.rand(k, device=device))
    x[m // 2] *= 0 if m > 1 else 1
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [None, 64])
def test_plain_rows_are_the_references_bits(
    group: int | None, form: str, shape: tuple[int, int], device: torch.device, referenced: Callable[..., Any]
) -> None:
    if form == "fp8_e4m3" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("no E4M3 below capability 8.9")
    x = rows(*shape, device)
    sums = form.startswith("int")

    def run() -> Any:
        return quantize_rows(x, form, group_size=group, row_sums=sums, clip=0.9 if "int4" in form else 1.0)

    got, wanted = run(), referenced(run)
    assert torch.equal(as_bytes(got.codes), as_bytes(wanted.codes))
    assert torch.equal(got.scale, wanted.scale)
    assert not sums or torch.equal(got.row_sums, wanted.row_sums)


def sources(name: str, x: Tensor) -> Any:
    device = x.device
    draw = torch.Generator(device).manual_seed(1)
    other = torch.randn(x.shape, generator=draw, device=device).bfloat16()
    gain = torch.rand(x.shape[1], generator=draw, device=device).bfloat16() + 0.5
    return {
        "norm": lambda: RmsNorm(gain=gain, epsilon=1e-5),
        "residual": lambda: RmsNorm(gain=gain, epsilon=1e-5, residual=other),
        "silu": lambda: SiluTimes(up=other),
        "plain": lambda: None,
    }[name]()


@pytest.mark.parametrize(("hadamard", "width"), [("none", 14336), ("full", 4096), ("full", 14336), ("blocks", 4096)])
@pytest.mark.parametrize("source", ["plain", "norm", "residual", "silu"])
def test_fused_rows_are_the_references_or_neighbours(
    source: str, hadamard: str, width: int, device: torch.device, referenced: Callable[..., Any]
) -> None:
    x = rows(9, width, device)
    signs = torch.randint(0, 2, (width,), device=device).float() * 2 - 1
    plan = None if hadamard == "none" else hadamard_plan(width, block=32 if hadamard == "blocks" else None)
    rotation = None if plan is None else RowHadamard(plan=plan, signs=signs)

    def run() -> Any:
        made = sources(source, x)
        found = quantize_rows(x, "int8", source=made, hadamard=rotation, keep=torch.float32)
        return found, getattr(made, "residual", None)

    (got, got_sum), (wanted, wanted_sum) = run(), referenced(run)
    # Two products of a rotation round what is between them to bfloat16 once.
    size = 2e-2 if rotation is not None else 1e-4
    limit = wanted.values.abs().amax(dim=1, keepdim=True)
    assert bool(((got.values - wanted.values).abs() <= size * limit + 1e-30).all())
    off = (got.codes.int() - wanted.codes.int()).abs()
    assert int(off.max()) <= (4 if rotation is not None else 1)
    assert rotation is not None or float((off > 0).float().mean()) < FEW
    assert wanted_sum is None or torch.equal(got_sum, wanted_sum)


def test_a_row_has_the_same_bits_beside_any_others(device: torch.device) -> None:
    x = rows(33, 4096, device)
    plan = RowHadamard(plan=hadamard_plan(4096), signs=None)
    whole = quantize_rows(x, hadamard=plan)
    for count in (1, 2, 17):
        few = quantize_rows(x[:count].contiguous(), hadamard=plan)
        assert torch.equal(few.codes, whole.codes[:count]) and torch.equal(few.scale, whole.scale[:count])


def test_what_is_not_finite_stays_in_its_row(device: torch.device) -> None:
    x = rows(5, 512, device)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    value = quantize_rows(x).scale
    assert not bool(value[[1, 2]].isfinite().any()) and bool(value[[0, 3, 4]].isfinite().all())
    assert bool(prepare_rows(x, torch.float32)[1, 7].isnan())


@pytest.mark.parametrize("form", ["int4", "int4_halves"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [5, 1, 40], [64]], ids=str)
def test_runtime_smooth_is_the_reference(
    lengths: list[int], form: str, device: torch.device, referenced: Callable[..., Any]
) -> None:
    x = rows(sum(lengths), 1024, device)
    requests = Requests.of_lengths(lengths, device)

    def run() -> Any:
        return smooth_rows(x, 128, requests=requests, form=form, clip=0.9)

    got, wanted = run(), referenced(run)
    assert torch.equal(got.factors, wanted.factors)
    assert torch.allclose(got.token_range, wanted.token_range, rtol=1e-6)
    assert float((as_bytes(got.codes) != as_bytes(wanted.codes)).float().mean()) < FEW


@pytest.mark.parametrize("rank", [8, 64, 128])
def test_side_products(rank: int, device: torch.device, referenced: Callable[..., Any]) -> None:
    x, down = torch.randn(17, 4096, device=device).bfloat16(), (torch.randn(4096, rank, device=device) / 64).half()
    up, y = torch.randn(200, rank, device=device).half(), torch.randn(17, 200, device=device)

    def run() -> Any:
        side = side_rows(x, down, dtype=torch.float32)
        return side, add_side_output(y.clone(), side.half(), up)

    for got, wanted in zip(run(), referenced(run), strict=True):
        assert float((got - wanted).abs().max() / wanted.square().mean().sqrt()) < 2e-2


def test_quads_input(device: torch.device, referenced: Callable[..., Any]) -> None:
    x = rows(17, 4096, device)
    directions = torch.linalg.qr(torch.randn(4096, 16, device=device))[0].half()
    rotation = RowHadamard(plan=hadamard_plan(4096, block=32), signs=None)

    def run() -> Any:
        return project_rows(x, directions, "int8", hadamard=rotation)

    got, wanted = run(), referenced(run)
    assert float((got.side.float() - wanted.side.float()).abs().max()) <= 0.02 * float(wanted.side.float().abs().max())
    assert int((got.main.codes.int() - wanted.main.codes.int()).abs().max()) <= 4
