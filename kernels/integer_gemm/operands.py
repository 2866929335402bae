"""One integer product, checked once at the border. M tokens, N out features, K columns, G groups of K."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.kernels.pack import HalvesInt4

HALF = 64  # columns of one nibble of a K tile: the finest unit that scales may change at
MOST_COLUMNS = 131071  # sums of products up to 128 × 128 stay int32
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What a kernel or the reference multiplies; `checked` makes it.

    Attributes:
        x: int8 [M, K], or packed two's-complement halves uint8 [M, Kp / 2].
        w: int8 [N, K], or packed two's-complement halves uint8 [N, Kp / 2].
        columns: K.
        x_scale: float32 [M] for the end, or None.
        w_scale: float32 [N] for the end, or None.
        x_factors: float32 or int32 [M, G], one factor a token and `x_group_size` columns, or None.
        w_groups: uint8 [N, G] second-level integers 1…16, or floats; one a row and `w_group_size` columns, or None.
        zero_point: uint8 [N] or [N, G]; weights are code − zero point with code = w + 8. None: 8.
        x_sums: int32 [M], the sums of x, for zero points that are not taken off in the loop; else None.
        bias: [N] or None.
        x_group_size: columns of one of `x_factors`; 0 without.
        w_group_size: columns of one of `w_groups` or of a two-dimensional zero point; 0 without.
    """

    x: Tensor
    w: Tensor
    columns: int
    x_scale: Tensor | None
    w_scale: Tensor | None
    x_factors: Tensor | None
    w_groups: Tensor | None
    zero_point: Tensor | None
    x_sums: Tensor | None
    bias: Tensor | None
    x_group_size: int
    w_group_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.x.shape[0], self.w.shape[0], self.columns

    @property
    def integer_groups(self) -> bool:
        """Whether the groups' scales of the weights are second-level integers."""
        return self.w_groups is not None and self.w_groups.dtype == torch.uint8

    @property
    def float_sum(self) -> bool:
        """Whether segments are added in float32, because one of their factors is not an integer."""
        floats = [t for t in (self.w_groups, self.x_factors) if t is not None and t.dtype.is_floating_point]
        return bool(floats)

    @property
    def along_k(self) -> bool:
        """Whether a scale or a factor changes along K."""
        return self.x_factors is not None or self.w_groups is not None

    @property
    def form(self) -> str:
        """What a K loop has to do besides multiplying: "channel" (nothing), "integer" or "float" scaling."""
        return "float" if self.float_sum else "integer" if self.along_k or self.zero_in_loop else "channel"

    @property
    def zero_in_loop(self) -> bool:
        """Whether zero points are taken off each weight, because they, or a scale, change along K."""
        zero = self.zero_point
        return zero is not None and (zero.dim() == 2 or self.along_k)

    @property
    def unsupported(self) -> str:
        """Why the Triton kernels cannot multiply these; empty when they can."""
        if self.columns > MOST_COLUMNS:
            return f"{self.columns} columns; an int32 sum is safe to {MOST_COLUMNS}"
        for size in (self.x_group_size, self.w_group_size):
            if size % HALF:
                return f"groups of {size} columns; the kernels change scales at multiples of {HALF}"
        return ""


def checked(
    x: Tensor | HalvesInt4,
    x_scale: Tensor,
    w: Tensor | HalvesInt4,
    w_scale: Tensor,
    *,
    bias: Tensor | None,
    w_group_scale: Tensor | None = None,
    w_group_size: int = 0,
    zero_point: Tensor | None = None,
    x_sums: Tensor | None = None,
    tile_factors: Tensor | None = None,
    x_group_size: int = 0,
) -> Operands:
    """Operands from what a caller gives; see w4a8_gemm for the arguments.

    Raises:
        ValueError: when shapes, types or group sizes do not fit one another.
    """
    columns = w.columns if isinstance(w, HalvesInt4) else w.shape[1]
    x_codes, w_codes = _codes("x_codes", x, columns), _codes("weight", w, columns)
    rows, outs = x_codes.shape[0], w_codes.shape[0]
    x_groups = _count(columns, x_group_size) if x_group_size else 1
    w_groups = _count(columns, w_group_size) if w_group_size else 1

    grouped_x = x_group_size > 0 and tile_factors is None
    x_factors = _grouped("x_scale", x_scale, rows, x_groups, (torch.float32,)) if grouped_x else None
    if tile_factors is not None:
        if not x_group_size:
            raise ValueError("tile_factors want x_group_size, the columns of one factor")
        factors = tile_factors.reshape(1, -1) if tile_factors.dim() == 1 else tile_factors
        factors = factors.expand(rows, -1) if factors.shape[0] == 1 else factors
        x_factors = _grouped("tile_factors", factors, rows, x_groups, (torch.float32, torch.int32))

    grouped_w = w_scale.dim() == 2 and w_group_size > 0
    scales = _grouped("w_scale", w_scale, outs, w_groups, FLOATS) if grouped_w else None
    if w_group_scale is not None:
        if grouped_w or not w_group_size:
            raise ValueError("w_group_scale wants one w_scale a row and w_group_size, the columns of one group")
        scales = _grouped("w_group_scale", w_group_scale, outs, w_groups, (torch.uint8,))

    operands = Operands(
        x=x_codes,
        w=w_codes,
        columns=columns,
        x_scale=None if grouped_x else _per_row("x_scale", x_scale, rows),
        w_scale=None if grouped_w else _per_row("w_scale", w_scale, outs),
        x_factors=x_factors,
        w_groups=scales,
        zero_point=None if zero_point is None else _zero_point(zero_point, outs, w_groups),
        x_sums=None,
        bias=None if bias is None else _vector("bias", bias, outs, FLOATS).contiguous(),
        x_group_size=x_group_size,
        w_group_size=w_group_size,
    )
    if zero_point is None or operands.zero_in_loop:
        return operands
    if x_sums is None:
        x_sums = (x.values() if isinstance(x, HalvesInt4) else x).sum(dim=1, dtype=torch.int32)
    return replace(operands, x_sums=_sums(x_sums, rows))


def strides(tensor: Tensor | None, dimensions: int) -> list[int]:
    """A tensor's strides, followed by zeros up to `dimensions`; zeros alone for None."""
    found = [] if tensor is None else list(tensor.stride())
    return found + [0] * (dimensions - len(found))


def _count(columns: int, group_size: int) -> int:
    if group_size < 1:
        raise ValueError(f"a group of {group_size} columns")
    return -(-columns // group_size)


def _codes(name: str, codes: Tensor | HalvesInt4, columns: int) -> Tensor:
    if isinstance(codes, HalvesInt4):
        if codes.columns != columns or codes.encoding != "twos_complement":
            found = f"{codes.encoding} halves of {codes.columns} columns"
            raise ValueError(f"{name}: {found}; wants two's complement of {columns}")
        return codes.packed
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != columns:
        raise ValueError(f"{name} wants int8 codes [rows, {columns}], got {codes.dtype} {tuple(codes.shape)}")
    if codes.stride(1) != 1 and codes.numel():
        raise ValueError(f"{name}: the columns of a row must lie side by side, strides are {codes.stride()}")
    return codes


def _grouped(name: str, values: Tensor, rows: int, groups: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if values.shape != (rows, groups) or values.dtype not in dtypes:
        raise ValueError(f"{name} wants {_names(dtypes)} [{rows}, {groups}], got {values.dtype} {tuple(values.shape)}")
    return values


def _per_row(name: str, values: Tensor, rows: int) -> Tensor:
    """[rows], [rows, 1] or a single number as [rows]."""
    flat = values.reshape(-1)
    flat = flat.expand(rows) if flat.numel() == 1 else flat
    return _vector(name, flat, rows, (torch.float32,))


def _vector(name: str, values: Tensor, rows: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if values.shape != (rows,) or values.dtype not in dtypes:
        raise ValueError(f"{name} wants {_names(dtypes)} [{rows}], got {values.dtype} {tuple(values.shape)}")
    return values


def _zero_point(zero_point: Tensor, rows: int, groups: int) -> Tensor:
    if zero_point.dim() == 2 and zero_point.shape[1] == 1 and groups == 1:
        zero_point = zero_point[:, 0]
    shape = (rows,) if zero_point.dim() == 1 else (rows, groups)
    if zero_point.shape != shape or zero_point.dtype != torch.uint8:
        raise ValueError(f"zero_point wants uint8 {shape}, got {zero_point.dtype} {tuple(zero_point.shape)}")
    return zero_point.contiguous()


def _sums(x_sums: Tensor, rows: int) -> Tensor:
    return _vector("x_sums", x_sums, rows, (torch.int32,)).contiguous()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
