"""A quantized cache on a GPU: the reference's codes, its attention within rounding, and no sequence sees another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.kv_attention import decode_attention
from qtool.kernels.quantize_kv import KVCache, KVFormat, empty_cache, write_kv

pytestmark = pytest.mark.gpu
INT8 = KVFormat(format="int8", symmetric=True, group_size=None)
INT4 = KVFormat(format="int4", symmetric=False, group_size=None)
GROUPS = KVFormat(format="int4", symmetric=False, group_size=32)
FP8 = KVFormat(format="fp8_e4m3", symmetric=True, group_size=None)
PAIRS = {
    "int8": (INT8, INT8),
    "int4": (INT4, INT4),
    "int8 and int4": (INT8, INT4),
    "groups": (GROUPS, GROUPS),
    "fp8": (FP8, FP8),
}
LENGTHS = (1, 37, 300)


def filled(
    pair: str, device: torch.device, lengths: tuple[int, ...] = LENGTHS, **options: Any
) -> tuple[KVCache, Tensor]:
    """A cache with random tokens, the same for a sequence whatever is beside it, and its queries."""
    keys, values = PAIRS[pair]
    cache = empty_cache(
        batch=len(lengths),
        heads=2,
        capacity=320,
        head_dim=128,
        keys=keys,
        values=values,
        dtype=torch.bfloat16,
        device=device,
        **options,
    )
    longest = max(lengths)
    draws = [torch.Generator(device).manual_seed(length) for length in lengths]
    key, value = (
        torch.stack([torch.randn(2, longest, 128, generator=draw, device=device) for draw in draws]).bfloat16()
        for _ in range(2)
    )
    query = torch.stack([torch.randn(8, 128, generator=draw, device=device) for draw in draws]).bfloat16()
    starts = torch.zeros(len(lengths), dtype=torch.int32, device=device)
    write_kv(cache, key, value, starts, torch.tensor(lengths, dtype=torch.int32, device=device))
    return cache, query


def allowed(pair: str, device: torch.device) -> None:
    if pair == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("no E4M3 below capability 8.9")


@pytest.mark.parametrize("pair", PAIRS)
def test_codes_and_scales_are_the_references(pair: str, device: torch.device, referenced: Callable[..., Any]) -> None:
    allowed(pair, device)
    got, wanted = filled(pair, device)[0], referenced(lambda: filled(pair, device)[0])
    for one, other in ((got.keys, wanted.keys), (got.values, wanted.values)):
        for row, length in enumerate(LENGTHS):
            assert torch.equal(one.codes[row, :, :length], other.codes[row, :, :length])
            assert torch.equal(one.scale[row, :, :length], other.scale[row, :, :length])


@pytest.mark.parametrize(
    ("pair", "options"),
    [*((pair, {}) for pair in PAIRS), ("int8 and int4", {"sink": 4, "recent": 16}), ("int4", {"rotate": True})],
    ids=str,
)
def test_attention_is_the_references_within_rounding(
    pair: str, options: dict[str, Any], device: torch.device, referenced: Callable[..., Any]
) -> None:
    allowed(pair, device)
    cache, query = filled(pair, device, **options)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    for more in ({}, {"window": 20}, {"softcap": 5.0}) if pair == "int8 and int4" else ({},):

        def run(more: dict[str, Any] = more) -> Tensor:
            return decode_attention(query, cache, lengths, **more)

        got, wanted = run().float(), referenced(run).float()
        assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max()), more
        assert torch.equal(run().float(), got)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_sequence_has_the_same_bits_beside_any_others(pair: str, device: torch.device) -> None:
    allowed(pair, device)

    def attended(lengths: tuple[int, ...]) -> Tensor:
        cache, query = filled(pair, device, lengths)
        return decode_attention(query, cache, torch.tensor(lengths, dtype=torch.int32, device=device))

    together = attended(LENGTHS)
    for row, length in enumerate(LENGTHS):
        # The longest one stays: random tokens are drawn up to its length for all.
        assert torch.equal(attended((length, max(LENGTHS)))[0], together[row])
