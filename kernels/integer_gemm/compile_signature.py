"""Compile cases of an integer product in its configured tilings, with sizes and strides as real models have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtool.kernels.compile_check import Case, Expect, Work
from qtool.kernels.integer_gemm.tilings import K_TILE, row_for

SPLIT = 4  # any number above 1 compiles the same shared end
SIZES = {"M": "i32", "N": "i32:16", "K": "i32:16"}
EXPECT = {
    "sm_80": Expect(has=("mma.s8", "cp.async")),
    "sm_89": Expect(has=("mma.s8", "cp.async")),
    # Only other resident blocks overlap with an int8 product (Triton waits for each), so there must be a second one.
    "sm_90": Expect(has=("wgmma.s8", "cp.async"), lacks=("mma.s8",), min_blocks=2),
    "gfx942": Expect(has=("mfma.i8",)),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One combination of operands.

    Attributes:
        name: of it, unique in the kernel's folder.
        form: of `Operands`, which picks the tilings.
        pointers: argument name to pointer type; None for an operand that is not there.
        constexprs: beside those of the tiling.
        batches: numbers of tokens whose tilings are compiled.
        targets: what to compile for.
        sm_90: what Hopper's code must look like, where it differs from `EXPECT`.
    """

    name: str
    form: str
    pointers: Mapping[str, str | None]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    batches: Sequence[int] = (16, 128)
    targets: Sequence[str] = ("sm_80", "sm_89", "sm_90", "gfx942")
    sm_90: Expect = EXPECT["sm_90"]


def gemm_cases(op: str, kernel: Any, strides: Mapping[str, str], variant: Variant, *, weight_bits: int) -> list[Case]:
    """A case for every batch and every set of launch options that targets share."""
    cases = []
    for m in variant.batches:
        rows: dict[tuple[int, ...], list[str]] = {}
        for target in variant.targets:
            row = row_for(op, target, variant.form, (m, 4096, 4096))
            rows.setdefault((row["block_m"], row["block_n"], row["num_warps"], row["num_stages"]), []).append(target)
        for (block_m, block_n, warps, stages), targets in rows.items():
            blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": SPLIT, "EVEN_K": True}
            absent = {name: None for name, kind in variant.pointers.items() if kind is None}
            present = {name: kind for name, kind in variant.pointers.items() if kind is not None}
            cases.append(
                Case(
                    name=f"{variant.name} m{m} s{stages}",
                    kernel=kernel,
                    signature={**present, **SIZES, **strides},
                    constexprs={**absent, **variant.constexprs, **blocks},
                    num_warps=warps,
                    num_stages=stages,
                    options={"enable_fp_fusion": variant.form == "float"},
                    targets=targets,
                    expect={target: variant.sm_90 if target == "sm_90" else EXPECT[target] for target in targets},
                    work=Work(
                        read=block_n * K_TILE * weight_bits // 8, products=block_n * block_m * K_TILE, bits=8
                    ),
                )
            )
    return cases
