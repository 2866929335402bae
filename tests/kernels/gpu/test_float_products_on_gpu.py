"""FP8, W4A-FP8 and W4A16 on a GPU: within what their tensor cores round, and the same bits in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.float_gemm import Tiling
from qtool.kernels.fp8_gemm import fp8_gemm
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.w4a16_gemm import w4a16_gemm
from qtool.kernels.w4afp8_gemm import w4afp8_gemm

pytestmark = pytest.mark.gpu
SHAPES = ((1, 256, 512), (17, 200, 336), (64, 256, 1024), (130, 320, 2048))
RAGGED, PROMPT = SHAPES[1], SHAPES[3]  # every form; compiling takes most of the time, so the other shapes are for one
# Of the output's root mean square. Hopper adds E4M3 products with about 14 bits: 2048 columns lose up to 64 × 2⁻¹³.
E4M3_ERROR, SIXTEEN_BITS_ERROR = 8e-3, 1e-4


def near(got: Tensor, wanted: Tensor, most: float) -> None:
    error = (got.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
    assert float(error) < most, float(error)


def codes(m: int, k: int, device: torch.device) -> Tensor:
    return (torch.randn(m, k, device=device) * 32).clamp(-448, 448).to(torch.float8_e4m3fn)


def rand(*size: int, device: torch.device) -> Tensor:
    return torch.rand(size, device=device) + 0.5


def halves(n: int, k: int, device: torch.device, encoding: Any = "twos_complement") -> HalvesInt4:
    low = 1 if encoding == "sign_magnitude" else 0
    nibbles = torch.randint(low, 16, (n, k), dtype=torch.uint8, device=device)
    return HalvesInt4.from_canonical(pack_int4(nibbles), k, encoding)


@pytest.mark.usefixtures("e4m3")
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        *(("row", shape) for shape in SHAPES),
        *(
            (form, shape)
            for form in ("tensor", "fast", "token blocks", "row blocks", "square blocks")
            for shape in (RAGGED, PROMPT)
        ),
    ],
    ids=str,
)
def test_fp8(form: str, shape: tuple[int, int, int], device: torch.device, referenced: Callable[..., Any]) -> None:
    m, n, k = shape
    blocks = -(-k // 128)
    xs = rand(m, blocks, device=device) if "blocks" in form else rand(1 if form == "tensor" else m, device=device)
    sizes = {"tensor": (1,), "row blocks": (n, blocks), "square blocks": (-(-n // 128), blocks)}
    ws = rand(*sizes.get(form, (n,)), device=device)
    x, w, bias = codes(m, k, device), codes(n, k, device), torch.randn(n, device=device).bfloat16()
    longest = k if form == "fast" else 128

    def run() -> Tensor:
        return fp8_gemm(x, xs, w, ws, bias, torch.float32, longest_sum=longest)

    first = run()
    near(first, referenced(run), E4M3_ERROR)
    assert all(torch.equal(run(), first) for _ in range(5))


@pytest.mark.usefixtures("e4m3")
@pytest.mark.parametrize("shape", [RAGGED, PROMPT], ids=str)
@pytest.mark.parametrize(("group", "longest"), [(None, 2048), (None, 128), (128, 2048), (64, 2048), (32, 2048)])
def test_w4afp8(
    group: int | None, longest: int, shape: tuple[int, int, int], device: torch.device, referenced: Callable[..., Any]
) -> None:
    m, n, k = shape
    ws = rand(1 if group is None else -(-k // group), n, device=device).half().T
    x, xs, w = codes(m, k, device), rand(m, device=device), halves(n, k, device, "sign_magnitude")

    def run() -> Tensor:
        return w4afp8_gemm(x, xs, w, ws, None, torch.float32, group_size=group, longest_sum=longest)

    first = run()
    near(first, referenced(run), E4M3_ERROR)
    assert all(torch.equal(run(), first) for _ in range(5))


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, RAGGED), (torch.bfloat16, PROMPT), (torch.float16, RAGGED)], ids=str
)
@pytest.mark.parametrize(("group", "zeros"), [(None, False), (128, False), (128, True), (64, True), (32, False)])
def test_w4a16(
    group: int | None,
    zeros: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device,
    referenced: Callable[..., Any],
) -> None:
    m, n, k = shape
    ws = rand(1 if group is None else -(-k // group), n, device=device).half().T
    zero = torch.randint(0, 16, ws.shape, dtype=torch.uint8, device=device) if zeros else None
    x, w = torch.randn(m, k, device=device).to(dtype), halves(n, k, device)

    def run() -> Tensor:
        return w4a16_gemm(x, w, ws, zero, None, torch.float32, group_size=group)

    first = run()
    near(first, referenced(run), SIXTEEN_BITS_ERROR)
    assert all(torch.equal(run(), first) for _ in range(5))


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
def test_every_cut_of_k_is_within_the_rounding_and_repeats(
    parts: int, device: torch.device, referenced: Callable[..., Any]
) -> None:
    x, w = torch.randn(16, 4096, device=device).bfloat16(), halves(384, 4096, device)
    ws = rand(32, 384, device=device).half().T
    tiling = Tiling(tile_m=16, tile_n=128, warps=4, stages=4, parts=parts)
    runs = [w4a16_gemm(x, w, ws, None, None, torch.float32, group_size=128, tiling=tiling) for _ in range(25)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    near(
        runs[0],
        referenced(lambda: w4a16_gemm(x, w, ws, None, None, torch.float32, group_size=128)),
        SIXTEEN_BITS_ERROR,
    )


@pytest.mark.usefixtures("e4m3")
def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    x, xs, w = codes(17, 512, device), rand(17, device=device), codes(200, 512, device)
    xs[3], xs[5] = torch.nan, torch.inf
    got = fp8_gemm(x, xs, w, rand(200, device=device))
    assert not bool(got[[3, 5]].isfinite().any())
    assert bool(got[[0, 2, 4, 6, 16]].isfinite().all())
