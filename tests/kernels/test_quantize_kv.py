"""Codes of a low-bit cache: worked examples, error bounds, edges, packing, and no dependence on other tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.kernels.quantize_kv import KVCodes, KVFormat, dequantize_kv, quantize_kv_fp8, quantize_kv_int
from qtool.kernels.quantize_kv.cache_reference import from_bytes, quantize_heads, to_bytes

KINDS = [("int", 4, True), ("int", 4, False), ("int", 8, True), ("int", 8, False), ("fp8", 8, True)]


def quantize(x: torch.Tensor, kind: str, bits: int, symmetric: bool) -> KVCodes:
    return quantize_kv_fp8(x) if kind == "fp8" else quantize_kv_int(x, bits=bits, symmetric=symmetric)


def test_symmetric_codes_worked_by_hand() -> None:
    # scale = 7 / 7 = 1: halves go to even, −8 never occurs
    stored = quantize_kv_int(torch.tensor([7.0, -7.0, 0.5, 1.5, -2.5, 0.0]), bits=4, symmetric=True)
    assert stored.codes.tolist() == [15, 1, 8, 10, 6, 8]
    assert stored.scale.tolist() == [1.0] and stored.scale.dtype == torch.float16 and stored.offset is None
    assert dequantize_kv(stored).tolist() == [7, -7, 0, 2, -2, 0]
    wide = quantize_kv_int(torch.tensor([-254.0, 1.0, 3.0]), bits=8, symmetric=True)
    assert wide.codes.tolist() == [1, 128, 130] and dequantize_kv(wide).tolist() == [-254, 0, 4]


def test_asymmetric_codes_worked_by_hand() -> None:
    # range 10 … 25 in 15 steps of 1; zero is not in the range and need not be
    stored = quantize_kv_int(torch.tensor([10.0, 25.0, 10.5, 11.5, 20.25]), bits=4, symmetric=False)
    assert stored.codes.tolist() == [0, 15, 0, 2, 10]
    assert stored.offset is not None and stored.offset.tolist() == [10.0] and stored.scale.tolist() == [1.0]
    assert dequantize_kv(stored).tolist() == [10, 25, 10, 12, 20]


def test_codes_are_found_with_the_scale_as_it_is_stored() -> None:
    # 1000.3 / 127 = 7.87638 is stored as 7.875: 500 is 63.49 steps of that, and 63.48 of the exact one
    x = torch.tensor([1000.3, 500.03125])
    stored = quantize_kv_int(x, bits=8, symmetric=True)
    assert stored.scale.item() == 7.875
    assert stored.codes.tolist() == [128 + 127, 128 + round(500.03125 / 7.875)]


def test_fp8_codes_are_the_cast_of_the_scaled_value() -> None:
    x = torch.tensor([448.0, 17.0, -0.3, 2.0**-9])
    stored = quantize_kv_fp8(x)
    assert stored.scale.item() == 1.0
    assert dequantize_kv(stored).tolist() == [448.0, 16.0, -0.3125, 2.0**-9]


@pytest.mark.parametrize(("kind", "bits", "symmetric"), KINDS)
@given(
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0, 3e4]), shift=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 99)
)
def test_every_error_is_within_half_a_step(
    kind: str, bits: int, symmetric: bool, size: float, shift: float, seed: int
) -> None:
    x = (torch.randn(3, 2, 5, 32, generator=torch.Generator().manual_seed(seed)) + shift) * size
    x = x.clamp(-6e4, 6e4)
    stored = quantize(x, kind, bits, symmetric)
    error = (dequantize_kv(stored).double() - x.double()).abs()
    step = stored.scale.double()
    if kind == "fp8":
        bound = torch.maximum(x.double().abs() / 16, step * 2**-10) + 448 * 2.0**-25
    else:
        # half a step, and what the outermost codes lack where scale and offset were rounded to float16
        largest = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        offset = 0 if stored.offset is None else stored.offset.double().abs()
        bound = step / 2 + largest * torch.maximum(step * 2**-11, torch.tensor(2.0**-25)) + offset * 2**-11 + 2**-25
    assert bool((error <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize(("kind", "bits", "symmetric"), KINDS)
def test_zeros_constants_and_ranges_too_small_to_store(kind: str, bits: int, symmetric: bool) -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-12), torch.full((16,), 3.0)])
    out = dequantize_kv(quantize(x, kind, bits, symmetric))
    assert torch.equal(out[:2], torch.zeros(2, 16))
    torch.testing.assert_close(out[2], x[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "bits", "symmetric"), KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(kind: str, bits: int, symmetric: bool, bad: float) -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    x[0, 3] = bad
    out = dequantize_kv(quantize(x, kind, bits, symmetric))
    assert bool(out[0].isnan().any()) and bool(out[1].isfinite().all())


@pytest.mark.parametrize(("kind", "bits", "symmetric"), KINDS)
def test_a_token_and_head_is_stored_alike_whatever_is_beside_it(kind: str, bits: int, symmetric: bool) -> None:
    x = torch.randn(3, 2, 7, 24, generator=torch.Generator().manual_seed(4)) * 5
    x[1, 0, 2] *= 1e4
    whole = quantize(x, kind, bits, symmetric)
    alone = quantize(x[2, 1, 5:6], kind, bits, symmetric)
    assert torch.equal(whole.codes[2, 1, 5:6].float(), alone.codes.float())
    assert torch.equal(whole.scale[2, 1, 5:6], alone.scale)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("fmt", [KVFormat(format="int4", symmetric=False), KVFormat(format="int8", symmetric=False)])
def test_stored_bytes_come_back(fmt: KVFormat, head_dim: int) -> None:
    x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(5))
    codes = quantize_heads(x, fmt).codes
    stored = to_bytes(codes, fmt)
    assert stored.dtype == torch.uint8 and stored.shape == (2, 3, 5, head_dim * fmt.bits // 8)
    assert torch.equal(from_bytes(stored, fmt), codes.flatten(-2))


def test_a_byte_holds_a_channel_of_each_half_of_the_head() -> None:
    codes = torch.tensor([[3, 12, 8, 7]], dtype=torch.uint8)
    assert to_bytes(codes, KVFormat(format="int4")).tolist() == [0x0B, 0xF4]  # −5 and 0, 4 and −1
    assert to_bytes(codes, KVFormat(format="int8")).tolist() == [0x83, 0x8C, 0x88, 0x87]
