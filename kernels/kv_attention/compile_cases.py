"""Decode attention's shipped configurations, for the heads of current models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.kv_attention.tiling import tiling_of
from qtool.kernels.kv_attention.triton_kernel import decode_attention_kernel, exact_tokens

POINTERS = {
    "query": "bf16",
    "lengths": "i32",
    "key_codes": "i16",
    "key_scale": "fp16",
    "key_offset": "fp16",
    "value_codes": "i16",
    "value_scale": "fp16",
    "value_offset": "fp16",
    "exact_keys": "bf16",
    "exact_values": "bf16",
    "sink_logits": "bf16",
    "out": "bf16",
    "sums": "fp32",
    "arrivals": "i32",
}
SIGNATURE = {
    **{name: f"*{kind}:16" for name, kind in POINTERS.items()},
    "capacity": "i32:16",
    "sink": "i32",
    "recent": "i32",
    "window": "i32",
    "inner": "fp32",
    "outer": "fp32",
}
BYTES = {"int8": 1.0, "int4": 0.5, "fp8_e4m3": 1.0}
SHARED = 4
WGMMA = 64  # rows of keys from which Hopper's own instruction is used


def _case(
    name: str, targets: Sequence[str], head_dim: int, keys: str, values: str, *, exact: bool = False, **switches: Any
) -> Case:
    group = switches.pop("group", head_dim)
    tiling = tiling_of(
        min(int(target[3:]) for target in targets), head_dim, SHARED, groups=group < head_dim, sixteen_bits=True
    )
    # A prmt for every code would be a transposition byte by byte; there is to be none.
    expect = {
        target: Expect(
            has=("wgmma.f16" if target == "sm_90" and tiling.tokens >= WGMMA else "mma.f16", "ldmatrix", "cp.async"),
            at_most={"prmt": 8},
            min_blocks=2,
        )
        for target in targets
    }
    return Case(
        name=f"{name} t{tiling.tokens}",
        kernel=decode_attention_kernel,
        signature=SIGNATURE,
        constexprs={
            "SHARED": SHARED,
            "G": tiling.queries,
            "C": head_dim,
            "KEY_FORMAT": keys,
            "KEY_OFFSET": keys == "int4",
            "KEY_GROUP": group,
            "VALUE_FORMAT": values,
            "VALUE_OFFSET": values == "int4",
            "VALUE_GROUP": group,
            "EXACT": exact_tokens(head_dim) if exact else 0,
            "WINDOW": exact,
            "SOFTCAP": exact,
            "SINK_LOGITS": exact,
            "T": tiling.tokens,
            "LEAST_TILES": tiling.least_tiles,
            "MOST_PARTS": tiling.most_parts,
        },
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        targets=targets,
        expect=expect,
        work=Work(
            read=int(tiling.tokens * head_dim * (BYTES[keys] + BYTES[values])),
            products=2 * tiling.tokens * head_dim * tiling.queries,
            bits=16,
        ),
    )


HOPPER, OLDER = ("sm_90",), ("sm_80", "sm_89")
CASES = [
    _case("128 int8", HOPPER, 128, "int8", "int8"),
    _case("128 int8", OLDER, 128, "int8", "int8"),
    _case("128 int4", HOPPER, 128, "int4", "int4"),
    _case("128 int4", OLDER, 128, "int4", "int4"),
    _case("128 fp8", HOPPER, 128, "fp8_e4m3", "fp8_e4m3"),
    _case("128 int8 int4 exact", HOPPER, 128, "int8", "int4", exact=True),
    _case("128 int8 int4 exact", OLDER[:1], 128, "int8", "int4", exact=True),
    _case("128 int4 g32", HOPPER, 128, "int4", "int4", group=32),
    _case("64 int8", HOPPER, 64, "int8", "int8"),
    _case("96 int4", HOPPER, 96, "int4", "int4"),
    _case("256 int8 exact", HOPPER, 256, "int8", "int8", exact=True),
    _case("256 int4", OLDER[:1], 256, "int4", "int4"),
]
