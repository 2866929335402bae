"""Rows to codes in one pass: a norm or an activation function, a rotation and the quantization, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UsageError, nearest
from qtool.kernels.dispatch import backend_for
from qtool.kernels.quantize_activation import reference
from qtool.kernels.quantize_activation.row_format import ROW_FORMATS, RowFormat
from qtool.kernels.quantize_activation.sources import RmsNorm, RowHadamard, SiluTimes, Source, factors_of

OP = "quantize_activation"
LARGEST_ROW = 65536  # columns that one program holds


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Rows as a low-bit GEMM reads them; G = ⌈K / group⌉.

    Attributes:
        codes: int8 or float8_e4m3fn [..., K]; uint8 [..., ⌈K / 128⌉ × 64] for halves.
        scale: what one code is worth, float32 [...], or [..., G] with groups.
        row_sums: the codes' sums, int32 of scale's shape, or None.
        columns: K.
        values: the values that were quantized [..., K] in the asked dtype, or None.
    """

    codes: Tensor
    scale: Tensor
    row_sums: Tensor | None
    columns: int
    values: Tensor | None


def quantize_rows(
    x: Tensor,
    form: str = "int8",
    *,
    source: Source = None,
    hadamard: RowHadamard | None = None,
    group_size: int | None = None,
    clip: float = 1.0,
    row_sums: bool = False,
    keep: torch.dtype | None = None,
) -> QuantizedRows:
    """Dynamic symmetric codes of each row, or of each row's groups; no row sees another.

    Without a source and a rotation the kernel's codes and scales are the reference's bit for bit. Behind them its sums
    run in another order: codes are equal wherever the reference's quotient lies further than 10⁻⁶ of the largest code
    from a rounding boundary, and neighbours there.
    A scale that is not finite makes integer codes 0: scale × code is NaN all the same. E4M3 codes carry the NaN.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        form: "int8" (codes ±127), "int4" (±7, in int8), "int4_halves" (the same, two a byte) or "fp8_e4m3".
        source: RMSNorm (with residual) of x, silu(x) × up, or None for x itself; computed in float32.
        hadamard: a rotation of the values.
        group_size: columns per scale: 16, 32, 64, 128, … or None for the whole row. The last may be short.
        clip: a range is this share of its largest magnitude; larger values take the outermost code.
        row_sums: also the integer sums of the codes.
        keep: also the values before quantization, in this dtype.

    Raises:
        UsageError: for an unknown format, shapes that do not fit, or sums of floats.
    """
    chosen = ROW_FORMATS.get(form)
    if chosen is None:
        raise UsageError(f"format {form}", "is not one of a row", nearest(form, ROW_FORMATS))
    _check_groups(form, chosen, group_size, clip, row_sums)
    return _shaped(x, group_size, *_run(x, chosen, source, hadamard, group_size, clip, row_sums, keep))


def prepare_rows(
    x: Tensor, keep: torch.dtype, *, source: Source = None, hadamard: RowHadamard | None = None
) -> Tensor:
    """The values that `quantize_rows` would quantize, [..., K] in the dtype `keep`; arguments and errors as there."""
    kept = _run(x, None, source, hadamard, None, 1.0, False, keep)[-1]
    assert kept is not None
    return kept.reshape(x.shape)


def _run(
    x: Tensor,
    form: RowFormat | None,
    source: Source,
    hadamard: RowHadamard | None,
    group_size: int | None,
    clip: float,
    row_sums: bool,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scale, sums and values of rows [M, ...], where M are all of x's rows."""
    _check_operands(x, source, hadamard)
    rows = x.reshape(-1, x.shape[-1])
    flat = _flat_source(source, rows.shape)
    e4m3 = form is not None and form.e4m3
    backend = backend_for(x.device, OP, unsupported=_too_wide(x.shape[-1]), e4m3=e4m3)
    if backend == "triton" and hadamard is not None and factors_of(hadamard.plan) is None:
        # A rotation with larger factors runs in torch; the quantization after it is still one kernel.
        rows, flat, hadamard = reference.prepared(rows, flat, hadamard), None, None
    if backend == "triton":
        from qtool.kernels.quantize_activation.launch import launch_rows

        parts = launch_rows(rows, form, flat, hadamard, group_size or 0, clip, row_sums, keep)
    else:
        values = reference.prepared(rows, flat, hadamard)
        kept = None if keep is None else values.to(keep)
        made = (values, values, None) if form is None else reference.quantized(
            values, form, group_size=group_size, clip=clip, row_sums=row_sums
        )
        parts = (*made, kept)
    if isinstance(source, RmsNorm) and isinstance(flat, RmsNorm):
        _write_back(source, flat)
    return parts


def _check_operands(x: Tensor, source: Source, hadamard: RowHadamard | None) -> None:
    beside = source.up if isinstance(source, SiluTimes) else source.residual if isinstance(source, RmsNorm) else None
    faults = [
        (x.dim() < 1 or x.shape[-1] < 1, f"x {tuple(x.shape)} has no columns"),
        (not x.is_floating_point(), f"x is {x.dtype}, not floating point"),
        (beside is not None and beside.shape != x.shape, "up or residual has another shape than x"),
        (hadamard is not None and hadamard.plan.width != x.shape[-1], "the rotation is of another width"),
    ]
    _refuse(faults)


def _check_groups(form: str, chosen: RowFormat, group_size: int | None, clip: float, row_sums: bool) -> None:
    faults = [
        (group_size is not None and not _is_group(group_size), f"a group of {group_size} is no power of two ≥ 16"),
        (not 0 < clip <= 1, f"a clip of {clip} is not a share of the range"),
        (row_sums and not chosen.integer, f"{form} codes have no integer sums"),
    ]
    _refuse(faults)


def _refuse(faults: list[tuple[bool, str]]) -> None:
    for wrong, why in faults:
        if wrong:
            raise UsageError("quantize_rows", why, "see its docstring")


def _is_group(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def _too_wide(columns: int) -> str:
    return f"rows of {columns} columns" if columns > LARGEST_ROW else ""


def _flat_source(source: Source, shape: torch.Size) -> Source:
    if isinstance(source, SiluTimes):
        return SiluTimes(up=source.up.reshape(shape))
    if isinstance(source, RmsNorm) and source.residual is not None:
        return RmsNorm(gain=source.gain, epsilon=source.epsilon, residual=source.residual.reshape(shape))
    return source


def _write_back(source: RmsNorm, flat: RmsNorm) -> None:
    """Copy the sum back where the flat residual was a copy."""
    if source.residual is None or flat.residual is None or source.residual.data_ptr() == flat.residual.data_ptr():
        return
    source.residual.copy_(flat.residual.reshape(source.residual.shape))


def _shaped(
    x: Tensor, group_size: int | None, codes: Tensor, scale: Tensor, sums: Tensor | None, kept: Tensor | None
) -> QuantizedRows:
    lead = x.shape[:-1]
    tail = lead if group_size is None else (*lead, scale.shape[-1])
    return QuantizedRows(
        codes=codes.reshape(*lead, codes.shape[-1]),
        scale=scale.reshape(tail),
        row_sums=None if sums is None else sums.reshape(tail),
        columns=x.shape[-1],
        values=None if kept is None else kept.reshape(x.shape),
    )

