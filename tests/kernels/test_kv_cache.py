"""The quantized cache's references: what write and read agree on, and attention as the calibrated model computes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.hadamard import apply, hadamard_plan
from qtool.kernels.kv_attention import decode_attention, prompt_attention
from qtool.kernels.quantize_kv import KVCache, KVFormat, empty_cache, read_cache, write_kv
from qtool.quantize.artifacts.cache_scheme import CacheCodes
from qtool.quantize.artifacts.quantized_cache import codes_and_back

INT8, INT4A = KVFormat(format="int8"), KVFormat(format="int4", symmetric=False)
FP8 = KVFormat(format="fp8_e4m3")
FORMATS = [INT8, INT4A, FP8, replace(INT8, symmetric=False), replace(INT4A, group_size=16)]


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_BACKEND", "reference")


def tokens(batch: int, heads: int, count: int, head_dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, count, head_dim, generator=torch.Generator().manual_seed(seed)) * 2


def new_cache(keys: KVFormat, values: KVFormat, **options: Any) -> KVCache:
    options = {"batch": 2, "heads": 2, "capacity": 12, "head_dim": 32, "dtype": torch.float32, **options}
    return empty_cache(keys=keys, values=values, device="cpu", **options)


def through_codes(x: Tensor, fmt: KVFormat) -> Tensor:
    return codes_and_back(x, CacheCodes(format=fmt.format, symmetric=fmt.symmetric, group_size=fmt.group_size))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_is_read_is_what_the_calibrated_model_saw(fmt: KVFormat) -> None:
    cache = new_cache(fmt, INT8)
    key, value = tokens(2, 2, 9, 32), tokens(2, 2, 9, 32, seed=1)
    write_kv(cache, key, value, torch.zeros(2, dtype=torch.int32))
    for row in range(2):
        found_key, found_value = read_cache(cache, row, 9)
        assert torch.equal(found_key, through_codes(key[row], fmt))
        assert torch.equal(found_value, through_codes(value[row], INT8))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_cache_takes_the_bytes_its_format_says(fmt: KVFormat) -> None:
    cache = new_cache(fmt, fmt, sink=1, recent=2)
    scheme = CacheCodes(format=fmt.format, symmetric=fmt.symmetric, group_size=fmt.group_size)
    assert cache.nbytes() == 2 * 2 * 12 * 2 * scheme.head_bytes(32) + 2 * 2 * 2 * 3 * 32 * 4


def test_exact_tokens_are_read_as_they_were() -> None:
    cache = new_cache(INT4A, INT4A, sink=2, recent=3)
    key, value = tokens(2, 2, 9, 32), tokens(2, 2, 9, 32, seed=1)
    for t in range(9):
        write_kv(cache, key[:, :, t : t + 1], value[:, :, t : t + 1], torch.full((2,), t, dtype=torch.int32))
    found = read_cache(cache, 1, 9)
    for x, got in zip((key[1], value[1]), found, strict=True):
        assert torch.equal(got[:, [0, 1, 6, 7, 8]], x[:, [0, 1, 6, 7, 8]])
        assert torch.equal(got[:, 2:6], through_codes(x, INT4A)[:, 2:6])


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """transformers' eager attention of one token: keys repeated for their queries, softmax in float32."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return ((query[:, :, None] @ key.mT) * scale).softmax(dim=-1, dtype=torch.float32).matmul(value)[:, :, 0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("rotate", "past_only"), [(False, False), (True, False), (False, True)])
def test_decoding_is_the_calibrated_models_attention(fmt: KVFormat, rotate: bool, past_only: bool) -> None:
    """As quantized_cache.py has it; with past_only a token sees itself in float, earlier ones through their codes."""
    cache = new_cache(fmt, INT8, rotate=rotate, recent=int(past_only))
    key, value = tokens(2, 2, 9, 32), tokens(2, 2, 9, 32, seed=1)
    query = tokens(2, 4, 1, 32, seed=2)
    asked = write_kv(cache, key, value, torch.zeros(2, dtype=torch.int32), query=query.expand(2, 4, 9, 32))
    assert asked is not None
    lengths = torch.full((2,), 9, dtype=torch.int32)
    found = decode_attention(asked[:, :, 8], cache, lengths, rotated_query=True)
    alone = decode_attention(query[:, :, 0], cache, lengths)  # rotated by another GEMM shape, so to rounding only
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=5e-6)
    if rotate:
        plan = hadamard_plan(32)
        query, key = apply(query, plan), apply(key, plan)
    seen_key, seen_value = through_codes(key, fmt), through_codes(value, INT8)
    if past_only:
        seen_key[:, :, -1], seen_value[:, :, -1] = key[:, :, -1], value[:, :, -1]
    expected = eager(query[:, :, 0], seen_key, seen_value, 32**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def test_sequences_of_different_lengths_do_not_see_each_other() -> None:
    cache = new_cache(INT8, INT8)
    write_kv(cache, tokens(2, 2, 9, 32), tokens(2, 2, 9, 32, seed=1), torch.zeros(2, dtype=torch.int32))
    query = tokens(2, 4, 1, 32, seed=2)[:, :, 0]
    found = decode_attention(query, cache, torch.tensor([9, 4], dtype=torch.int32))
    longer = decode_attention(query, cache, torch.tensor([9, 9], dtype=torch.int32))
    assert torch.equal(found[0], longer[0]) and not torch.equal(found[1], longer[1])
    none = decode_attention(query, cache, torch.tensor([0, 4], dtype=torch.int32))
    assert not none[0].any() and torch.equal(none[1], found[1])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    ("sink", "recent", "options"),
    [
        (0, 0, {}),
        (0, 1, {"scale": 0.3}),
        (2, 3, {"window": 4}),
        (1, 2, {"softcap": 1.5, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    ],
    ids=["plain", "past only", "window", "softcap and sink logits"],
)
def test_a_prompt_at_once_is_the_prompt_token_by_token(
    sink: int, recent: int, options: dict[str, Any], rotate: bool
) -> None:
    whole, single = (new_cache(INT4A, INT8, sink=sink, recent=recent, rotate=rotate) for _ in range(2))
    key, value, query = tokens(2, 2, 9, 32), tokens(2, 2, 9, 32, seed=1), tokens(2, 4, 9, 32, seed=2)
    write_kv(whole, key, value, torch.zeros(2, dtype=torch.int32))
    at_once = prompt_attention(query, key, value, whole, **options)
    for t in range(9):
        write_kv(single, key[:, :, t : t + 1], value[:, :, t : t + 1], torch.full((2,), t, dtype=torch.int32))
        found = decode_attention(query[:, :, t], single, torch.full((2,), t + 1, dtype=torch.int32), **options)
        torch.testing.assert_close(at_once[:, :, t], found, rtol=1e-5, atol=5e-6)


def test_a_full_cache_and_wrong_shapes_are_refused() -> None:
    cache = new_cache(INT8, INT8)
    with pytest.raises(ValueError, match="position 12"):
        write_kv(cache, tokens(2, 2, 4, 32), tokens(2, 2, 4, 32), torch.full((2,), 9, dtype=torch.int32))
    with pytest.raises(ValueError, match="cannot be stored"):
        new_cache(replace(INT8, group_size=24), INT8)
    with pytest.raises(UsageError):
        write_kv(cache, tokens(1, 2, 4, 32), tokens(1, 2, 4, 32), torch.zeros(1, dtype=torch.int32))
