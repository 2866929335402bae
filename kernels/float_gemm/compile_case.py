"""A compile case of a float product: one row of a table of tiles with one form of scales, and whole tiles of K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.float_gemm.tilings import TILE_K, tiling_of


def product_case(
    row: Mapping[str, Any],
    form: str,
    *,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    expect: Mapping[str, Expect],
    weight_bits: int,
    bits: int = 8,
    more_targets: Sequence[str] = (),
) -> Case:
    """The case of a row, for the row's own target.

    Args:
        row: of a `configs.json`, see `choose_tiling`.
        form: the rest of the case's name, after target and tile.
        kernel, signature, expect: as in `Case`.
        constexprs: beside those of the tile.
        weight_bits: of a stored weight.
        bits: of the operands of the tensor cores.
        more_targets: others that the row's code is compiled for.
    """
    tiling, target = tiling_of(row), f"sm_{row['capability']}"
    weights = tiling.tile_n * TILE_K
    return Case(
        name=f"{target} {tiling.tile_m}x{tiling.tile_n} {form}",
        kernel=kernel,
        signature=signature,
        constexprs={
            **constexprs,
            "BIAS": True,
            "WHOLE_K": True,
            # Few tokens make few tiles: their K is cut.
            "PARTS": 2 if tiling.tile_m <= 32 else 1,
            "BM": tiling.tile_m,
            "BN": tiling.tile_n,
            "BK": TILE_K,
        },
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        targets=(target, *more_targets),
        expect=expect,
        work=Work(read=weights * weight_bits // 8, products=tiling.tile_m * weights, bits=bits),
    )
