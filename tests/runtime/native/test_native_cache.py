"""The quantized cache: what the reference computes through codes and back, out of stored codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.runtime.native import NativeSession
from qtool.runtime.reference import ReferenceSession

CACHES = [
    {"format": "int8"},
    {"format": "int4", "rotate": True},
    {"format": "int8", "values": "int4", "group_size": 16},
    {"format": "fp8_e4m3"},
    {"format": "int4", "past_only": True},
    {"format": "int4", "rotate": True, "past_only": True},
    {"format": "int4", "before_bias": True},
    {"format": "int4", "before_bias": True, "past_only": True},
]


def relative(ours: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.linalg.norm(ours - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


@pytest.fixture(scope="module")
def cached(make_source: Callable[..., Any], quantize_none: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """cached(options): a checkpoint of floats, so that only the cache is compared."""
    checkpoint = quantize_none(make_source("qwen2", tied=False, head_dim=16))

    def with_cache(options: dict[str, Any]) -> Any:
        checkpoint.manifest.details["kv"] = CacheScheme.model_validate(options).model_dump()
        return checkpoint

    return with_cache


def test_the_cache_is_seen_at_all(cached: Callable[..., Any], tokens: np.ndarray) -> None:
    found = []
    for options in CACHES:
        with ReferenceSession(cached(options)) as reference:
            found.append(reference.prefill(tokens[:1, :24]))
    assert all(relative(a, found[0]).max() > 1e-3 for a in found[1:])


@pytest.mark.parametrize("options", CACHES, ids=lambda o: " ".join(str(v) for v in o.values()))
def test_prefill_and_decode_read_what_the_reference_reads(
    cached: Callable[..., Any], tokens: np.ndarray, options: dict[str, Any]
) -> None:
    checkpoint = cached(options)
    with ReferenceSession(checkpoint) as reference:
        wanted = reference.prefill(tokens)
    with NativeSession(checkpoint, max_length=48) as session:
        assert str(checkpoint.kv) in session.description
        whole = session.prefill(tokens)
        session.reset()
        parts = [session.prefill(tokens[:, :20]), session.prefill(tokens[:, 20:40])]
        parts += [session.decode(tokens[:, t])[:, None] for t in range(40, 48)]
        session.reset()
        ragged = session.prefill(tokens, [48, 17, 30])
    for ours in (whole, np.concatenate(parts, axis=1)):
        error = relative(ours, wanted)
        # A sum in another order may tip a code; most rows have none.
        assert np.median(error) < 1e-4 and error.max() < 0.1
    assert np.median(relative(ragged[1, :17], wanted[1, :17])) < 1e-4
    assert np.median(relative(ragged[2, :30], wanted[2, :30])) < 1e-4


def test_a_ragged_batch_goes_on_where_each_sequence_ends(cached: Callable[..., Any], tokens: np.ndarray) -> None:
    checkpoint = cached({"format": "int8"})
    with ReferenceSession(checkpoint) as reference:
        wanted = reference.prefill(tokens)
    with NativeSession(checkpoint, max_length=48) as session:
        session.prefill(tokens, [40, 17, 30])
        found = session.decode(np.array([tokens[0, 40], tokens[1, 17], tokens[2, 30]]))
    for row, position in enumerate((40, 17, 30)):
        assert relative(found[row], wanted[row, position]) < 1e-3
