"""The scales of a weight's groups as they are stored: in exactly the bits that they cost.

    float   scale            F16 or F32 [N, G]           F16 where it holds every scale exactly
    e8m0    scale_exponent   U8 [N, G]                   e + 127 of 2ᵉ
    shift   scale_shift      U8 [N, ceil(G / 2)]         n = 0…14 of factor × 2⁻ⁿ, two a byte, low nibble first
            scale_factor     F32 [N]
    integer scale_integer    U8 [N, ceil(G / 2)]         n − 1 of factor × n, n = 1…16, two a byte, low nibble first
            scale_factor     BF16 [N]
    e4m3    scale_e4m3       F8_E4M3 [N, G]              s of factor × s
            scale_factor     F32 []
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.pack import pack_int4, unpack_int4
from qtool.kernels.small_floats import LARGEST_SHIFT, e8m0_bytes, e8m0_scale, power_of_two, shift_of

Stored = Mapping[str, Tensor]
Shape = tuple[int, ...]
FACTOR = "scale_factor"


@dataclass(frozen=True, kw_only=True)
class StoredScale:
    """One form of scales.

    Attributes:
        shapes: (N, G) to the stored tensors' names and shapes.
        write: (scale [N, G], factor [N, 1] or None), float32, to the stored tensors.
        read: the inverse, exactly; scales that are no such scales become NaN.
    """

    shapes: Callable[[int, int], dict[str, Shape]]
    write: Callable[[Tensor, Tensor | None], dict[str, Tensor]]
    read: Callable[[Stored, int], tuple[Tensor, Tensor | None]]


def _write_float(scale: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
    half = scale.to(torch.float16)
    return {"scale": half if torch.equal(half.to(torch.float32), scale) else scale}


def _write_shift(scale: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
    assert factor is not None
    return {"scale_shift": pack_int4(shift_of(scale, factor)), FACTOR: factor[:, 0]}


def _read_shift(stored: Stored, groups: int) -> tuple[Tensor, Tensor]:
    factor = stored[FACTOR].unsqueeze(1)
    shift = unpack_int4(stored["scale_shift"], columns=groups)
    scale = factor * power_of_two(-shift.to(torch.int32))
    return torch.where(shift > LARGEST_SHIFT, torch.nan, scale), factor


def _write_integer(scale: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
    assert factor is not None
    integers = torch.round(scale / factor)
    half = factor[:, 0].to(torch.bfloat16)
    return {"scale_integer": pack_int4((integers - 1).to(torch.uint8)), FACTOR: half}


def _read_integer(stored: Stored, groups: int) -> tuple[Tensor, Tensor]:
    factor = stored[FACTOR].to(torch.float32).unsqueeze(1)
    integers = unpack_int4(stored["scale_integer"], columns=groups).to(torch.float32) + 1
    return factor * integers, factor


def _write_e4m3(scale: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
    assert factor is not None and bool((factor == factor[0]).all())
    return {"scale_e4m3": (scale / factor).to(torch.float8_e4m3fn), FACTOR: factor[0, 0]}


def _read_e4m3(stored: Stored, groups: int) -> tuple[Tensor, Tensor]:
    numbers = stored["scale_e4m3"].to(torch.float32)
    factor = stored[FACTOR].expand(len(numbers), 1)
    return factor * numbers, factor


STORED_SCALES: Mapping[str, StoredScale] = {
    "float": StoredScale(
        shapes=lambda n, g: {"scale": (n, g)},
        write=_write_float,
        read=lambda stored, _: (stored["scale"].to(torch.float32), None),
    ),
    "e8m0": StoredScale(
        shapes=lambda n, g: {"scale_exponent": (n, g)},
        write=lambda scale, _: {"scale_exponent": e8m0_bytes(scale)},
        read=lambda stored, _: (e8m0_scale(stored["scale_exponent"]), None),
    ),
    "shift": StoredScale(
        shapes=lambda n, g: {"scale_shift": (n, -(-g // 2)), FACTOR: (n,)}, write=_write_shift, read=_read_shift
    ),
    "integer": StoredScale(
        shapes=lambda n, g: {"scale_integer": (n, -(-g // 2)), FACTOR: (n,)}, write=_write_integer, read=_read_integer
    ),
    "e4m3": StoredScale(shapes=lambda n, g: {"scale_e4m3": (n, g), FACTOR: ()}, write=_write_e4m3, read=_read_e4m3),
}
