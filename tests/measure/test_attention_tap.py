"""The tap on attention: it changes nothing, goes away, and sees the weights that transformers' eager attention has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.quantize.architectures.sites import SITES
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.sink_statistics import KEYS, SHORT, SINK_THRESHOLD, SinkStatistics
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import attention_tap
from qtool.quantize.measure.attention_tap import Weights, sink_statistics, tapped_attention

Make = Callable[..., Path]
WINDOWED = {"mistral": 10, "mixtral": 10, "phi3": 10, "gemma2": 8, "gemma3_text": 8, "gpt_oss": 8}
ATTENDING = [family for family in SITES if not family.startswith("mamba")]
TOKENS = torch.randint(0, 256, (3, 75), generator=torch.Generator().manual_seed(6))


def folder_of(family: str, tiny_model: Make) -> Path:
    config = {"sliding_window": WINDOWED[family]} if family in WINDOWED else {}
    if family == "gemma2":
        config["attn_logit_softcapping"] = 5.0  # type: ignore[assignment]
    return tiny_model(family, **config)


def importance_of(weights: np.ndarray, keys: int, asked: list[int]) -> np.ndarray:
    """[S, H, keys] of [S, H, T, T]: loops over keys and queries."""
    found = np.zeros((*weights.shape[:2], keys))
    for key in range(keys):
        mine = [query for query in asked if query >= key]
        found[:, :, key] = weights[:, :, mine, key].mean(axis=2)
    return found


def brute(weights: np.ndarray) -> SinkStatistics:
    """Of all weights [S, H, T, T] of one batch."""
    sequences, heads, length, _ = weights.shape
    cut, keys = min(SHORT, length), min(KEYS, length)
    short = importance_of(weights[:, :, :cut, :cut], 1, list(range(cut)))
    asked = [query for query in range(length) if (length - 1 - query) % attention_tap.STRIDE == 0]
    full = importance_of(weights[:1], keys, asked)
    importance = np.zeros((heads, KEYS))
    importance[:, :keys] = full[0]
    return SinkStatistics(
        sequences=np.array([sequences, 1]),
        first_short=(short[:, :, 0] > SINK_THRESHOLD).sum(axis=0),
        first_full=(full[:, :, 0] > SINK_THRESHOLD).sum(axis=0),
        any_full=(full > SINK_THRESHOLD).any(axis=2).sum(axis=0),
        importance=importance,
    )


def assert_same(ours: SinkStatistics, theirs: SinkStatistics) -> None:
    for name in ("sequences", "first_short", "first_full", "any_full"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    np.testing.assert_allclose(ours.importance, theirs.importance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ATTENDING)
def test_weights_are_those_of_eager_attention(family: str, tiny_model: Make) -> None:
    folder = folder_of(family, tiny_model)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    network = load_network(open_model(str(folder)))
    seen: list[tuple[Tensor, SinkStatistics, Tensor, Tensor]] = []

    def see(module: nn.Module, query: Tensor, key: Tensor, weights: Weights) -> None:
        whole = weights(slice(None), slice(0, 75, 1), 75)
        seen.append((whole, sink_statistics(weights, query), query, key))

    with torch.no_grad():
        theirs = eager(TOKENS, output_attentions=True).attentions
        with tapped_attention(network, see):
            network(TOKENS)
    assert len(seen) == len(theirs) == 2
    for (weights, sinks, query, key), wanted in zip(seen, theirs, strict=True):
        assert wanted.shape == (3, 4, 75, 75) == weights.shape
        torch.testing.assert_close(weights, wanted, rtol=0, atol=2e-5)
        assert_same(sinks, brute(wanted.double().numpy()))
        assert query.shape[:3] == (3, 4, 75) and key.shape[2] == 75


def weights_of(query: Tensor, key: Tensor, *, window: int, scaling: float) -> np.ndarray:
    """Eager softmax, head by head and query by query."""
    sequences, heads, length, _ = query.shape
    weights = np.zeros((sequences, heads, length, length))
    for s, h, t in np.ndindex(sequences, heads, length):
        mine = key[s, h * key.shape[1] // heads].double().numpy()
        first = max(0, t + 1 - window)
        scores = mine[first : t + 1] @ query[s, h, t].double().numpy() * scaling
        powers = np.exp(scores - scores.max())
        weights[s, h, t, first : t + 1] = powers / powers.sum()
    return weights


@pytest.mark.parametrize("length", [1, 40, 64, 90])
@pytest.mark.parametrize("window", [1000, 7])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "added"])
def test_sinks_equal_a_written_out_softmax(
    length: int, window: int, mask_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mask_kind == "none" and window < 1000:
        window = 1000  # without a mask attention is causal and nothing else
    monkeypatch.setattr(attention_tap, "QUERIES_AT_ONCE", 4 * attention_tap.STRIDE)
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, length, 8, generator=generator) * 2
    key = torch.randn(2, 2, length, 8, generator=generator)
    query[..., 0] = 6
    key[:, :, 0, 0] += torch.tensor([4.0, 0.0])  # a sink for some heads
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    allowed = (columns <= rows) & (columns > rows - window)
    masks: dict[str, Any] = {
        "none": None,
        "bool": allowed[None, None],
        "added": torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None],
    }
    weights = attention_tap._computed(query, key, masks[mask_kind], {"scaling": 0.3})
    wanted = brute(weights_of(query, key, window=window, scaling=0.3))
    assert_same(sink_statistics(weights, query), wanted)
    if length == 90 and window == 1000:
        assert 0 < wanted.first_short.sum() < 12, "the test should have heads with a sink and heads without"


@pytest.mark.parametrize("family", SITES)
def test_logits_are_bit_identical_with_and_without_the_tap(family: str, tiny_model: Make) -> None:
    network = load_network(open_model(str(folder_of(family, tiny_model))))
    before = network.config._attn_implementation
    calls: list[nn.Module] = []
    with torch.no_grad():
        plain = network(TOKENS).logits
        with tapped_attention(network, lambda module, *_: calls.append(module)):
            tapped = network(TOKENS).logits
        again = network(TOKENS).logits
    assert torch.equal(plain, tapped) and torch.equal(plain, again)
    assert len(calls) == (0 if family.startswith("mamba") else 2)
    assert network.config._attn_implementation == before


def test_the_config_is_restored_after_an_exception(tiny_model: Make) -> None:
    network = load_network(open_model(str(tiny_model())))
    before = network.config._attn_implementation

    def fail(*_: object) -> None:
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"), torch.no_grad(), tapped_attention(network, fail):
        network(TOKENS)
    assert network.config._attn_implementation == before
    with torch.no_grad():
        network(TOKENS)


def test_sinks_merge_by_adding() -> None:
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((4, 3, 20, 20)))
    weights /= weights.sum(axis=3, keepdims=True)
    one, other = brute(weights[:2]), brute(weights[2:])
    both = one.merge(other)
    assert both.sequences.tolist() == [4, 2]
    np.testing.assert_array_equal(both.importance, one.importance + other.importance)
    np.testing.assert_array_equal(both.rate_short, (one.first_short + other.first_short) / 4)
    np.testing.assert_array_equal(both.rate_full, (one.first_full + other.first_full) / 2)
