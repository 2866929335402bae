"""The side product and QUAD's fused input by the interpreted kernels, against float64.

What is taken off the input is the stored side, so the codes are checked against the side that came out; the side itself
against its product. Few rows work in slices of columns, many in one pass: both are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.hadamard import dense, hadamard_plan, random_signs
from qtool.kernels.quantize_activation import RowHadamard
from qtool.kernels.side_gemm import ProjectedRows, add_side_output, project_rows, side_rows
from qtool.kernels.side_gemm import launch as launching
from qtool.kernels.side_gemm.configuration import SideConfiguration, SideTile

LARGEST = {"int8": 127.0, "int4": 7.0, "int4_halves": 7.0, "fp8_e4m3": 448.0}
BOUND = 1e-6  # of the largest code
Guarded = Callable[[Tensor], Tensor]


@pytest.fixture(params=[1, 1000], ids=["one pass", "slices"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    tiles = ((16, SideTile(rows=16, warps=4)), (1 << 30, SideTile(rows=32, warps=8)))
    chosen = SideConfiguration(programs=request.param, projection_warps=4, tiles=tiles, output_columns=128)
    monkeypatch.setattr(launching, "side_configuration", lambda: chosen)
    yield request.param


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _directions(width: int, rank: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.linalg.qr(_random(width, rank, seed=9))[0].to(dtype)


def _heavy(rows: int, width: int, directions: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows most of whose size lies along the directions."""
    rank = directions.shape[1]
    return (_random(rows, width) + 20 * _random(rows, rank, seed=1) @ directions.float().T).to(dtype)


def _codes(made: ProjectedRows) -> Tensor:
    codes = made.main.codes
    if codes.dtype != torch.uint8:
        return codes.float().double()
    halves = [h.to(torch.int16).reshape(len(h), -1, 64) for h in (codes & 15, codes >> 4)]
    nibbles = torch.cat(halves, dim=-1).flatten(1)[:, : made.main.columns]
    return torch.where(nibbles >= 8, nibbles - 16, nibbles).double()


def _matches(made: ProjectedRows, main: Tensor, form: str, group: int | None, slack: float) -> None:
    width = group or main.shape[1]
    blocks = torch.nn.functional.pad(main, (0, -main.shape[1] % width)).reshape(len(main), -1, width)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / LARGEST[form]
    quotient = (blocks / scale).flatten(1)[:, : main.shape[1]]
    codes, allowed = _codes(made), slack * LARGEST[form]
    exponent = quotient.abs().clamp_min(2.0**-6).log2().floor()
    half_step = 2.0 ** (exponent - 4) if form == "fp8_e4m3" else torch.tensor(0.5)
    assert bool(((codes - quotient).abs() <= half_step + allowed).all())
    torch.testing.assert_close(made.main.scale.double().reshape(scale.shape[:-1]), scale.squeeze(-1), rtol=4e-6, atol=0)
    if made.main.row_sums is not None:
        sums = torch.nn.functional.pad(codes, (0, -main.shape[1] % width)).reshape(len(main), -1, width).sum(-1)
        assert torch.equal(made.main.row_sums.double().reshape(sums.shape), sums)


@pytest.mark.parametrize(
    ("form", "width", "rank", "group", "block"),
    [
        ("int4", 320, 8, None, 64),
        ("int4_halves", 192, 24, None, 16),
        ("int4_halves", 256, 16, 128, 64),
        ("int8", 224, 64, 32, 32),
        ("fp8_e4m3", 160, 16, 64, None),
    ],
)
def test_quad_input(
    form: str, width: int, rank: int, group: int | None, block: int | None, programs: int, guarded: Guarded
) -> None:
    directions = _directions(width, rank)
    x = _heavy(19, width, directions, torch.bfloat16)
    signs = random_signs(width, seed=2, stream="quad")
    plan = None if block is None else hadamard_plan(width, block=block)
    rotation = None if plan is None else RowHadamard(plan=plan, signs=guarded(signs.float()))
    made = project_rows(
        guarded(x), guarded(directions), form, hadamard=rotation, group_size=group, row_sums=form != "fp8_e4m3"
    )
    side = x.double() @ directions.double()
    assert made.side.dtype == torch.float16
    torch.testing.assert_close(made.side.double(), side, rtol=2.0**-10, atol=1e-4)
    rest = x.double() - made.side.double() @ directions.double().T
    # What cancels leaves rounding of the size of what was there.
    slack = BOUND * float(x.abs().amax()) / float(rest.abs().amax(dim=1).amin()) + BOUND
    _matches(made, rest if plan is None else rest @ dense(plan, signs), form, group, slack)


@pytest.mark.parametrize(
    ("input_dtype", "directions_dtype", "side_dtype"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, None),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float16),
    ],
)
def test_every_mix_of_dtypes(
    input_dtype: torch.dtype, directions_dtype: torch.dtype, side_dtype: torch.dtype | None, programs: int
) -> None:
    directions = _directions(128, 16, directions_dtype)
    x = _heavy(3, 128, directions, input_dtype)
    rotation = RowHadamard(plan=hadamard_plan(128, block=64))
    made = project_rows(x, directions, "int8", hadamard=rotation, side_dtype=side_dtype)
    kept = side_dtype or directions_dtype
    assert made.side.dtype == kept
    precision = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[kept]
    torch.testing.assert_close(made.side.double(), x.double() @ directions.double(), rtol=precision, atol=1e-4)
    rest = (x.double() - made.side.double() @ directions.double().T) @ dense(rotation.plan)
    _matches(made, rest, "int8", None, 50 * BOUND)


def test_the_reference_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    directions = _directions(192, 24)
    x = _heavy(5, 192, directions, torch.bfloat16)
    plan = hadamard_plan(192, block=16)
    for form, group in (("int4_halves", 64), ("fp8_e4m3", None)):
        made = project_rows(x, directions, form, hadamard=RowHadamard(plan=plan), group_size=group)
        rest = x.double() - made.side.double() @ directions.double().T
        _matches(made, rest @ dense(plan), form, group, 50 * BOUND)
    assert torch.equal(side_rows(x, directions), made.side)
    output = torch.zeros(5, 192)
    torch.testing.assert_close(add_side_output(output, made.side, directions), made.side.float() @ directions.float().T)


def test_rows_alone_are_rows_beside_others_and_bad_ones_stay_alone(programs: int) -> None:
    directions = _directions(192, 8)
    x = _heavy(6, 192, directions, torch.bfloat16)
    x[1, 7], x[2, 100], x[3] = torch.nan, torch.inf, 0
    rotation = RowHadamard(plan=hadamard_plan(192, block=64))
    made = project_rows(x, directions, "int4_halves", hadamard=rotation)
    assert not bool(made.main.scale[1:3].isfinite().any())
    assert float(made.main.scale[3]) == 0 and int(made.main.codes[3].sum()) == 0 and int(made.side[3].abs().sum()) == 0
    for row in (0, 4, 5):
        alone = project_rows(x[row : row + 1], directions, "int4_halves", hadamard=rotation)
        assert torch.equal(alone.main.codes[0], made.main.codes[row])
        assert torch.equal(alone.main.scale[0], made.main.scale[row]) and torch.equal(alone.side[0], made.side[row])


def test_what_no_one_kernel_takes() -> None:
    directions = _directions(256, 8)
    x = _heavy(2, 256, directions, torch.float32).reshape(1, 2, 256)
    plan = hadamard_plan(256)
    made = project_rows(x, directions, "int8", hadamard=RowHadamard(plan=plan), group_size=256)
    assert made.side.shape == (1, 2, 8) and made.main.codes.shape == (1, 2, 256) and made.main.scale.shape == (1, 2, 1)
    flat = project_rows(x[0], directions, "int8", hadamard=RowHadamard(plan=plan), group_size=256)
    rest = x[0].double() - flat.side.double() @ directions.double().T
    _matches(flat, rest @ dense(plan), "int8", 256, 50 * BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_side_rows(dtype: torch.dtype, programs: int, guarded: Guarded) -> None:
    x, down = guarded(_random(2, 9, 200, dtype=torch.bfloat16)), guarded(_random(200, 12, dtype=torch.float16))
    side = side_rows(x, down, dtype=dtype)
    exact = x.double() @ down.double()
    assert side.dtype == dtype
    precision = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(side.double(), exact, rtol=precision * 1.001, atol=2e-5)


def test_a_float16_side_saturates() -> None:
    down = torch.full((64, 1), 100.0, dtype=torch.float16)
    x = torch.stack((torch.full((64,), 1e3), torch.full((64,), -1e3), torch.full((64,), torch.nan)))
    side = side_rows(x, down)
    assert side[:2].flatten().tolist() == [65504.0, -65504.0] and bool(side[2].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 130, 8), (17, 33, 128), (33, 200, 24)])
def test_adds_to_the_output(dtype: torch.dtype, rows: int, columns: int, rank: int, guarded: Guarded) -> None:
    y, side = _random(rows, columns, dtype=dtype), guarded(_random(rows, rank, seed=1, dtype=torch.bfloat16))
    up = guarded(_random(columns, rank, seed=2, dtype=torch.bfloat16))
    output = guarded(y)
    assert add_side_output(output, side, up) is output
    exact = y.double() + side.double() @ up.double().T
    precision = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(output.double(), exact, rtol=precision * 1.001, atol=2e-5)


def test_no_rows() -> None:
    directions = _directions(64, 8)
    assert project_rows(torch.zeros(0, 64), directions).main.codes.shape == (0, 64)
    assert side_rows(torch.zeros(0, 64), directions).shape == (0, 8)
    assert add_side_output(torch.zeros(0, 5), torch.zeros(0, 8).half(), torch.zeros(5, 8).half()).shape == (0, 5)


def test_refusals() -> None:
    x, directions = torch.zeros(2, 64), _directions(64, 8)
    with pytest.raises(UsageError, match="for 32 columns"):
        project_rows(x[:, :32], directions)
    with pytest.raises(UsageError, match="16-bit"):
        project_rows(x, directions.float())
    with pytest.raises(UsageError, match="rank"):
        side_rows(torch.zeros(2, 256), torch.zeros(256, 129, dtype=torch.float16))
    with pytest.raises(UsageError, match="one dtype"):
        add_side_output(torch.zeros(2, 5), torch.zeros(2, 8).half(), torch.zeros(5, 8).bfloat16())
    with pytest.raises(UsageError, match="not contiguous"):
        add_side_output(torch.zeros(5, 2).T, torch.zeros(2, 8).half(), torch.zeros(5, 8).half())
