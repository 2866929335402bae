"""Writing to a quantized cache, interpreted: the stored bits against plain arithmetic, edges, what stays untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.hadamard import dense, hadamard_plan
from qtool.kernels.quantize_kv import KVCache, KVFormat, StoredHeads, empty_cache, write_kv

Guard = Callable[[Tensor], Tensor]

INT8, INT8A = KVFormat(format="int8"), KVFormat(format="int8", symmetric=False)
INT4, INT4A = KVFormat(format="int4"), KVFormat(format="int4", symmetric=False)
FP8 = KVFormat(format="fp8_e4m3")
B, H, C = 2, 2, 64


def grouped(fmt: KVFormat, size: int) -> KVFormat:
    return replace(fmt, group_size=size)


def new_cache(keys: KVFormat, values: KVFormat, *, head_dim: int = C, capacity: int = 9, **options: Any) -> KVCache:
    options = {"batch": B, "heads": H, "dtype": torch.bfloat16, **options}
    cache = empty_cache(head_dim=head_dim, capacity=capacity, keys=keys, values=values, device="cpu", **options)
    for stored in (cache.keys, cache.values):
        for place in (stored.codes, stored.scale, stored.offset):
            if place is not None:
                place.view(torch.uint8).fill_(0xA5)
    cache.exact_keys.fill_(-77)
    cache.exact_values.fill_(-77)
    return cache


def tokens(
    count: int, *, head_dim: int = C, heads: int = H, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    x = torch.randn(B, heads, count, head_dim, generator=torch.Generator().manual_seed(seed))
    return (x * 3 + 1).to(dtype)


def codes_of(stored: StoredHeads, b: int, h: int, t: int) -> Tensor:
    """The codes of one token and head as integers counted from 0, or E4M3 values; read byte by byte."""
    row = stored.codes[b, h, t]
    if stored.format.format == "fp8_e4m3":
        return row.view(torch.float8_e4m3fn).double()
    if stored.format.format == "int8":
        return row.view(torch.int8).long() + 128
    nibbles = torch.cat((row & 15, row >> 4)).long()
    return torch.where(nibbles < 8, nibbles, nibbles - 16) + 8


def expected(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of one group [g], by the formulas in the package's docstring."""
    x = x.float()
    if fmt.format == "fp8_e4m3":
        scale = (x.abs().max() / 448).half()
        return (x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).double(), scale, torch.zeros(())
    top = {"int8": 127, "int4": 7}[fmt.format]
    if fmt.symmetric:
        scale = (x.abs().max() / top).half()
        return (x / scale.float()).round().clamp(-top, top).long() + top + 1, scale, torch.zeros(())
    offset = x.min().half()
    top = 2 * top + 1
    above = x - offset.float()
    scale = (above.max().clamp_min(0) / top).half()
    return (above / scale.float()).round().clamp(0, top).long(), scale, offset


def assert_stored(stored: StoredHeads, x: Tensor, b: int, h: int, t: int) -> None:
    size = stored.format.group_size or x.numel()
    codes = codes_of(stored, b, h, t)
    for g, group in enumerate(x.split(size)):
        want, scale, offset = expected(group, stored.format)
        assert torch.equal(codes[g * size : (g + 1) * size], want)
        assert torch.equal(stored.scale[b, h, t, g], scale)
        assert stored.offset is None or torch.equal(stored.offset[b, h, t, g], offset)


@pytest.mark.parametrize(
    ("keys", "values", "head_dim"),
    [
        (INT8, INT4A, 64),
        (INT4, INT8A, 96),
        (FP8, INT4, 128),
        (grouped(INT8, 16), grouped(INT4A, 16), 96),
        (grouped(INT4, 64), grouped(FP8, 32), 256),
    ],
    ids=str,
)
def test_what_is_stored_is_what_the_formulas_say(
    keys: KVFormat, values: KVFormat, head_dim: int, guarded: Guard
) -> None:
    cache = new_cache(keys, values, head_dim=head_dim)
    key, value = tokens(3, head_dim=head_dim), tokens(3, head_dim=head_dim, seed=1)
    key[1, 1, 2, 5] = 900.0
    starts, counts = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    assert write_kv(cache, guarded(key), guarded(value), guarded(starts), guarded(counts)) is None
    for b in range(B):
        for h in range(H):
            for t in range(int(counts[b])):
                assert_stored(cache.keys, key[b, h, t], b, h, int(starts[b]) + t)
                assert_stored(cache.values, value[b, h, t], b, h, int(starts[b]) + t)


def test_nothing_else_is_touched() -> None:
    cache = new_cache(INT8, INT4A, sink=1, recent=2)
    starts, counts = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    write_kv(cache, tokens(3), tokens(3), starts, counts)
    untouched = [0, 1, 2, 3, 6, 7, 8]
    for stored in (cache.keys, cache.values):
        assert (stored.codes[0][:, untouched] == 0xA5).all() and (stored.codes[1] == 0xA5).all()
        assert (stored.scale[0][:, untouched].view(torch.uint8) == 0xA5).all()
        assert not (stored.codes[0][:, 4:6] == 0xA5).all()
    assert (cache.exact_keys[0, :, 0] == -77).all() and (cache.exact_keys[1] == -77).all()


def test_positions_beyond_the_capacity_are_left_out() -> None:
    cache = new_cache(INT8, INT8, capacity=5)
    write_kv(cache, tokens(4), tokens(4), torch.tensor([3, 0], dtype=torch.int32))
    assert not (cache.keys.codes[0, :, 4] == 0xA5).all() and not (cache.keys.codes[1, :, 0] == 0xA5).all()
    assert (cache.keys.codes[1, :, 4] == 0xA5).all()


@pytest.mark.parametrize(("start", "count"), [(0, 7), (5, 2), (6, 1), (1, 3)])
def test_the_first_and_the_latest_tokens_are_kept_exactly(start: int, count: int) -> None:
    cache = new_cache(INT8, INT8, sink=2, recent=3)
    key, value = tokens(7), tokens(7, seed=1)
    starts = torch.full((B,), start, dtype=torch.int32)
    write_kv(cache, key[:, :, start:], value[:, :, start:], starts, torch.full((B,), count, dtype=torch.int32))
    for p in range(start, start + count):
        slot = p if p < 2 else 2 + (p - 2) % 3
        if p < 2 or p >= start + count - 3:
            assert torch.equal(cache.exact_keys[:, :, slot], key[:, :, p])
            assert torch.equal(cache.exact_values[:, :, slot], value[:, :, p])


@pytest.mark.parametrize(("head_dim", "count"), [(64, 1), (128, 2), (96, 1)])
def test_rotated_keys_and_queries(head_dim: int, count: int, guarded: Guard) -> None:
    cache = new_cache(INT8, INT8, head_dim=head_dim, recent=2, rotate=True, dtype=torch.float32)
    key = tokens(count, head_dim=head_dim, dtype=torch.float32)
    query = tokens(count, head_dim=head_dim, heads=6, seed=2, dtype=torch.float32)
    found = write_kv(cache, guarded(key), guarded(key), torch.zeros(B, dtype=torch.int32), query=guarded(query))
    rotation = dense(hadamard_plan(head_dim))
    assert found is not None
    torch.testing.assert_close(found.double(), query.double() @ rotation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.exact_keys[:, :, :count].double(), key.double() @ rotation, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.exact_values[:, :, :count], key)
    for t in range(count):
        assert_stored(cache.keys, cache.exact_keys[0, 1, t], 0, 1, t)
        assert_stored(cache.values, key[0, 1, t], 0, 1, t)


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("fmt", [INT8, INT4A, FP8], ids=str)
def test_zeros_constants_and_what_is_not_finite(fmt: KVFormat) -> None:
    cache = new_cache(fmt, fmt, dtype=torch.float32)
    x = tokens(6, dtype=torch.float32)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0.0, 1e-12, 3.0
    x[0, 0, 3, 7], x[0, 0, 4, 7], x[0, 0, 5, 7] = torch.nan, torch.inf, -torch.inf
    write_kv(cache, x, x, torch.zeros(B, dtype=torch.int32))
    values = torch.stack([codes_of(cache.keys, 0, 1, t).double() for t in range(3)]) - fmt.zero_code * fmt.symmetric
    values = values * cache.keys.scale[0, 1, :3].double()
    if cache.keys.offset is not None:
        values = values + cache.keys.offset[0, 1, :3].double()
    assert (values[:2].abs() < 1e-7).all()
    torch.testing.assert_close(values[2], torch.full((C,), 3.0).double(), rtol=1e-3, atol=0)
    assert not cache.keys.scale[0, 0, 3:6].isfinite().any() and cache.keys.scale[0, 1].isfinite().all()


def test_one_token_or_many_store_the_same_bits() -> None:
    """66 rows go through tiles of 16; two rows are blocks of their own."""
    whole, single = (new_cache(INT4A, FP8, capacity=40, sink=1, recent=40, rotate=True) for _ in range(2))
    key, value = tokens(33), tokens(33, seed=1).transpose(1, 2).contiguous().transpose(1, 2)
    write_kv(whole, key, value, torch.zeros(B, dtype=torch.int32))
    for t in (0, 15, 16, 32):
        write_kv(single, key[:, :, t : t + 1], value[:, :, t : t + 1], torch.full((B,), t, dtype=torch.int32))
        for a, b in ((whole.keys, single.keys), (whole.values, single.values)):
            assert torch.equal(a.codes[:, :, t], b.codes[:, :, t])
            assert torch.equal(a.scale[:, :, t].view(torch.int16), b.scale[:, :, t].view(torch.int16))
        assert torch.equal(whole.exact_keys[:, :, t], single.exact_keys[:, :, t])
        assert torch.equal(whole.exact_values[:, :, t], single.exact_values[:, :, t])


def test_what_does_not_fit_is_refused() -> None:
    cache, starts = new_cache(INT8, INT8), torch.zeros(B, dtype=torch.int32)
    with pytest.raises(UsageError):
        write_kv(cache, tokens(1), tokens(1, head_dim=32), starts)
    with pytest.raises(UsageError):
        write_kv(cache, tokens(1), tokens(1), starts.long())
    with pytest.raises(UsageError):
        write_kv(cache, tokens(1), tokens(1), starts, query=tokens(1, heads=3))
    with pytest.raises(EnvironmentFault):
        uneven = new_cache(grouped(INT4, 32), INT8, head_dim=96)
        write_kv(uneven, tokens(1, head_dim=96), tokens(1, head_dim=96), starts)
    with pytest.raises(ValueError):
        KVFormat(format="fp8_e4m3", symmetric=False)
