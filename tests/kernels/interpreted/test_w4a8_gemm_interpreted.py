"""w4a8_gemm through Triton's interpreter, against int64 and float64 computed here from the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qtool.errors import EnvironmentFault
from qtool.kernels.integer_gemm import Tiling, workspace
from qtool.kernels.pack import HalvesInt4, pack_int4
from qtool.kernels.runtime_smooth import (
    channel_ranges,
    integer_factors,
    largest_integer_factor,
    quantize_smoothed,
    smooth_factors,
    smoothed_gemm,
)
from qtool.kernels.w4a8_gemm import w4a8_gemm

Guard = Callable[[Tensor], Tensor]
ULP = 2.0**-24  # half a unit in the last place, relative, of float32

WHOLE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1)
IN_TWO = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1, split_k=2)
IN_THREE = Tiling(block_m=16, block_n=64, num_warps=4, num_stages=1, split_k=3)


def halves(codes: Tensor, guarded: Guard) -> HalvesInt4:
    columns = codes.shape[1]
    return HalvesInt4(guarded(HalvesInt4.from_canonical(pack_int4(codes), columns).packed), columns)


def along_k(numbers: Tensor, group: int, columns: int) -> Tensor:
    return numbers.double().repeat_interleave(group, dim=1)[:, :columns]


@dataclass
class Problem:
    """Arguments, and the same product as float64 matrices: y = x · wᵀ."""

    arguments: dict[str, Any]
    x: Tensor
    w: Tensor
    segments: int = 1

    def run(self, **more: Any) -> Tensor:
        return w4a8_gemm(**{**self.arguments, "out_dtype": torch.float32, "tiling": WHOLE, **more})

    def check(self, y: Tensor) -> None:
        """Every rounding of the scaled sum: one a segment and factor, three at the end."""
        exact = self.x @ self.w.T
        size = self.x.abs() @ self.w.abs().T
        bias = self.arguments.get("bias")
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        assert ((y.double() - exact).abs() <= (3 * self.segments + 4) * ULP * size).all()


@dataclass
class Form:
    """What changes along K."""

    w_group: int = 0
    w_kind: str = ""
    zero: str = ""
    x_group: int = 0
    x_kind: str = ""
    unit: bool = False  # scales of one, so that the output is the integer sum


def problem(form: Form, shape: tuple[int, int, int], guarded: Guard, seed: int = 0) -> Problem:
    m, n, k = shape
    torch.manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.ones(size) if form.unit else torch.rand(size) + 0.5

    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w_groups = -(-k // form.w_group) if form.w_group else 1
    x_groups = -(-k // form.x_group) if form.x_group else 1
    arguments: dict[str, Any] = {"x_codes": x, "x_scale": rand(m), "w_scale": rand(n)}
    w = codes.double()
    if form.zero:
        zero = torch.randint(0, 16, (n,) if form.zero == "row" else (n, w_groups), dtype=torch.uint8)
        arguments["zero_point"] = zero
        w = w - (zero.double()[:, None] if form.zero == "row" else along_k(zero, form.w_group, k))
    else:
        w = w - 8
    if form.w_kind == "integer":
        arguments["w_group_scale"] = torch.randint(1, 9 if form.zero else 17, (n, w_groups), dtype=torch.uint8)
        w = w * along_k(arguments["w_group_scale"], form.w_group, k)
    elif form.w_kind == "float":
        arguments["w_scale"] = rand(n, w_groups).half()
    if arguments["w_scale"].dim() == 2:
        w = w * along_k(arguments["w_scale"], form.w_group, k)
    else:
        w = w * arguments["w_scale"].double()[:, None]
    wide = x.double()
    if form.x_kind == "scale":
        arguments["x_scale"] = rand(m, x_groups)
        wide = wide * along_k(arguments["x_scale"], form.x_group, k)
    else:
        wide = wide * arguments["x_scale"].double()[:, None]
    if form.x_kind in ("integer", "float", "token integer", "token float"):
        size = (m if form.x_kind.startswith("token") else 1, x_groups)
        factors = torch.randint(1, 50, size, dtype=torch.int32) if "integer" in form.x_kind else torch.rand(size) + 0.5
        arguments["tile_factors"] = factors if form.x_kind.startswith("token") else factors[0]
        wide = wide * along_k(factors, form.x_group, k)
    arguments = {name: guarded(value) for name, value in arguments.items()}
    arguments |= {"weight": halves(codes, guarded), "w_group_size": form.w_group, "x_group_size": form.x_group}
    return Problem(arguments, wide, w, -(-k // 64) if form.w_group or form.x_group else 1)


EXACT_FORMS = {
    "channel": Form(),
    "zero point a row": Form(zero="row"),
    "integers of 64": Form(64, "integer"),
    "integers of 128": Form(128, "integer"),
    "integers of 256, zero points": Form(256, "integer", "group"),
    "integers of 64, zero points": Form(64, "integer", "group"),
    "integers of 128, zero point a row": Form(128, "integer", "row"),
    "zero points of 64": Form(64, "", "group"),
    "integer factors of 64": Form(x_group=64, x_kind="integer"),
    "integer factors of 128": Form(x_group=128, x_kind="integer"),
    "integer factors of 128 a token": Form(x_group=128, x_kind="token integer"),
    "integers of 64, zero points, integer factors of 128": Form(64, "integer", "group", 128, "integer"),
}
FLOAT_FORMS = {
    "floats of 64": Form(64, "float"),
    "floats of 192": Form(192, "float"),
    "floats of 256, zero points": Form(256, "float", "group"),
    "scales of 64 a token": Form(x_group=64, x_kind="scale"),
    "floats of 128, zero point a row, scales of 64 a token": Form(128, "float", "row", 64, "scale"),
    "integers of 64, float factors of 128": Form(64, "integer", "", 128, "float"),
    "integers of 128, float factors of 64 a token": Form(128, "integer", "", 64, "token float"),
    "floats of 64, integer factors of 128": Form(64, "float", "", 128, "integer"),
}


@pytest.mark.parametrize("name", EXACT_FORMS)
def test_an_integer_sum_is_exact(name: str, guarded: Guard) -> None:
    for shape, tiling in (((1, 5, 40), WHOLE), ((17, 70, 333), IN_TWO), ((3, 64, 384), WHOLE)):
        one = problem(Form(**{**vars(EXACT_FORMS[name]), "unit": True}), shape, guarded)
        expected = one.x @ one.w.T
        assert expected.abs().max() < 2**24
        assert torch.equal(one.run(tiling=tiling).double(), expected), shape


@pytest.mark.parametrize("tiling", [WHOLE, IN_THREE], ids=["whole", "in three"])
@pytest.mark.parametrize("name", FLOAT_FORMS)
def test_float_scales_stay_within_their_roundings(name: str, tiling: Tiling, guarded: Guard) -> None:
    for shape in ((2, 70, 333), (17, 5, 256)):
        one = problem(FLOAT_FORMS[name], shape, guarded)
        one.check(one.run(tiling=tiling))


@pytest.mark.parametrize("name", EXACT_FORMS)
def test_scales_and_bias_round_as_the_reference_does(
    name: str, guarded: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = problem(EXACT_FORMS[name], (5, 70, 200), guarded)
    one.arguments["bias"] = guarded(torch.randn(70).bfloat16())
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if name == "channel" else (torch.float32,)
    got = {dtype: one.run(out_dtype=dtype) for dtype in dtypes}
    one.check(got[torch.float32])
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    for dtype, y in got.items():
        assert y.dtype == dtype and torch.equal(y, one.run(out_dtype=dtype))


def test_the_largest_codes_do_not_overflow(guarded: Guard) -> None:
    k = 1024
    weight = halves(torch.zeros((3, k), dtype=torch.uint8), guarded)
    x = torch.full((1, k), -128, dtype=torch.int8)
    y = w4a8_gemm(x, torch.ones(1), weight, torch.ones(1), out_dtype=torch.float32, tiling=IN_THREE)
    assert (y == 128.0 * 8 * k).all()


@pytest.mark.parametrize("name", ["channel", "integers of 128", "floats of 64", "scales of 64 a token"])
def test_a_token_of_zeros_gives_the_bias(name: str, guarded: Guard) -> None:
    one = problem((EXACT_FORMS | FLOAT_FORMS)[name], (3, 70, 200), guarded)
    one.arguments["x_codes"][1] = 0
    one.arguments["x_scale"][1] = 0
    assert (one.run()[1] == 0).all()
    bias = torch.randn(70)
    assert torch.equal(one.run(bias=bias)[1], bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates_and_stays_in_its_row(bad: float, guarded: Guard) -> None:
    cases = {
        "x_scale": (Form(), (1,), "row"),
        "w_scale": (Form(), (1,), "column"),
        "w_scale of a group": (Form(64, "float"), (1, 2), "column"),
        "x_scale of a group": (Form(x_group=64, x_kind="scale"), (1, 2), "row"),
        "tile_factors": (Form(x_group=128, x_kind="token float"), (1, 1), "row"),
        "bias": (Form(), (1,), "column"),
    }
    for name, (form, at, where) in cases.items():
        one = problem(form, (3, 40, 200), guarded)
        one.arguments["bias"] = torch.zeros(40)
        one.arguments[name.split()[0]][at] = bad
        finite = one.run().isfinite()
        hit = torch.zeros_like(finite)
        hit[(slice(None), 1) if where == "column" else 1] = True
        assert torch.equal(finite, ~hit), name


def test_groups_beyond_a_ragged_end_are_not_read(guarded: Guard) -> None:
    """K ends in the first half of its last tile: the guard bands hold NaN where a second half's scale would be."""
    for form in (Form(64, "float"), Form(x_group=64, x_kind="scale"), Form(128, "float", "", 128, "token float")):
        one = problem(form, (2, 5, 130), guarded)
        one.check(one.run())


@pytest.mark.parametrize("name", ["channel", "integers of 64", "floats of 128, zero point a row, scales of 64 a token"])
def test_strides_of_every_operand_count(name: str, guarded: Guard) -> None:
    one = problem((EXACT_FORMS | FLOAT_FORMS)[name], (5, 70, 200), guarded)
    expected = one.run()
    wide = torch.full((5, 300), 99, dtype=torch.int8)
    wide[:, :200] = one.arguments["x_codes"]
    one.arguments["x_codes"] = wide[:, :200]
    for argument in ("w_scale", "w_group_scale", "x_scale", "zero_point"):
        if argument in one.arguments:
            every_second = one.arguments[argument].repeat_interleave(2, dim=0)[::2]
            one.arguments[argument] = every_second.mT.contiguous().mT if every_second.dim() == 2 else every_second
    out = torch.full((5, 90), 7.0)
    assert one.run(out=out[:, :70]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:, :70], expected) and (out[:, 70:] == 7).all()


@pytest.mark.parametrize(
    "name", ["channel", "integers of 64, zero points", "integer factors of 128 a token", "floats of 64"]
)
def test_a_token_comes_out_the_same_alone_and_beside_others(name: str, guarded: Guard) -> None:
    one = problem((EXACT_FORMS | FLOAT_FORMS)[name], (20, 70, 333), guarded)
    together = one.run(tiling=IN_THREE if name in EXACT_FORMS else WHOLE)
    for argument in ("x_codes", "x_scale", "tile_factors"):
        value = one.arguments.get(argument)
        if value is not None and value.shape[0] == 20:
            one.arguments[argument] = value[18:19]
    assert torch.equal(one.run()[0], together[18])


@pytest.mark.parametrize("name", ["channel", "floats of 64"])
def test_shared_sums_are_left_as_they_were_found(
    name: str, guarded: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = torch.zeros(4 * (16 * 64 + 1), dtype=torch.int32)
    monkeypatch.setattr(workspace, "stream_zeros", lambda count, device, least: kept[:count])
    one = problem((EXACT_FORMS | FLOAT_FORMS)[name], (17, 70, 384), guarded)
    first = one.run(tiling=IN_THREE)
    assert (kept == 0).all()
    assert torch.equal(first, one.run(tiling=IN_THREE))


def test_runtime_smooth(guarded: Guard) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 384) * torch.rand(384).mul(4).exp()
    codes = torch.randint(0, 16, (70, 384), dtype=torch.uint8)
    weight, w_scale = halves(codes, guarded), guarded(torch.rand(70) + 0.5)
    floats = smooth_factors(channel_ranges(x), 128)
    whole = integer_factors(floats[None], largest_integer_factor(384, largest_weight=8))
    assert whole.numbers.unique().numel() > 1
    for factors, unit in ((floats, torch.ones(1)), (whole.numbers[0], whole.base)):
        smoothed = quantize_smoothed(x, factors * unit)
        y = w4a8_gemm(
            guarded(smoothed.codes.flatten(-2).to(torch.int8)),
            smoothed.token_range[:, 0] / 7 * unit,
            weight,
            w_scale,
            out_dtype=torch.float32,
            tile_factors=guarded(factors),
            x_group_size=128,
            tiling=WHOLE,
        )
        expected = smoothed_gemm(smoothed, (codes.float() - 8) * w_scale[:, None])
        assert torch.allclose(y, expected, rtol=0, atol=float(expected.abs().max()) * 1e-6)


def test_what_does_not_fit_is_refused(guarded: Guard) -> None:
    one = problem(Form(64, "integer"), (3, 70, 200), guarded)
    wrong = {
        "x_codes": torch.zeros((3, 199), dtype=torch.int8),
        "x_scale": torch.ones(4),
        "w_scale": torch.ones(70, 4),
        "w_group_scale": torch.ones((70, 3), dtype=torch.uint8),
        "bias": torch.ones(71),
        "tile_factors": torch.ones(2),
        "out": torch.ones(3, 71),
        "zero_point": torch.ones((70, 3), dtype=torch.uint8),
        "out_dtype": torch.float64,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            one.run(**{name: value})


def test_groups_of_32_are_left_to_the_reference(guarded: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem(Form(32, "float"), (3, 70, 200), guarded)
    with pytest.raises(EnvironmentFault, match="32 columns"):
        one.run()
    monkeypatch.delenv("QTOOL_BACKEND")
    one.segments = 7
    one.check(one.run())
