"""Writing to a cache, one token a sequence and many."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.kernels.compile_check.case import NVIDIA, Case, Expect, Work
from qtool.kernels.quantize_kv.triton_kernel import TOKENS, warps_for, write_cache_kernel

POINTERS = {
    "key": "bf16",
    "value": "bf16",
    "query": "bf16",
    "rotated_query": "bf16",
    "starts": "i32",
    "counts": "i32",
    "key_codes": "u8",
    "key_scale": "fp16",
    "key_offset": "fp16",
    "value_codes": "u8",
    "value_scale": "fp16",
    "value_offset": "fp16",
    "exact_keys": "bf16",
    "exact_values": "bf16",
}
STRIDES = [f"{x}_{axis}" for x in ("key", "value", "query") for axis in "bht"]
SIGNATURE = {
    **{name: f"*{kind}:16" for name, kind in POINTERS.items()},
    **dict.fromkeys(STRIDES, "i32:16"),
    **dict.fromkeys(("rows", "tokens", "sink", "recent"), "i32"),
    "capacity": "i32:16",
}
BYTES = {"int8": 1.0, "int4": 0.5, "fp8_e4m3": 1.0}


def _case(
    name: str, keys: str, values: str, tokens: int, *, head_dim: int = 128, group: int = 0, rotate: bool = False,
    targets: Sequence[str] = NVIDIA,
) -> Case:  # fmt: skip
    return Case(
        name=name,
        kernel=write_cache_kernel,
        signature=SIGNATURE,
        constexprs={
            "SHARED": 4,
            "C": head_dim,
            "KEY_FORMAT": keys,
            "KEY_SYMMETRIC": keys != "int4",
            "KEY_GROUP": group or head_dim,
            "VALUE_FORMAT": values,
            "VALUE_SYMMETRIC": values != "int4",
            "VALUE_GROUP": group or head_dim,
            "ROTATE": rotate,
            "R": tokens,
        },
        num_warps=warps_for(tokens),
        num_stages=1,
        options={"enable_fp_fusion": False},
        targets=targets,
        expect=dict.fromkeys(targets, Expect(lacks=("mma.f16", "wgmma.f16"), min_blocks=2)),
        work=Work(read=int(tokens * head_dim * (2 + BYTES[keys]))),
    )


CASES = [
    _case("128 int8 one token", "int8", "int8", 1),
    _case("128 int8 int4 many", "int8", "int4", TOKENS, targets=("sm_80", "sm_90")),
    _case("128 int4 rotated one", "int4", "int4", 1, rotate=True, targets=("sm_90",)),
    _case("128 int4 rotated many", "int4", "int4", TOKENS, rotate=True, targets=("sm_90",)),
    _case("128 fp8 many", "fp8_e4m3", "fp8_e4m3", TOKENS, targets=("sm_89", "sm_90")),
    _case("96 int4 g16 many", "int4", "int4", TOKENS, head_dim=96, group=16, targets=("sm_90",)),
]
