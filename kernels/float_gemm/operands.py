"""The checks of operands that the float products share."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import UsageError

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_matrix(name: str, matrix: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what is not a matrix [rows, K] of one of the types with its columns side by side.

    Args:
        name: operation and argument, for the refusal.

    Raises:
        UsageError: when it is not.
    """
    if matrix.dtype not in dtypes or matrix.dim() != 2 or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
        found = f"{matrix.dtype} {tuple(matrix.shape)} with strides {matrix.stride()}"
        raise UsageError(name, found, f"give a {_names(dtypes)} matrix contiguous along K")


def check_product(op: str, x: Tensor, n: int, k: int, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """Refuse a product of x [M, K] and weights [n, k], plus bias [n], that does not fit together.

    Raises:
        UsageError: when the columns, the bias or the output's type do not fit.
    """
    if x.shape[1] != k or not k:
        raise UsageError(op, f"activations have {x.shape[1]} columns and weights {k}")
    if bias is not None and bias.shape != (n,):
        raise UsageError(f"{op}: bias", f"shape {tuple(bias.shape)}, {n} rows of weights")
    if out_dtype not in OUT_DTYPES:
        raise UsageError(f"{op}: out_dtype", f"{out_dtype}", f"give {_names(OUT_DTYPES)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
