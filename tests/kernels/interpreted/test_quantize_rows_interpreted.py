"""Rows to codes by the interpreted kernel, against float64: norms, activation functions and rotations in front.

A code must be the rounded float64 quotient wherever that lies further than 10⁻⁶ of the largest code from a rounding
boundary, and a neighbour elsewhere: float32's rounding, and the order of its sums, may tip only those.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.hadamard import dense, hadamard_plan, random_signs
from qtool.kernels.quantize_activation import (
    QuantizedRows,
    RmsNorm,
    RowHadamard,
    SiluTimes,
    prepare_rows,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)

LARGEST = {"int8": 127.0, "int4": 7.0, "int4_halves": 7.0, "fp8_e4m3": 448.0}
BOUND = 1e-6  # of the largest code
Guarded = Callable[[Tensor], Tensor]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3).to(dtype)


def _codes(rows: QuantizedRows) -> Tensor:
    """The codes as float64 [M, K], halves taken apart."""
    if rows.codes.dtype != torch.uint8:
        return rows.codes.to(torch.float32).double()
    low = (rows.codes & 15).to(torch.int16)
    high = (rows.codes >> 4).to(torch.int16)
    tiles = torch.cat([half.reshape(*half.shape[:-1], -1, 64) for half in (low, high)], dim=-1).flatten(-2)
    signed = torch.where(tiles >= 8, tiles - 16, tiles)
    assert int(signed[..., rows.columns :].abs().sum()) == 0
    return signed[..., : rows.columns].double()


def _matches(rows: QuantizedRows, values: Tensor, form: str, group: int | None = None, clip: float = 1.0) -> None:
    """Codes, scales and sums of float64 values [M, K]."""
    columns = values.shape[1]
    width = group or columns
    padded = torch.nn.functional.pad(values, (0, -columns % width)).reshape(len(values), -1, width)
    limit = padded.abs().amax(dim=-1, keepdim=True) * clip
    scale = limit / LARGEST[form]
    quotient = (padded / scale).flatten(1)[:, :columns]
    codes = _codes(rows)
    slack = BOUND * LARGEST[form]
    if form == "fp8_e4m3":
        exponent = quotient.abs().clamp_min(2.0**-6).log2().floor()
        assert bool(((codes - quotient).abs() <= 2.0 ** (exponent - 4) + slack).all())
    else:
        near = quotient.clamp(-LARGEST[form], LARGEST[form])
        assert bool(((codes - near).abs() <= 0.5 + slack).all())
    kept = scale.squeeze(-1) if group else scale.flatten()
    torch.testing.assert_close(rows.scale.double(), kept, rtol=2e-6, atol=0)
    if rows.row_sums is not None:
        grouped = torch.nn.functional.pad(codes, (0, -columns % width)).reshape(len(values), -1, width).sum(-1)
        assert torch.equal(rows.row_sums.double(), grouped if group else grouped.flatten())


@pytest.mark.parametrize("form", LARGEST)
@pytest.mark.parametrize(("shape", "group"), [((1, 33), None), ((3, 200), 64), ((2, 576), 128), ((2, 128), 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows(form: str, shape: tuple[int, int], group: int | None, dtype: torch.dtype, guarded: Guarded) -> None:
    x = guarded(_random(*shape, dtype=dtype))
    rows = quantize_rows(x, form, group_size=group, row_sums=form != "fp8_e4m3")
    _matches(rows, x.double(), form, group)


@pytest.mark.parametrize("group", [None, 64])
def test_bit_for_bit_the_codes_of_the_fake_quantizers(group: int | None) -> None:
    x = _random(4, 192)
    for form, quantize in (("int8", quantize_int8), ("int4", quantize_int4)):
        codes, scale = quantize(x, group_size=group)
        rows = quantize_rows(x, form, group_size=group)
        assert torch.equal(rows.codes.to(torch.float32), codes.flatten(1))
        assert torch.equal(rows.scale.reshape(scale.shape), scale)


def test_every_tie_goes_to_even() -> None:
    x = torch.cat((torch.arange(-253, 254) / 2.0, torch.tensor([127.0]))).unsqueeze(0)
    assert torch.equal(quantize_rows(x).codes[0].to(torch.float32), torch.round(x[0]))


@pytest.mark.parametrize("form", LARGEST)
def test_zeros_tiny_rows_and_rows_that_are_not_finite(form: str) -> None:
    x = _random(6, 96)
    x[1] = 0
    x[2] = 2.0**-126
    x[3, 5] = torch.nan
    x[4, 95] = torch.inf
    rows = quantize_rows(x, form)
    back = _codes(rows) * rows.scale.double().unsqueeze(-1)
    assert bool((back[1:3].abs() <= 2.0**-126).all()) and int(_codes(rows)[1].abs().sum()) == 0
    assert bool(back[3].isnan().any()) and bool(back[4].isnan().any())
    assert torch.equal(back[[0, 5]], _codes(quantize_rows(x[[0, 5]], form)) * rows.scale[[0, 5]].double().unsqueeze(-1))


def test_a_row_does_not_see_the_rows_beside_it() -> None:
    x, loud = _random(1, 256), 1e4 * _random(3, 256, seed=1)
    source = RmsNorm(gain=None, epsilon=1e-5)
    rotation = RowHadamard(plan=hadamard_plan(256))
    alone = quantize_rows(x, source=source, hadamard=rotation)
    beside = quantize_rows(torch.cat((loud, x)), source=source, hadamard=rotation)
    assert torch.equal(beside.codes[3:], alone.codes) and torch.equal(beside.scale[3:], alone.scale)


def test_a_clipped_range_saturates() -> None:
    x = _random(3, 160)
    rows = quantize_rows(x, "int4_halves", clip=0.6, group_size=32, row_sums=True)
    _matches(rows, x.double(), "int4", 32, clip=float(torch.tensor(0.6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "fp8_e4m3"])
def test_norm_of_the_sum_that_is_written_back(dtype: torch.dtype, form: str, guarded: Guarded) -> None:
    x = guarded(_random(2, 3, 72, dtype=dtype))
    residual = guarded(_random(2, 3, 72, seed=1, dtype=dtype))
    gain = guarded(_random(72, seed=2, dtype=dtype))
    total = (x.float() + residual.float()).to(dtype)
    rows = quantize_rows(x, form, source=RmsNorm(gain=gain, epsilon=1e-3, residual=residual))
    assert torch.equal(residual, total)
    wide = total.double().reshape(6, 72)
    normal = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * gain.double()
    assert rows.codes.shape == x.shape and rows.scale.shape == (2, 3)
    codes, scale = rows.codes.flatten(0, 1), rows.scale.flatten()
    _matches(QuantizedRows(codes=codes, scale=scale, row_sums=None, columns=72, values=None), normal, form)


def test_gate_and_up_may_be_halves_of_one_matrix(guarded: Guarded) -> None:
    both = guarded(_random(3, 2 * 144, dtype=torch.bfloat16))
    gate, up = both[:, :144], both[:, 144:]
    rows = quantize_rows(gate, "int4_halves", source=SiluTimes(up=up), row_sums=True)
    wide = gate.double()
    _matches(rows, wide / (1 + (-wide).exp()) * up.double(), "int4_halves")


@pytest.mark.parametrize(
    ("width", "block"),
    [(1040, 16), (576, 32), (320, 64), (256, 128), (256, None), (1024, None), (576, None), (512, 256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations(width: int, block: int | None, dtype: torch.dtype, guarded: Guarded) -> None:
    x = guarded(_random(2, width, dtype=dtype))
    plan = hadamard_plan(width, block=block)
    signs = random_signs(width, seed=3, stream="rows")
    rows = quantize_rows(x, hadamard=RowHadamard(plan=plan, signs=guarded(signs.to(torch.float32))), row_sums=True)
    _matches(rows, x.double() @ dense(plan, signs), "int8")


def test_everything_at_once_and_the_values_beside(guarded: Guarded) -> None:
    x, up = guarded(_random(2, 384)), guarded(_random(2, 384, seed=1))
    plan = hadamard_plan(384, block=64)
    rows = quantize_rows(
        x, "int4_halves", source=SiluTimes(up=up), hadamard=RowHadamard(plan=plan), group_size=128, keep=torch.float32
    )
    wide = x.double() / (1 + (-x.double()).exp()) * up.double() @ dense(plan)
    _matches(rows, wide, "int4_halves", 128)
    assert rows.values is not None
    torch.testing.assert_close(rows.values.double(), wide, rtol=0, atol=2e-6 * float(wide.abs().max()))
    alone = prepare_rows(x, torch.bfloat16, source=SiluTimes(up=up), hadamard=RowHadamard(plan=plan))
    assert torch.equal(alone, rows.values.to(torch.bfloat16))


def test_the_reference_makes_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _random(4, 256)
    rotation = RowHadamard(plan=hadamard_plan(256, block=64), signs=random_signs(256, seed=1, stream="x"))
    for form in LARGEST:
        made = quantize_rows(x, form, hadamard=rotation, group_size=64)
        with monkeypatch.context() as context:
            context.setenv("QTOOL_BACKEND", "reference")
            plain = quantize_rows(x, form, hadamard=rotation, group_size=64)
        assert made.codes.dtype == plain.codes.dtype and made.codes.shape == plain.codes.shape
        assert float((_codes(made) != _codes(plain)).double().mean()) < 0.002


def test_no_rows() -> None:
    rows = quantize_rows(torch.zeros(0, 64), "int4_halves", group_size=32, row_sums=True)
    assert rows.codes.shape == (0, 64) and rows.scale.shape == (0, 2) and rows.row_sums is not None


def test_refusals() -> None:
    x = torch.zeros(2, 64)
    with pytest.raises(UsageError, match="int5"):
        quantize_rows(x, "int5")
    with pytest.raises(UsageError, match="power of two"):
        quantize_rows(x, group_size=48)
    with pytest.raises(UsageError, match="no integer sums"):
        quantize_rows(x, "fp8_e4m3", row_sums=True)
    with pytest.raises(UsageError, match="another shape"):
        quantize_rows(x, source=SiluTimes(up=torch.zeros(2, 32)))
    with pytest.raises(UsageError, match="another width"):
        quantize_rows(x, hadamard=RowHadamard(plan=hadamard_plan(128)))
