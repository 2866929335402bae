"""A quantized model on a GPU: graphs, single launches, prefill and decoding, alone or beside others, say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from on_gpu.random_model import SHAPES, RandomCheckpoint, RandomModel
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.native import NativeSession

pytestmark = pytest.mark.gpu
PER_TOKEN = {"activation": "per_token"}
SCHEMES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "W4A8": {"group_size": 128, "scale": "shift", **PER_TOKEN},
    "W8A8": {},
    "W4A16": {"group_size": 128},
    "FP8_DYNAMIC": {},
    "W4A8_INT_FP": {"group_size": 128},
}
PROMPT = np.arange(3, 27, dtype=np.int64)[None]
GRAPH_ERROR, ROUNDING = 1e-3, 0.05  # root mean squares, of the logits'


def source(name: str, device: torch.device, kv: str | None = None) -> RandomModel | RandomCheckpoint:
    options = SCHEMES[name]
    if options is None:
        return RandomModel(SHAPES["tiny"])
    if "F" in name and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("no E4M3 below capability 8.9")
    cache = None if kv is None else CacheScheme(format=kv)  # type: ignore[arg-type]
    return RandomCheckpoint(SHAPES["tiny"], layer_scheme(name, **options), layer_scheme("W8A8"), device, cache)


def session(name: str, device: torch.device, *, graphs: bool = True, kv: str | None = None) -> NativeSession:
    return NativeSession(source(name, device, kv), device="cuda", max_length=64, graphs=graphs)


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def decoded(one: NativeSession, tokens: np.ndarray, start: int) -> np.ndarray:
    """Logits [B, T − start, V] of tokens [B, T], the first `start` of them as a prompt."""
    one.reset()
    one.prefill(tokens[:, :start])
    return np.stack([one.decode(column) for column in tokens[:, start:].T], axis=1)


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_graph_decodes_as_single_launches_do(name: str, kv: str | None, device: torch.device) -> None:
    if name == "bf16" and kv:
        pytest.skip("a float model has no cache scheme")
    got, wanted = (decoded(session(name, device, graphs=graphs, kv=kv), PROMPT, 8) for graphs in (True, False))
    assert np.isfinite(wanted).all()
    assert off(got, wanted) <= GRAPH_ERROR


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_decoding_is_prefilling(name: str, kv: str | None, device: torch.device) -> None:
    if name == "bf16" and kv:
        pytest.skip("a float model has no cache scheme")
    one = session(name, device, kv=kv)
    whole = one.prefill(PROMPT)[:, 8:]
    assert off(decoded(one, PROMPT, 8), whole) <= ROUNDING


@pytest.mark.parametrize("name", SCHEMES)
def test_others_beside_a_sequence_change_no_more_than_rounding(name: str, device: torch.device) -> None:
    one = session(name, device)
    alone = decoded(one, PROMPT, 8)
    beside = decoded(one, np.concatenate((PROMPT, PROMPT[:, ::-1], PROMPT + 9)), 8)[:1]
    assert off(beside, alone) <= ROUNDING


def test_integer_products_and_an_integer_cache_decode_the_same_bits_beside_others(device: torch.device) -> None:
    one = session("W4A8", device, kv="int8")
    # One token first and the others by decoding: torch's own attention of a prompt promises nothing.
    alone = decoded(one, PROMPT, 1)
    beside = decoded(one, np.concatenate((PROMPT[:, ::-1], PROMPT, PROMPT + 9)), 1)
    assert np.array_equal(beside[1], alone[0])


def test_a_second_batch_size_gets_its_own_graph(device: torch.device) -> None:
    one = session("W4A8", device)
    first = decoded(one, PROMPT, 8)
    decoded(one, np.repeat(PROMPT, 3, axis=0), 8)
    assert off(decoded(one, PROMPT, 8), first) <= GRAPH_ERROR
