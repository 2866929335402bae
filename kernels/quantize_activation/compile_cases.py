"""The row kernel's shipped configurations, for Llama-3-8B's widths and their like."""

from __future__ import annotations

from typing import Any

from qtool.kernels.compile_check.case import NVIDIA, Case, Expect, Work
from qtool.kernels.quantize_activation.launch import warps_for
from qtool.kernels.quantize_activation.row_format import ROW_FORMATS
from qtool.kernels.quantize_activation.triton_kernel import quantize_rows_kernel

CODES = {"int8": "*i8:16", "int4": "*i8:16", "int4_halves": "*u8:16", "fp8_e4m3": "*fp8e4nv:16"}
# E4M3 is a type of compute capability 8.9 and above.
WITH_E4M3 = ("sm_89", "sm_90")
# An eight-bit shift of a code would be a conversion by hand: codes come out of the low byte of a sum.
NO_MATRIX = Expect(lacks=("mma.f16", "wgmma.f16"), max_convert_layout=2, min_blocks=1)
MATRIX = {
    "sm_80": Expect(has=("mma.f16", "ldmatrix")),
    "sm_89": Expect(has=("mma.f16", "ldmatrix")),
    "sm_90": Expect(has=("wgmma.f16",)),
    "gfx942": Expect(has=("mfma.f16",)),
}
# mma.sync holds a whole operand in registers: a left factor of 64 then leaves none to spare, and Triton 3.6.0
# puts values aside; so does one value of the largest tile in blocks, at 128 registers a thread.
LARGEST = {
    "whole": dict.fromkeys(("sm_80", "sm_89"), Expect(has=("mma.f16", "ldmatrix"), max_spill=128)),
    "blocks": dict.fromkeys(("sm_80", "sm_89"), Expect(has=("mma.f16", "ldmatrix"), max_spill=2)),
}
SIGNATURE = {
    "x": "*bf16:16",
    "up": "*bf16:16",
    "gain": "*bf16:16",
    "residual": "*bf16:16",
    "signs": "*fp32:16",
    "left": "*bf16:16",
    "right": "*bf16:16",
    "scales": "*fp32:16",
    "sums": "*i32:16",
    "kept": "*bf16:16",
    "x_stride": "i32:16",
    "up_stride": "i32:16",
    "residual_stride": "i32:16",
    "columns": "i32:16",
    "code_columns": "i32:16",
    "groups": "i32",
    "epsilon": "fp32",
    "clip": "fp32",
    "shrink": "fp32",
}


def _case(name: str, rows: int, width: int, form: str = "int8", **switches: Any) -> Case:
    chosen = ROW_FORMATS[form]
    hadamard = switches.get("HADAMARD", "none")
    source = switches.get("SOURCE", "plain")
    read = rows * width * ({"plain": 2, "norm": 6, "silu": 4}[source] + (1 if not chosen.halves else 0))
    nvidia = WITH_E4M3 if form == "fp8_e4m3" else NVIDIA
    return Case(
        name=name,
        kernel=quantize_rows_kernel,
        signature={**SIGNATURE, "codes": CODES[form]},
        constexprs={
            "ROWS": rows,
            "WIDTH": width,
            "SOURCE": "plain",
            "GAIN": source == "norm",
            "RESIDUAL": source == "norm",
            "HADAMARD": "none",
            "SIGNED": hadamard != "none",
            "TERMS": 1 if source == "plain" else 3,
            "GROUP": 0,
            "LARGEST": chosen.largest,
            "INTEGER": chosen.integer,
            "HALVES": chosen.halves,
            "SUMS": False,
            "KEPT": False,
            **switches,
        },
        num_warps=warps_for(rows * width),
        num_stages=1,
        options={"enable_fp_fusion": False},
        targets=nvidia if form == "fp8_e4m3" else (*nvidia, "gfx942"),
        expect=dict.fromkeys((*NVIDIA, "gfx942"), NO_MATRIX) if hadamard == "none" else MATRIX | LARGEST[hadamard],
        work=Work(read=read),
    )


CASES = [
    _case("4096 int8", 32, 128),
    _case("4096 int4 halves sums", 32, 128, "int4_halves", SUMS=True),
    _case("4096 int4 halves g128", 32, 128, "int4_halves", GROUP=128),
    _case("4096 fp8", 32, 128, "fp8_e4m3"),
    _case("4096 fp8 g128", 32, 128, "fp8_e4m3", GROUP=128),
    _case("norm 4096 int8", 32, 128, SOURCE="norm"),
    _case("norm hadamard64 4096 int8", 64, 64, SOURCE="norm", HADAMARD="blocks"),
    _case("hadamard64 4096 halves", 64, 64, "int4_halves", HADAMARD="blocks", GROUP=128),
    _case("silu 14336 int8", 128, 128, SOURCE="silu"),
    _case("silu hadamard 4096 int8", 64, 64, SOURCE="silu", HADAMARD="whole"),
    _case("silu hadamard64 14336 int8", 256, 64, SOURCE="silu", HADAMARD="blocks"),
]
