"""QUAD's input in one kernel: the side, what it leaves of the input, rotated in blocks, and that quantized.

    side = round16(x P),   main = ((x − side Pᵀ) ∘ signs) M,   codes and scale of main

What is taken off is the *stored* side, the one that the side product will add. The main weight W (I − P Pᵀ) R does not
see directions of P, so that this costs no accuracy, and one 16-bit product takes it off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.hadamard import apply
from qtool.kernels.quantize_activation import QuantizedRows, RowHadamard, quantize_rows
from qtool.kernels.quantize_activation.row_format import ROW_FORMATS
from qtool.kernels.side_gemm.reference import rounded_side, side_columns

OP = "side_gemm"
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
LARGEST_RANK = 128
LARGEST_BLOCK = 128  # of the rotation and of a group: one tile of columns


@dataclass(frozen=True, kw_only=True)
class ProjectedRows:
    """Attributes:
    side: [..., r] in the asked dtype.
    main: the codes of what the side leaves.
    """

    side: Tensor
    main: QuantizedRows


def project_rows(
    x: Tensor,
    directions: Tensor,
    form: str = "int4",
    *,
    hadamard: RowHadamard | None = None,
    side_dtype: torch.dtype | None = None,
    group_size: int | None = None,
    clip: float = 1.0,
    row_sums: bool = False,
) -> ProjectedRows:
    """The two parts of QUAD's input.

    The kernel's side may differ from the reference's by one rounding, as its sums run in another order. Given the side,
    codes are equal wherever the reference's quotient lies further from a rounding boundary than 10⁻⁶ of the largest
    code times max|x| / max|main|: what cancels leaves rounding of the size of what was there. Rows do not see each
    other, but the number of rows chooses how K is sliced and so may tip those last bits.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        directions: P [K, r] float16 or bfloat16, r = 1…128.
        form, group_size, clip, row_sums: as in `quantize_rows`.
        hadamard: in blocks of 16 to 128 for one kernel; any other runs in torch, before a kernel that quantizes.
        side_dtype: of the stored side: float16, bfloat16 or float32; None takes that of the directions.

    Raises:
        UsageError: for shapes, dtypes or a format that do not fit.
    """
    dtype = directions.dtype if side_dtype is None else side_dtype
    _check(x, directions, form, hadamard, dtype)
    rows = x.reshape(-1, x.shape[-1])
    fused = _one_kernel(form, hadamard, group_size, row_sums)
    if fused and backend_for(x.device, OP, e4m3=ROW_FORMATS[form].e4m3) == "triton":
        from qtool.kernels.side_gemm.launch import launch_quad

        made = ROW_FORMATS[form]
        side, codes, scale, sums = launch_quad(
            rows, directions, made, hadamard, dtype, group_size or 0, clip, row_sums
        )
        main = QuantizedRows(codes=codes, scale=scale, row_sums=sums, columns=x.shape[-1], values=None)
    else:
        side = rounded_side(side_columns(rows.to(torch.float32), directions.to(torch.float32)), dtype)
        rest = rows.to(torch.float32) - side.to(torch.float32) @ directions.to(torch.float32).T
        values = rest if hadamard is None else apply(rest, hadamard.plan, hadamard.signs)
        main = quantize_rows(values, form, group_size=group_size, clip=clip, row_sums=row_sums)
    return ProjectedRows(side=side.reshape(*x.shape[:-1], directions.shape[1]), main=_as(x, main, group_size))


def _check(x: Tensor, directions: Tensor, form: str, hadamard: RowHadamard | None, dtype: torch.dtype) -> None:
    width = x.shape[-1] if x.dim() else 0
    faults = [
        (not x.is_floating_point(), f"x is {x.dtype}, not floating point"),
        (directions.dim() != 2 or len(directions) != width, f"P {tuple(directions.shape)} for {width} columns"),
        (directions.dtype not in SIXTEEN_BITS, f"directions are {directions.dtype}, not 16-bit floats"),
        (directions.dim() == 2 and not 1 <= directions.shape[1] <= LARGEST_RANK, "the rank is not 1 to 128"),
        (dtype not in (*SIXTEEN_BITS, torch.float32), f"a side is not stored as {dtype}"),
        (form not in ROW_FORMATS, f"format {form} is none of {', '.join(ROW_FORMATS)}"),
        (hadamard is not None and hadamard.plan.width != width, "the rotation is of another width"),
    ]
    for wrong, why in faults:
        if wrong:
            raise UsageError("project_rows", why, "see its docstring")


def _one_kernel(form: str, hadamard: RowHadamard | None, group_size: int | None, row_sums: bool) -> bool:
    """Whether the fused kernel takes it; `quantize_rows` says what is wrong with what no kernel takes."""
    plan = None if hadamard is None else hadamard.plan
    blocks = plan is None or (plan.order == 1 and plan.block <= LARGEST_BLOCK)
    groups = group_size is None or group_size in (16, 32, 64, LARGEST_BLOCK)
    return blocks and groups and (ROW_FORMATS[form].integer or not row_sums)


def _as(x: Tensor, main: QuantizedRows, group_size: int | None) -> QuantizedRows:
    lead = x.shape[:-1]
    tail = lead if group_size is None else (*lead, main.scale.shape[-1])
    return QuantizedRows(
        codes=main.codes.reshape(*lead, main.codes.shape[-1]),
        scale=main.scale.reshape(tail),
        row_sums=None if main.row_sums is None else main.row_sums.reshape(tail),
        columns=main.columns,
        values=None,
    )
