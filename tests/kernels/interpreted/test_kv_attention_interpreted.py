"""Decode attention, interpreted, against float64 on what the cache's bytes say; edges, cuts, and no other sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.kv_attention import DecodeTiling, decode_attention
from qtool.kernels.quantize_kv import KVCache, KVFormat, StoredHeads, empty_cache

Guard = Callable[[Tensor], Tensor]

INT8, INT8A = KVFormat(format="int8"), KVFormat(format="int8", symmetric=False)
INT4, INT4A = KVFormat(format="int4"), KVFormat(format="int4", symmetric=False)
FP8 = KVFormat(format="fp8_e4m3")
# One part up to 32 tokens, three at most: all cuts occur within few tokens.
SMALL = DecodeTiling(tokens=16, least_tiles=2, most_parts=3, warps=4, stages=2, queries=16)


def grouped(fmt: KVFormat, size: int) -> KVFormat:
    return replace(fmt, group_size=size)


def random_cache(
    lengths: list[int],
    keys: KVFormat = INT8,
    values: KVFormat = INT8,
    *,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    sink: int = 0,
    recent: int = 0,
) -> KVCache:
    """Random bytes where there are tokens; NaN, and codes of no meaning, everywhere else."""
    generator = torch.Generator().manual_seed(len(lengths) + head_dim)
    cache = empty_cache(
        batch=len(lengths), heads=heads, capacity=max(lengths) + 5, head_dim=head_dim, keys=keys, values=values,
        dtype=dtype, device="cpu", sink=sink, recent=recent,
    )  # fmt: skip
    for exact in (cache.exact_keys, cache.exact_values):
        exact.fill_(torch.nan)
    for stored in (cache.keys, cache.values):
        stored.codes.fill_(0x7F)
        stored.scale.fill_(torch.nan)
        if stored.offset is not None:
            stored.offset.fill_(torch.nan)
    for b, length in enumerate(lengths):
        for stored, exact in ((cache.keys, cache.exact_keys), (cache.values, cache.exact_values)):
            shape = stored.codes[b, :, :length].shape
            codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            if stored.format.format == "fp8_e4m3":
                codes = torch.where(codes % 128 == 127, 0, codes)  # not NaN
            stored.codes[b, :, :length] = codes
            largest = {"int8": 127, "int4": 7, "fp8_e4m3": 448}[stored.format.format]
            steps = torch.rand(stored.scale[b, :, :length].shape, generator=generator) + 0.5
            stored.scale[b, :, :length] = steps / largest
            if stored.offset is not None:
                stored.offset[b, :, :length] = torch.randn(steps.shape, generator=generator) - 1
            for p in range(length):
                if p < sink or p >= length - recent:
                    slot = p if p < sink else sink + (p - sink) % recent
                    exact[b, :, slot] = torch.randn(heads, head_dim, generator=generator).to(dtype)
    return cache


def codes_of(stored: StoredHeads, b: int, h: int) -> Tensor:
    """The codes of one head [capacity, c], counted from 0 or E4M3's own values, in float64."""
    rows = stored.codes[b, h]
    if stored.format.format == "fp8_e4m3":
        return rows.view(torch.float8_e4m3fn).double()
    if stored.format.format == "int8":
        return rows.view(torch.int8).double() + 128
    nibbles = torch.cat((rows & 15, rows >> 4), dim=1).double()
    return torch.where(nibbles < 8, nibbles, nibbles - 16) + 8


def kept(cache: KVCache, stored: StoredHeads, exact: Tensor, b: int, h: int, length: int) -> Tensor:
    """The keys or values of one head that a sequence's last token reads, [length, c] in float64."""
    size = stored.format.group_size or cache.head_dim
    scale = stored.scale[b, h].double().repeat_interleave(size, dim=1)
    if stored.offset is None:
        middle = {"int8": 128, "int4": 8, "fp8_e4m3": 0}[stored.format.format]
        values = (codes_of(stored, b, h) - middle) * scale
    else:
        values = codes_of(stored, b, h) * scale + stored.offset[b, h].double().repeat_interleave(size, dim=1)
    values = values[:length]
    for p in range(length):
        if p < cache.sink or p >= length - cache.recent:
            slot = p if p < cache.sink else cache.sink + (p - cache.sink) % cache.recent
            values[p] = exact[b, h, slot].double()
    return values


def expected(
    query: Tensor,
    cache: KVCache,
    lengths: list[int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The formula in the package's docstring, head by head."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    shared = query.shape[1] // cache.heads
    for b, length in enumerate(lengths):
        for h in range(query.shape[1] if length else 0):
            key = kept(cache, cache.keys, cache.exact_keys, b, h // shared, length)
            value = kept(cache, cache.values, cache.exact_values, b, h // shared, length)
            s = key @ query[b, h].double() * (query.shape[2] ** -0.5 if scale is None else scale)
            s = s if softcap is None else softcap * (s / softcap).tanh()
            first = 0 if window is None else max(length - window, 0)
            weights = s[first:].exp()
            total = weights.sum() + (0 if sink_logits is None else sink_logits[h].double().exp())
            out[b, h] = weights @ value[first:] / total
    return out


def queries(batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, head_dim, generator=torch.Generator().manual_seed(heads)).to(dtype)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Float32 sums of codes (143 times the step for int4's) leave about 2⁻¹⁷ of the largest value here.
CLOSE = {"rtol": 0.0, "atol": 3e-5}


@pytest.mark.parametrize(
    ("keys", "values", "head_dim", "heads", "shared"),
    [
        (INT8, INT4A, 64, 2, 4),
        (INT4A, INT8, 64, 2, 1),
        (INT4, FP8, 128, 1, 5),
        (FP8, INT4, 96, 2, 2),
        (INT8A, INT8A, 96, 1, 20),
        (INT4A, INT4A, 256, 1, 2),
        (grouped(INT8, 32), grouped(INT4A, 16), 64, 1, 2),
        (grouped(INT4, 16), grouped(FP8, 32), 96, 1, 2),
    ],
    ids=str,
)
def test_every_format_and_head(
    keys: KVFormat, values: KVFormat, head_dim: int, heads: int, shared: int, guarded: Guard
) -> None:
    lengths = [37, 16]
    cache = random_cache(lengths, keys, values, heads=heads, head_dim=head_dim, sink=2, recent=3)
    query = queries(2, heads * shared, head_dim)
    found = decode_attention(guarded(query), cache, guarded(ints(lengths)), tiling=SMALL)
    torch.testing.assert_close(found.double(), expected(query, cache, lengths), **CLOSE)


CUTS = [[0, 1, 15], [16, 17, 32], [33, 64, 65], [96, 97, 150]]


@pytest.mark.parametrize("lengths", CUTS, ids=lambda found: "-".join(map(str, found)))
def test_every_cut_of_a_sequence(lengths: list[int]) -> None:
    cache = random_cache(lengths, INT8, INT4A, heads=1)
    query = queries(3, 2, 64)
    found = decode_attention(query, cache, ints(lengths), tiling=SMALL)
    torch.testing.assert_close(found.double(), expected(query, cache, lengths), **CLOSE)
    assert not found[[length == 0 for length in lengths]].any()


@pytest.mark.parametrize("window", [None, 1, 3, 30, 200])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 0), (5, 7), (60, 1)])
def test_exact_tokens_and_windows(sink: int, recent: int, window: int | None) -> None:
    lengths = [3, 50]
    cache = random_cache(lengths, INT4A, INT8, heads=1, sink=sink, recent=recent)
    query = queries(2, 2, 64)
    found = decode_attention(query, cache, ints(lengths), window=window, tiling=SMALL)
    torch.testing.assert_close(found.double(), expected(query, cache, lengths, window=window), **CLOSE)


def test_softcap_scale_and_sink_logits(guarded: Guard) -> None:
    lengths = [40, 5]
    cache = random_cache(lengths, INT8, INT8, heads=2, sink=1, recent=1)
    query = queries(2, 6, 64) * 4
    options: dict[str, Any] = {"scale": 0.2, "softcap": 3.0, "sink_logits": torch.linspace(-2, 4, 6)}
    found = decode_attention(query, cache, ints(lengths), tiling=SMALL, **options)
    torch.testing.assert_close(found.double(), expected(query, cache, lengths, **options), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Shares are rounded to bfloat16 (2⁻⁹ of each), and so may the result be."""
    lengths = [45, 20]
    cache = random_cache(lengths, INT4A, INT8, heads=1, dtype=dtype, sink=1, recent=2)
    query = queries(2, 4, 64, dtype)
    found = decode_attention(query, cache, ints(lengths), tiling=SMALL)
    assert found.dtype == dtype
    largest = 2.0  # of random_cache's values
    torch.testing.assert_close(found.double(), expected(query, cache, lengths), rtol=2**-8, atol=largest * 2**-8)


def test_a_sequence_has_the_same_bits_whatever_is_beside_it() -> None:
    lengths = [40, 33, 70]
    cache = random_cache(lengths, INT4A, INT8, heads=1, sink=2, recent=3)
    query = queries(3, 2, 64)
    together = decode_attention(query, cache, ints(lengths), tiling=SMALL)
    for rows in ([1], [2, 0]):
        part = replace(
            cache,
            keys=replace(cache.keys, **{n: getattr(cache.keys, n)[rows] for n in ("codes", "scale", "offset")}),
            values=replace(cache.values, **{n: getattr(cache.values, n)[rows] for n in ("codes", "scale")}),
            exact_keys=cache.exact_keys[rows],
            exact_values=cache.exact_values[rows],
        )
        mine = [lengths[row] for row in rows]
        found = decode_attention(query[rows], part, ints(mine), longest=max(mine), tiling=SMALL)
        assert torch.equal(found, together[rows])


def test_what_is_not_finite_is_not_hidden() -> None:
    cache = random_cache([40, 40, 40], INT8, INT4A, heads=1)
    clean = decode_attention(queries(3, 2, 64), cache, ints([40, 40, 40]), tiling=SMALL)
    cache.keys.scale[0, 0, 7] = torch.inf
    cache.values.scale[1, 0, 39] = torch.nan
    found = decode_attention(queries(3, 2, 64), cache, ints([40, 40, 40]), tiling=SMALL)
    assert found[0].isnan().all() and found[1].isnan().all() and torch.equal(found[2], clean[2])


def test_the_shipped_tiling() -> None:
    lengths = [150]
    cache = random_cache(lengths, INT8, INT8, heads=1, recent=1)
    query = queries(1, 2, 64)
    found = decode_attention(query, cache, ints(lengths))
    torch.testing.assert_close(found.double(), expected(query, cache, lengths), **CLOSE)


def test_what_does_not_fit_is_refused() -> None:
    cache = random_cache([4, 4])
    with pytest.raises(UsageError):
        decode_attention(queries(2, 3, 64), cache, ints([4, 4]))
    with pytest.raises(UsageError):
        decode_attention(queries(2, 4, 64), cache, ints([4, 4]).long())
    with pytest.raises(UsageError):
        decode_attention(queries(2, 4, 64, torch.bfloat16), cache, ints([4, 4]))
    with pytest.raises(UsageError):
        decode_attention(queries(2, 4, 64), cache, ints([4, 4]), window=0)
    uneven = random_cache([4], grouped(INT4, 32), INT8, head_dim=96)
    with pytest.raises(EnvironmentFault):
        decode_attention(queries(1, 2, 96), uneven, ints([4]))
