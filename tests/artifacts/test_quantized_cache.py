"""Attention over a quantized cache: the same in one pass and token by token, and what each option buys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qtool.errors import UsageError
from qtool.kernels.quantize_kv import KVFormat
from qtool.kernels.quantize_kv.cache_reference import quantize_heads, to_bytes
from qtool.quantize.artifacts import quantized_cache
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.network import load_network, replace_module
from qtool.quantize.artifacts.quantized_cache import codes_and_back, quantize_cache
from qtool.quantize.inputs import open_model

Make = Callable[..., Path]
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt")
FAMILIES = (*DENSE, "qwen3_moe", "mixtral", "gpt_oss")
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
# Computed in float64, where rounding to codes does not flip; gemma2's own softmax is float32 everywhere.
LOOSE = {"gemma2": 2e-6}
SCHEMES = [
    {"format": "int8"},
    {"format": "int4", "rotate": True},
    {"format": "int4", "symmetric": True, "past_only": True},
    {"format": "fp8_e4m3", "values": "int4", "group_size": 16, "rotate": True, "past_only": True},
]
BIASED = [{"format": "int4", "before_bias": True}, {"format": "int8", "before_bias": True, "past_only": True}]


def network_of(folder: Path) -> Any:
    return load_network(open_model(str(folder))).double()


@torch.inference_mode()
def logits(network: Any, tokens: Tensor = TOKENS) -> Tensor:
    out: Tensor = network(tokens).logits
    return out


@torch.inference_mode()
def by_pieces(network: Any, first: int = 10) -> Tensor:
    """Logits of a first piece in one pass, a second one, and then token by token."""
    cache = DynamicCache(config=network.config)
    edges = [0, first, first + 4, *range(first + 5, TOKENS.shape[1] + 1)]
    parts = [
        network(TOKENS[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in pairwise(edges)
    ]
    return torch.cat(parts, dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_alone_changes_nothing(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    network = load_network(open_model(str(tiny_model(family))))
    wanted = logits(network)
    seen = []
    monkeypatch.setattr(quantized_cache, "codes_and_back", lambda x, scheme: seen.append(x) or x)
    quantize_cache(network, CacheScheme(format="int8", rotate=True))
    rotated = logits(network)
    assert len(seen) == 4, "keys and values of two blocks"
    assert float((rotated - wanted).abs().max()) <= 1e-4 * float(wanted.max() - wanted.min())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_pieces_and_single_tokens_agree(tiny_model: Make, family: str) -> None:
    folder = tiny_model(family)
    in_float = logits(network_of(folder))
    for options in SCHEMES + (BIASED if family in ("qwen2", "gpt_oss") else []):
        network = network_of(folder)
        quantize_cache(network, CacheScheme(**options))
        whole = logits(network)
        assert distance(whole, in_float) > 1e-4, "nothing was quantized"
        torch.testing.assert_close(by_pieces(network), whole, rtol=0, atol=LOOSE.get(family, 1e-10))
        torch.testing.assert_close(logits(network, TOKENS[1:]), whole[1:], rtol=0, atol=LOOSE.get(family, 1e-10))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_past_only_equals_attention_one_position_at_a_time(tiny_model: Make, family: str) -> None:
    network = network_of(tiny_model(family))
    scheme = CacheScheme(format="int4", past_only=True)
    caught: list[tuple[Any, ...]] = []
    inner = quantized_cache.named_attention(network.config._attn_implementation, network.model.layers[1].self_attn)
    quantize_cache(network, scheme)
    module = network.model.layers[1].self_attn
    ours = quantized_cache._attention(scheme, "eager" if family == "gemma2" else "sdpa")
    query, key, value = (torch.randn(1, heads, 6, 16, dtype=torch.float64) for heads in (4, 2, 2))
    kwargs = {"scaling": module.scaling, **({"softcap": module.attn_logit_softcapping} if family == "gemma2" else {})}
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -1e300)
    whole, _ = ours(module, query, key, value, mask[None, None], **kwargs)
    for t in range(6):
        keys = torch.cat((codes_and_back(key[:, :, :t], scheme.key_codes), key[:, :, t : t + 1]), dim=2)
        values = torch.cat((codes_and_back(value[:, :, :t], scheme.value_codes), value[:, :, t : t + 1]), dim=2)
        everything = torch.zeros(1, 1, 1, t + 1, dtype=torch.float64)
        caught.append(inner(module, query[:, :, t : t + 1], keys, values, everything, **kwargs))
    torch.testing.assert_close(whole, torch.cat([out for out, _ in caught], dim=1), rtol=0, atol=1e-6)


def test_past_only_leaves_the_first_token_exact(tiny_model: Make) -> None:
    network = network_of(tiny_model())
    in_float = logits(network)
    quantize_cache(network, CacheScheme(format="int4", past_only=True))
    ours = logits(network)
    torch.testing.assert_close(ours[:, 0], in_float[:, 0], rtol=0, atol=1e-10)
    assert float((ours[:, 1] - in_float[:, 1]).abs().max()) > 1e-4


def test_a_rotation_saves_keys_with_an_outlier_channel(tiny_model: Make) -> None:
    network = network_of(tiny_model("qwen3", head_dim=64))  # its norm of keys holds the channel up whatever the token
    for block in network.model.layers:
        block.self_attn.k_norm.weight[3] *= 30
        block.self_attn.q_norm.weight[3] /= 30
    in_float = logits(network)
    errors = {}
    before = network.config._attn_implementation
    for rotate in (False, True):
        network.config._attn_implementation = before
        quantize_cache(network, CacheScheme(format="int4", rotate=rotate))
        errors[rotate] = distance(logits(network), in_float)
    assert errors[True] < 0.6 * errors[False], errors


def test_before_bias_saves_keys_with_a_large_bias(tiny_model: Make) -> None:
    errors = {}
    for before_bias in (False, True):
        network = network_of(tiny_model("qwen2"))
        for block in network.model.layers:
            bias = block.self_attn.k_proj.bias
            bias.copy_(100 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
        in_float = logits(network)
        quantize_cache(network, CacheScheme(format="int4", before_bias=before_bias))
        errors[before_bias] = distance(logits(network), in_float)
    assert errors[True] < 0.3 * errors[False], errors


def test_before_bias_follows_a_projection_that_is_replaced(tiny_model: Make) -> None:
    network = network_of(tiny_model("qwen2"))
    in_float = logits(network)
    quantize_cache(network, CacheScheme(format="int4", before_bias=True))
    wanted = logits(network)
    for index in range(2):

        def copy_of(old: Any) -> torch.nn.Module:
            new = torch.nn.Linear(64, 32, dtype=torch.float64)
            new.weight, new.bias = old.weight, old.bias
            return new

        replace_module(network, f"model.layers.{index}.self_attn.k_proj", copy_of)
    assert torch.equal(logits(network), wanted)
    assert not torch.equal(wanted, in_float)


def test_gradients_pass_the_codes(tiny_model: Make) -> None:
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    codes = CacheScheme(format="int4").key_codes
    out = codes_and_back(x, codes)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    torch.testing.assert_close(out.detach(), codes_and_back(x.detach(), codes))


def test_groups_have_scales_of_their_own() -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(3))
    x[..., 40] = 50
    scheme = CacheScheme(format="int4", group_size=32)
    out = codes_and_back(x, scheme.key_codes)
    assert torch.equal(out[..., :32], codes_and_back(x[..., :32], CacheScheme(format="int4").key_codes))
    assert torch.equal(out[..., 32:], codes_and_back(x[..., 32:], CacheScheme(format="int4").key_codes))
    assert float((out - x)[..., :32].abs().max()) < 0.5 < float((out - x)[..., 32:].abs().max())


def test_values_may_have_a_format_of_their_own(tiny_model: Make) -> None:
    errors = {}
    for name, options in {
        "k8v8": {"format": "int8"},
        "k8v4": {"format": "int8", "values": "int4"},
        "k4v8": {"format": "int4", "values": "int8"},
        "k4v4": {"format": "int4"},
    }.items():
        network = network_of(tiny_model())
        in_float = logits(network)
        quantize_cache(network, CacheScheme(**options))
        errors[name] = distance(logits(network), in_float)
    assert errors["k8v8"] < 0.3 * min(errors["k8v4"], errors["k4v8"])
    assert errors["k4v8"] < 0.6 * errors["k4v4"], "of these random weights, values lose more"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"format": "int8"}, "KV int8"),
        ({"format": "int4"}, "KV int4 asym"),
        ({"format": "int4", "group_size": 16}, "KV int4 asym g16"),
        ({"format": "fp8_e4m3", "values": "int4"}, "K fp8_e4m3 V int4 asym"),
    ],
)
def test_bytes_per_token_are_what_the_codes_take(tiny_model: Make, options: dict[str, Any], name: str) -> None:
    config = open_model(str(tiny_model("qwen3", head_dim=64))).config
    scheme = CacheScheme(**options)
    total = 0
    for codes in (scheme.key_codes, scheme.value_codes):
        x = torch.randn(1, 2, 1, 64)  # one token, two heads
        fmt = KVFormat(format=codes.format, symmetric=codes.symmetric, group_size=codes.group_size)
        stored = quantize_heads(x, fmt)
        parts = [to_bytes(stored.codes, fmt), stored.scale, *([] if stored.offset is None else [stored.offset])]
        total += 2 * sum(t.numel() * t.element_size() for t in parts)  # two layers
    assert scheme.token_bytes(config) == total
    assert scheme.describe(config) == f"{name}: {total} bytes per token with scales, 16-bit floats 1,024"


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"format": "int4", "before_bias": True}, "no key bias"),
        ("qwen3", {"format": "int4", "before_bias": True}, "no key bias"),
        ("mamba", {"format": "int8"}, "no key-value cache"),
        ("llama", {"format": "int4", "group_size": 32}, "does not divide heads of 16"),
    ],
)
def test_models_without_such_a_cache_are_refused(
    tiny_model: Make, family: str, options: dict[str, Any], words: str
) -> None:
    source = open_model(str(tiny_model(family)))
    with pytest.raises(UsageError, match=words):
        CacheScheme(**options).check_model(source.config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "fp8_e4m3", "symmetric": False}, "no offset"),
        ({"format": "int4", "values": "fp8_e4m3", "symmetric": False}, "no offset"),
        ({"format": "int4", "rotate": True, "before_bias": True}, "choose one"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CacheScheme(**options).check()
