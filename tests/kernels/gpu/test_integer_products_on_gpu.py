"""int8 and int4 products on a GPU: integer sums are the reference's bit for bit, whatever the tiling, in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.integer_gemm import Tiling
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.w4a4_gemm import w4a4_gemm
from qtool.kernels.w4a8_gemm import w4a8_gemm
from qtool.kernels.w8a8_gemm import w8a8_gemm

pytestmark = pytest.mark.gpu
# M, N, K: one token; a ragged everything; whole tiles; a prompt; K far longer than a split's least.
SHAPES = ((1, 256, 512), (17, 200, 333), (64, 256, 1024), (130, 320, 2048), (3, 96, 14336))
RAGGED, PROMPT = SHAPES[1], SHAPES[3]  # every form; compiling takes most of the time, so the other shapes are for one
Referenced = Callable[[Callable[[], Any]], Any]


def halves(n: int, k: int, device: torch.device) -> HalvesInt4:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    return HalvesInt4.from_canonical(pack_int4(codes), k)


def rand(*size: int, device: torch.device) -> Tensor:
    return torch.rand(size, device=device) + 0.5


def operands(form: str, m: int, n: int, k: int, device: torch.device) -> dict[str, Any]:
    """Arguments of w4a8_gemm whose sums stay integers, but for the forms that say "float"."""
    groups = -(-k // 64)
    found: dict[str, Any] = {
        "x_codes": torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device),
        "x_scale": rand(m, device=device),
        "weight": halves(n, k, device),
        "w_scale": rand(n, device=device),
    }
    if "zero" in form:
        size = (n, groups) if "zero group" in form else (n,)
        found["zero_point"] = torch.randint(0, 9, size, dtype=torch.uint8, device=device)
    if "integer" in form:
        largest = 9 if "zero" in form else 17
        numbers = torch.randint(1, largest, (groups, n), dtype=torch.uint8, device=device).T
        found |= {"w_group_scale": numbers, "w_group_size": 64}
    if "zero group" in form:
        found["w_group_size"] = 64
    if "float weights" in form:
        found |= {"w_scale": rand(groups, n, device=device).half().T, "w_group_size": 64}
    if "factors" in form:
        count = -(-k // 128)
        factors = torch.randint(1, 8, (count,), dtype=torch.int32, device=device)
        floats = rand(count, device=device)
        found |= {"tile_factors": floats if "float factors" in form else factors, "x_group_size": 128}
    if "bias" in form:
        found["bias"] = torch.randn(n, device=device).bfloat16()
    return found


EXACT = (
    "channel",
    "channel bias",
    "channel zero",
    "integer",
    "integer zero",
    "integer zero group",
    "zero group",
    "integer factors bias",
)
FLOAT = ("float weights", "float weights zero group", "integer float factors", "float weights factors bias")


@pytest.mark.parametrize(
    ("form", "shape"),
    [*(("channel", shape) for shape in SHAPES), *((form, shape) for form in EXACT[1:] for shape in (RAGGED, PROMPT))],
    ids=str,
)
def test_w4a8_is_the_reference_bit_for_bit(
    form: str, shape: tuple[int, int, int], device: torch.device, referenced: Referenced
) -> None:
    given = operands(form, *shape, device)
    dtype = torch.bfloat16 if form == "channel" else torch.float32
    got = w4a8_gemm(**given, out_dtype=dtype)
    assert torch.equal(got, referenced(lambda: w4a8_gemm(**given, out_dtype=dtype)))


@pytest.mark.parametrize("form", FLOAT)
def test_w4a8_with_float_scales(form: str, device: torch.device, referenced: Referenced) -> None:
    for shape in (RAGGED, PROMPT):
        given = operands(form, *shape, device)
        got = w4a8_gemm(**given, out_dtype=torch.float32)
        wanted = referenced(lambda given=given: w4a8_gemm(**given, out_dtype=torch.float32))
        # Roundings of segments, in another order: relative to the sums' size, not to what cancels.
        assert float((got - wanted).abs().max() / wanted.square().mean().sqrt()) < 1e-4, shape


@pytest.mark.parametrize("split", [1, 2, 3, 8, 16])
def test_every_split_of_k_gives_the_same_bits_in_every_run(
    split: int, device: torch.device, referenced: Referenced
) -> None:
    given = operands("integer", 16, 384, 8192, device)
    wanted = referenced(lambda: w4a8_gemm(**given, out_dtype=torch.float32))
    tiling = Tiling(block_m=16, block_n=128, num_warps=4, num_stages=4, split_k=split)
    for _ in range(25):
        assert torch.equal(w4a8_gemm(**given, out_dtype=torch.float32, tiling=tiling), wanted)


@pytest.mark.parametrize(("block_m", "warps"), [(16, 4), (32, 4), (64, 4), (128, 8)])
def test_every_tile_gives_the_same_bits(
    block_m: int, warps: int, device: torch.device, referenced: Referenced
) -> None:
    given = operands("channel", 130, 200, 640, device)
    wanted = referenced(lambda: w4a8_gemm(**given, out_dtype=torch.float32))
    tiling = Tiling(block_m=block_m, block_n=128, num_warps=warps, num_stages=3)
    assert torch.equal(w4a8_gemm(**given, out_dtype=torch.float32, tiling=tiling), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a8_is_the_reference_bit_for_bit(
    shape: tuple[int, int, int], device: torch.device, referenced: Referenced
) -> None:
    m, n, k = shape
    x, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    bias = torch.randn(n, device=device)
    xs, ws = rand(m, device=device), rand(n, device=device)
    got = w8a8_gemm(x, xs, w, ws, bias)
    assert torch.equal(got, referenced(lambda: w8a8_gemm(x, xs, w, ws, bias)))


@pytest.mark.parametrize("shape", [RAGGED, PROMPT], ids=str)
@pytest.mark.parametrize("form", ["channel", "integer", "channel zero", "integer factors"])
def test_w4a4_is_the_reference_bit_for_bit(
    form: str, shape: tuple[int, int, int], device: torch.device, referenced: Referenced
) -> None:
    given = operands(form, *shape, device)
    given["x_codes"] = halves(shape[0], shape[2], device)
    got = w4a4_gemm(**given, out_dtype=torch.float32)
    assert torch.equal(got, referenced(lambda: w4a4_gemm(**given, out_dtype=torch.float32)))


def test_a_token_has_the_same_bits_beside_any_others(device: torch.device) -> None:
    given = operands("channel", 70, 256, 1024, device)
    whole = w4a8_gemm(**given)
    for rows in (1, 5, 16, 33):
        few = {**given, "x_codes": given["x_codes"][:rows], "x_scale": given["x_scale"][:rows]}
        assert torch.equal(w4a8_gemm(**few), whole[:rows])


def test_nothing_is_written_outside_the_output(device: torch.device) -> None:
    m, n = 17, 200
    given = operands("channel", m, n, 512, device)
    around = torch.full((m + 2, n + 56), torch.nan, device=device)
    w4a8_gemm(**given, out_dtype=torch.float32, out=around[1:-1, :n])
    assert not bool(around[1:-1, :n].isnan().any())
    around[1:-1, :n] = torch.nan
    assert bool(around.isnan().all())


def test_scales_that_are_not_finite_stay_in_their_row(device: torch.device) -> None:
    given = operands("channel", 17, 200, 512, device)
    given["x_scale"][3] = torch.nan
    got = w4a8_gemm(**given)
    assert bool(got[3].isnan().all()) and not bool(got[[0, 2, 4, 16]].isnan().any())
