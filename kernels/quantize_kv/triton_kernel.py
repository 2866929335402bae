"""New keys and values into the cache in one launch: rotate, quantize, pack, keep the exact ones; queries rotate too.

The arithmetic is the reference's, operation by operation (divisions rounded to nearest, no fused multiply-add), so the
stored bits are the reference's on a CPU.

Rows are tiles [R, HALVES, GROUPS, LANES] of float32: 4-bit codes of the two halves of a head share their bytes, and
each group of channels has a scale. Without groups a head (or its half) is the one group, padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.language import to_bf16, to_e4m3, widen
from qtool.kernels.language.casts import ONES
from qtool.kernels.quantize_kv.cache import KVCache, KVFormat, StoredHeads

# Tokens of one head in a block; one where a launch has few.
TOKENS = 16
FEW = 64


@triton.jit
def rotate_heads(x):
    """Rows [R, C] times Sylvester's matrix / √C, by the reference's butterflies; C is a power of two."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    y = tl.reshape(x * (width**-0.5), (rows * width,))
    for step in tl.static_range(10):
        if (2 << step) <= width:
            pairs = tl.permute(tl.reshape(y, (rows * width // (2 << step), 2, 1 << step)), (0, 2, 1))
            even, odd = tl.split(pairs)
            y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (rows * width,))
    return tl.reshape(y, (rows, width))


@triton.jit
def as_stored(x, pointer):
    """Float32 in the pointer's float type, to nearest."""
    if pointer.dtype.element_ty == tl.bfloat16:
        return to_bf16(x)
    else:
        return x.to(pointer.dtype.element_ty)


@triton.jit
def largest(x, HEADWIDE: tl.constexpr):
    """The maximum of each group of [R, HALVES, GROUPS, LANES], or of each row, as [R, ·, ·, 1]."""
    found = tl.max(x, axis=3, keep_dims=True)
    if HEADWIDE:
        found = tl.max(tl.max(found, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return found


@triton.jit
def step_and_offset(x, there, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr, HEADWIDE: tl.constexpr):
    """Scales and offsets of a tile as they are stored, in float16; NaN where their channels hold one."""
    nan = float("nan")
    broken = largest(((x != x) & there).to(tl.int32), HEADWIDE) > 0
    if SYMMETRIC:
        top: tl.constexpr = 448.0 if FORMAT == "fp8_e4m3" else (7.0 if FORMAT == "int4" else 127.0)
        reach = largest(tl.where(there, tl.abs(x), 0.0), HEADWIDE)
        offset = (reach * 0.0).to(tl.float16)
    else:
        top: tl.constexpr = 15.0 if FORMAT == "int4" else 255.0
        least = -largest(tl.where(there, -x, -float("inf")), HEADWIDE)
        # A padded group has no channel: nothing of it is stored, and zero keeps infinity out of it.
        offset = tl.where(broken, nan, tl.where(least == float("inf"), 0.0, least)).to(tl.float16)
        above = x - offset.to(tl.float32)
        broken = broken | (largest(((above != above) & there).to(tl.int32), HEADWIDE) > 0)
        reach = tl.maximum(largest(tl.where(there, above, 0.0), HEADWIDE), 0.0)
    scale = tl.div_rn(reach, tl.full(reach.shape, top, tl.float32))
    return tl.where(broken, nan, scale).to(tl.float16), offset


@triton.jit
def code_bytes(x, scale, offset, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Codes of a tile, a byte each: counted from the middle code, or the bits of E4M3."""
    wide = scale.to(tl.float32)
    divisor = tl.where(wide == 0.0, float("inf"), wide)
    if not SYMMETRIC:
        x = x - offset.to(tl.float32)
    steps = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    if FORMAT == "fp8_e4m3":
        return to_e4m3(steps).to(tl.uint8, bitcast=True)
    else:
        middle: tl.constexpr = 8 if FORMAT == "int4" else 128
        least: tl.constexpr = 1 - middle if SYMMETRIC else 0
        most: tl.constexpr = middle - 1 if SYMMETRIC else 2 * middle - 1
        # What is not a number gets code 0, as in the reference; its scale says what it is.
        lost: tl.constexpr = -middle if SYMMETRIC else 0
        steps = tl.where(steps == steps, tl.minimum(tl.maximum(steps, least), most), lost)
        whole = (steps + ONES).to(tl.int32, bitcast=True)
        return ((whole if SYMMETRIC else whole - middle) & 0xFF).to(tl.uint8)


@triton.jit
def store_heads(
    x,
    row,
    taken,
    place,
    codes,
    scales,
    offsets,
    exact,
    slot,
    keep,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Heads at x + row [R] into position `place` [R] of the codes, and into `slot` [R] of the exact ones if kept."""
    rows: tl.constexpr = row.shape[0]
    halves: tl.constexpr = 2 if FORMAT == "int4" else 1
    half: tl.constexpr = C // halves
    headwide: tl.constexpr = GROUP == C
    size: tl.constexpr = half if headwide else GROUP
    groups: tl.constexpr = triton.next_power_of_2(half // size)
    lanes: tl.constexpr = triton.next_power_of_2(size)
    in_half = tl.arange(0, groups)[:, None] * size + tl.arange(0, lanes)[None, :]
    fits = (in_half < half) & (tl.arange(0, lanes)[None, :] < size)
    channel = tl.arange(0, halves)[:, None, None] * half + in_half[None, :, :]
    there = taken[:, None, None, None] & fits[None, None, :, :]
    if ROTATE:
        whole = row[:, None] + tl.arange(0, C)[None, :]
        found = widen(as_stored(rotate_heads(widen(tl.load(x + whole, mask=taken[:, None], other=0.0))), x))
        found = tl.reshape(found, (rows, halves, groups, lanes))
    else:
        found = widen(tl.load(x + row[:, None, None, None] + channel[None, :, :, :], mask=there, other=0.0))
    spot = slot[:, None, None, None] * C + channel[None, :, :, :]
    tl.store(exact + spot, as_stored(found, exact), mask=there & keep[:, None, None, None])

    scale, offset = step_and_offset(found, there, FORMAT, SYMMETRIC, headwide)
    if headwide:
        number = place[:, None, None, None]
        owned = taken[:, None, None, None]
    else:
        in_head = tl.arange(0, halves)[:, None] * (half // size) + tl.arange(0, groups)[None, :]
        number = place[:, None, None, None] * (C // size) + in_head[None, :, :, None]
        owned = taken[:, None, None, None] & (tl.arange(0, groups) < half // size)[None, None, :, None]
        owned = tl.broadcast_to(owned, scale.shape)
    tl.store(scales + number, scale, mask=owned)
    if not SYMMETRIC:
        tl.store(offsets + number, offset, mask=owned)

    found = code_bytes(found, scale, offset, FORMAT, SYMMETRIC)
    if halves == 2:
        low, high = tl.split(tl.permute(found, (0, 2, 3, 1)))
        byte = place[:, None, None] * half + in_half[None, :, :]
        tl.store(codes + byte, (low & 15) | (high << 4), mask=taken[:, None, None] & fits[None, :, :])
    else:
        tl.store(codes + place[:, None, None, None] * C + channel[None, :, :, :], found, mask=there)


@triton.jit
def write_cache_kernel(
    key,
    value,
    query,
    rotated_query,
    starts,
    counts,
    key_codes,
    key_scale,
    key_offset,
    value_codes,
    value_scale,
    value_offset,
    exact_keys,
    exact_values,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    query_b,
    query_h,
    query_t,
    rows,
    tokens,
    capacity,
    sink,
    recent,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    KEY_SYMMETRIC: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    VALUE_SYMMETRIC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    ROTATE: tl.constexpr,
    R: tl.constexpr,
):
    """R of all sequences' tokens, of one head; the last axis of the grid is keys, values, the queries of that head."""
    index = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    b = (index // tokens).to(tl.int64)
    t = (index % tokens).to(tl.int64)
    real = index < rows
    start = tl.load(starts + b, mask=real, other=0).to(tl.int64)
    end = start + tl.load(counts + b, mask=real, other=0)
    at = start + t
    taken = real & (at < end) & (at < capacity)
    keep = taken & ((at < sink) | (at >= end - recent))
    slot = tl.where(at < sink, at, sink + (at - sink) % tl.maximum(recent, 1))
    place = (b * heads + head) * capacity + at
    slot = (b * heads + head) * (sink + recent) + slot
    if tl.program_id(2) == 0:
        row = b * key_b + head * key_h.to(tl.int64) + t * key_t
        store_heads(
            key, row, taken, place, key_codes, key_scale, key_offset, exact_keys, slot, keep,
            KEY_FORMAT, KEY_SYMMETRIC, C, KEY_GROUP, ROTATE,
        )  # fmt: skip
    elif tl.program_id(2) == 1:
        row = b * value_b + head * value_h.to(tl.int64) + t * value_t
        store_heads(
            value, row, taken, place, value_codes, value_scale, value_offset, exact_values, slot, keep,
            VALUE_FORMAT, VALUE_SYMMETRIC, C, VALUE_GROUP, False,
        )  # fmt: skip
    elif ROTATE:
        c = tl.arange(0, C)[None, :]
        for asking in range(head * SHARED, (head + 1) * SHARED):
            row = b * query_b + asking * query_h.to(tl.int64) + t * query_t
            asked = rotate_heads(widen(tl.load(query + row[:, None] + c, mask=real[:, None], other=0.0)))
            out = ((b * heads * SHARED + asking) * tokens + t) * C
            tl.store(rotated_query + out[:, None] + c, as_stored(asked, rotated_query), mask=real[:, None])


def write_triton(
    cache: KVCache, key: Tensor, value: Tensor, starts: Tensor, counts: Tensor, query: Tensor | None, rotate: bool
) -> Tensor | None:
    """Run the kernel; operands as the public function has checked them, except for what it has rotated itself.

    Returns:
        The queries, rotated here; None if there is nothing to rotate.
    """
    batch, heads, tokens, head_dim = key.shape
    asked = rotate and query is not None
    shown = query if asked and query is not None else key
    out = torch.empty(shown.shape, dtype=shown.dtype, device=key.device) if asked else shown
    rows = batch * tokens
    tile = TOKENS if rows >= FEW else 1
    write_cache_kernel[(triton.cdiv(rows, tile), heads, 3 if asked else 2)](
        key,
        value,
        shown,
        out,
        starts,
        counts,
        *_pointers(cache.keys),
        *_pointers(cache.values),
        cache.exact_keys,
        cache.exact_values,
        *key.stride()[:3],
        *value.stride()[:3],
        *shown.stride()[:3],
        rows,
        tokens,
        cache.capacity,
        cache.sink,
        cache.recent,
        SHARED=shown.shape[1] // heads,
        C=head_dim,
        **_form("KEY", cache.keys.format, head_dim),
        **_form("VALUE", cache.values.format, head_dim),
        ROTATE=rotate,
        R=tile,
        num_warps=warps_for(tile),
        enable_fp_fusion=False,
    )
    return out if asked else None


def warps_for(tokens: int) -> int:
    """Warps of a block of so many tokens of one head."""
    return 4 if tokens > 1 else 1


def _pointers(stored: StoredHeads) -> tuple[Tensor, Tensor, Tensor]:
    return stored.codes, stored.scale, stored.scale if stored.offset is None else stored.offset


def _form(side: str, fmt: KVFormat, head_dim: int) -> dict[str, object]:
    return {
        f"{side}_FORMAT": fmt.format,
        f"{side}_SYMMETRIC": fmt.symmetric,
        f"{side}_GROUP": fmt.group_size or head_dim,
    }
