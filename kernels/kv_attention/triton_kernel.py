"""Decode attention: all query heads that share one head of keys in one tile, so the cache is read once.

    scores[T, G] = K[T, c] · Qᵀ[c, G]        out[G, c] = P[G, T] · V[T, c]

Codes enter both products exactly; a token's scale and offset are applied to its scores, and to its shares.
A sequence is cut into parts of whole tiles as its own length says. Each part leaves its maximum, its sum and its output
in a workspace; the last to arrive adds them, first to last: neither the batch nor the order of arrival has a say in any
bit. The tokens kept in 16 bits are a part of their own, the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.float_gemm.workspace import workspace_for
from qtool.kernels.kv_attention.codes import BIAS, as_type, channels, code_terms, code_tile, exact_tile, value_tile
from qtool.kernels.kv_attention.options import ScoreOptions
from qtool.kernels.kv_attention.softmax import add_parts, capped, dot, shares_of
from qtool.kernels.kv_attention.tiling import DecodeTiling
from qtool.kernels.language import uses_assembly, widen
from qtool.kernels.quantize_kv.cache import KVCache, KVFormat, StoredHeads

LOG2_E = tl.constexpr(1.4426950408889634)
# Channels of tokens kept in 16 bits that are taken at once.
EXACT_CHANNELS = 4096


@triton.jit
def decode_attention_kernel(
    query,
    lengths,
    key_codes,
    key_scale,
    key_offset,
    value_codes,
    value_scale,
    value_offset,
    exact_keys,
    exact_values,
    sink_logits,
    out,
    sums,
    arrivals,
    capacity,
    sink,
    recent,
    window,
    inner,
    outer,
    SHARED: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    T: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One part (axis 0) of one sequence (axis 2), for up to G query heads that share one head of keys (axis 1).

    scores = outer × cap(inner × q · k), cap being tanh or nothing; they come out in powers of two.
    """
    blocks: tl.constexpr = triton.cdiv(SHARED, G)
    part = tl.program_id(0)
    head = tl.program_id(1) // blocks
    heads = tl.num_programs(1) // blocks
    first_g = tl.program_id(1) % blocks * G
    b = tl.program_id(2)
    cell = (b * heads + head).to(tl.int64)
    g = tl.arange(0, G)
    asked = first_g + g < SHARED

    # Positions [first, n) are seen: [first, lo) and [hi, n) in 16 bits, [lo, hi) through codes.
    n = tl.minimum(tl.load(lengths + b), capacity)
    first = tl.maximum(n - window, 0) if WINDOW else 0
    lo = tl.maximum(first, tl.minimum(sink, n))
    hi = tl.maximum(lo, n - recent)
    early = tl.maximum(tl.minimum(sink, n) - first, 0)
    exact = early + n - hi
    tiles = tl.cdiv(hi - lo, T)
    each = tl.maximum(tl.cdiv(tiles, MOST_PARTS), LEAST_TILES)
    parts = tl.cdiv(tiles, each)
    count = parts + (exact > 0).to(tl.int32)

    rows = (cell * SHARED + first_g + g) * C
    if count == 0 and part == 0:
        c = tl.arange(0, triton.next_power_of_2(C))[None, :]
        nothing = tl.zeros((G, c.shape[1]), out.dtype.element_ty)
        tl.store(out + rows[:, None] + c, nothing, mask=asked[:, None] & (c < C))
    if part >= count:
        return

    dtype: tl.constexpr = query.dtype.element_ty
    # Shares times scales can leave float16's range; of codes, bfloat16 loses nothing.
    wide_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.bfloat16
    shifted: tl.constexpr = VALUE_GROUP == C and (VALUE_OFFSET or VALUE_FORMAT == "int4")
    key_c = channels(C, KEY_FORMAT)[None, :]
    value_c = channels(C, VALUE_FORMAT)[None, :]
    q = tl.load(query + rows[:, None] + key_c, mask=asked[:, None] & (key_c < C), other=0.0)
    q_sum = tl.sum(widen(q), axis=1)
    rt = tl.arange(0, T)
    top = tl.full((G,), -float("inf"), tl.float32)
    shares = tl.zeros((G, T), tl.float32)
    shifts = tl.zeros((G, T), tl.float32)
    acc = tl.zeros((G, value_c.shape[1]), tl.float32)

    begin = tl.minimum(part * each, tiles)
    for i in range(begin, tl.minimum(begin + each, tiles)):
        t = lo + i * T + rt
        inside = t < hi
        place = cell * capacity + t
        if KEY_GROUP == C:
            k = code_tile(key_codes, place, inside, KEY_FORMAT, C, dtype, ASM)
            s = dot(k, q.T, tl.zeros((T, G), tl.float32)).T
            step, shift = code_terms(key_scale, key_offset, place, inside, KEY_FORMAT, KEY_OFFSET)
            s *= (step * inner)[None, :]
            if KEY_FORMAT == "int4":
                shift -= BIAS * step
            if KEY_OFFSET or KEY_FORMAT == "int4":
                s += q_sum[:, None] * (shift * inner)[None, :]
        else:
            k = value_tile(
                key_codes, key_scale, key_offset, place, inside, KEY_FORMAT, KEY_OFFSET, KEY_GROUP, C, dtype, ASM
            )
            s = dot(k, q.T, tl.zeros((T, G), tl.float32)).T * inner
        s = tl.where(inside[None, :], capped(s, outer, SOFTCAP), -float("inf"))
        p, fade, top = shares_of(s, top)
        shares = shares * fade[:, None] + p
        if VALUE_GROUP == C:
            v = code_tile(value_codes, place, inside, VALUE_FORMAT, C, wide_dtype, ASM)
            step, shift = code_terms(value_scale, value_offset, place, inside, VALUE_FORMAT, VALUE_OFFSET)
            if shifted:
                shifts *= fade[:, None]
            if VALUE_OFFSET:
                shifts += p * shift[None, :]
            p = as_type(p * step[None, :], wide_dtype)
            if VALUE_FORMAT == "int4":
                shifts -= BIAS * widen(p)
        else:
            v = value_tile(
                value_codes, value_scale, value_offset, place, inside,
                VALUE_FORMAT, VALUE_OFFSET, VALUE_GROUP, C, wide_dtype, ASM,
            )  # fmt: skip
            p = as_type(p, wide_dtype)
        acc = dot(p, v, acc * fade[:, None])

    total = tl.sum(shares, axis=1)
    if EXACT:
        re = tl.arange(0, EXACT)
        for i in tl.range(0, tl.where(part == parts, tl.cdiv(exact, EXACT), 0), num_stages=1):
            e = i * EXACT + re
            inside = e < exact
            t = tl.where(e < early, first + e, hi + e - early)
            slot = tl.where(t < sink, t, sink + (t - sink) % tl.maximum(recent, 1))
            place = cell * (sink + recent) + slot
            k = exact_tile(exact_keys, place, inside, KEY_FORMAT, C)
            s = dot(k, q.T, tl.zeros((EXACT, G), tl.float32)).T * inner
            s = tl.where(inside[None, :], capped(s, outer, SOFTCAP), -float("inf"))
            p, fade, top = shares_of(s, top)
            total = total * fade + tl.sum(p, axis=1)
            v = exact_tile(exact_values, place, inside, VALUE_FORMAT, C)
            acc = dot(as_type(p, dtype), v, acc * fade[:, None])

    if shifted:
        acc += tl.sum(shifts, axis=1)[:, None]
    block = (b * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    acc, top, total, last = add_parts(acc, top, total, sums, arrivals, part, count, block, MOST_PARTS)
    if SINK_LOGITS:
        logit = widen(tl.load(sink_logits + head * SHARED + first_g + g, mask=asked, other=0.0)) * LOG2_E
        higher = tl.maximum(top, logit)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.exp2(logit - higher)
        acc *= fade[:, None]
    stored = last & asked[:, None] & (value_c < C)
    tl.store(out + rows[:, None] + value_c, as_type(acc / total[:, None], out.dtype.element_ty), mask=stored)


def decode_triton(
    query: Tensor, cache: KVCache, lengths: Tensor, options: ScoreOptions, *, longest: int, tiling: DecodeTiling
) -> Tensor:
    """Run the kernel; operands as the public function has checked them.

    Args:
        query: [B, H, c], contiguous, rotated already.
        cache: of this layer.
        lengths: int32 [B].
        options: of the scores.
        longest: no length is above it.
        tiling: from the table.
    """
    batch, query_heads, head_dim = query.shape
    shared = query_heads // cache.heads
    out = torch.empty_like(query)
    blocks = triton.cdiv(shared, tiling.queries)
    parts = tiling.parts(longest)
    has_exact = cache.sink + cache.recent > 0
    softcap = options.softcap
    tile = (triton.next_power_of_2(head_dim) + 2) * tiling.queries
    space = workspace_for(query.device, batch * cache.heads * blocks, parts + has_exact, tile)
    decode_attention_kernel[(parts + has_exact, cache.heads * blocks, batch)](
        query,
        lengths,
        *_pointers(cache.keys),
        *_pointers(cache.values),
        cache.exact_keys,
        cache.exact_values,
        query if options.sink_logits is None else options.sink_logits,
        out,
        space.sums,
        space.arrivals,
        cache.capacity,
        cache.sink,
        cache.recent,
        options.window or 0,
        options.scale * LOG2_E.value if softcap is None else options.scale / softcap,
        1.0 if softcap is None else softcap * LOG2_E.value,
        SHARED=shared,
        G=tiling.queries,
        C=head_dim,
        **_form("KEY", cache.keys.format, head_dim),
        **_form("VALUE", cache.values.format, head_dim),
        EXACT=exact_tokens(head_dim) if has_exact else 0,
        WINDOW=options.window is not None,
        SOFTCAP=softcap is not None,
        SINK_LOGITS=options.sink_logits is not None,
        T=tiling.tokens,
        LEAST_TILES=tiling.least_tiles,
        MOST_PARTS=tiling.most_parts,
        ASM=uses_assembly(query.device),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def exact_tokens(head_dim: int) -> int:
    """Tokens kept in 16 bits that are taken at once."""
    return max(16, EXACT_CHANNELS // triton.next_power_of_2(head_dim))


def _pointers(stored: StoredHeads) -> tuple[Tensor, Tensor, Tensor]:
    return stored.codes.view(torch.int16), stored.scale, stored.scale if stored.offset is None else stored.offset


def _form(side: str, fmt: KVFormat, head_dim: int) -> dict[str, object]:
    return {
        f"{side}_FORMAT": fmt.format,
        f"{side}_OFFSET": not fmt.symmetric,
        f"{side}_GROUP": fmt.group_size or head_dim,
    }
